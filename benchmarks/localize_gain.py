"""What does locality gain in fine-tuning a trained ViT?

    python benchmarks/localize_gain.py run --data-path cifar10 --seeds 0 1 2 --output-dir runs/gain
    python benchmarks/localize_gain.py report --output-dir runs/gain --figure docs/figures/localize_gain.png

`run` trains a small plain ViT of timm from scratch on all training images. From that checkpoint it fine-tunes the arms
on every fourth image; they differ only in what `localize` does. Finished runs are skipped, and interrupted ones resume.
`report` prints the accuracies as a Markdown table and plots them. cifar10/ contains train/<class>/ and val/<class>/.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
from pathlib import Path

from small_images import mean_std

from localvit.train.run_folder import LOG, read_log

MODEL = ["--recipe", "small_images_32", "--model", "vit_tiny_patch16_224", "--input-size", "32"]
MODEL += ["--model-args", "patch_size=4", "embed_dim=96", "depth=6", "num_heads=3"]
FASTER = [
    "--locality-lr-scale",
    "30",
]  # Adapters start at zero, and hardly change at the learning rate of trained weights.
ARMS = {
    "plain": ("(a) as it is", [], "#7a8794"),
    "adapter": ("(b) `Adapter`", ["--localize", *FASTER], "#c0392b"),
    "replace": ("(c) `Replace`", ["--localize", "method=replace", "reduction=96"], "#d68910"),
    "frozen": ("(d) as (b), only locality trained", ["--localize", "trainable=locality", *FASTER], "#8e44ad"),
    "control": ("(e) as (b), 1 x 1 kernel", ["--localize", "kernel_size=1", *FASTER], "#2471a3"),
}


def train(folder: Path, *arguments: str) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "localvit",
            "train",
            *MODEL,
            *arguments,
            "--output-dir",
            str(folder),
            "--resume",
            "auto",
        ],
        env={"OMP_NUM_THREADS": "1"} | os.environ,  # so that a seed gives the same results on any machine
        check=True,
    )


def every_fourth(data_path: Path, folder: Path) -> Path:
    """Make a folder of links to every fourth training image of each class and to all validation images."""
    for source in sorted((data_path / "train").iterdir()):
        (folder / "train" / source.name).mkdir(parents=True, exist_ok=True)
        for image in sorted(source.iterdir())[::4]:
            link = folder / "train" / source.name / image.name
            if not link.is_symlink():
                link.symlink_to(image.resolve())
    if not (folder / "val").is_symlink():
        (folder / "val").symlink_to((data_path / "val").resolve())
    return folder


def run(args: argparse.Namespace) -> None:
    """Train the base, then the arms that are not trained yet."""
    base = args.output_dir / "base"
    if not (base / LOG).exists() or len(read_log(base / LOG)) < args.base_epochs:
        train(base, "--data-path", str(args.data_path), "--epochs", str(args.base_epochs))
    images = every_fourth(args.data_path, args.output_dir / "every_fourth")
    for seed in args.seeds:
        for arm, (_, flags, _) in ARMS.items():
            arguments = ["--data-path", str(images), "--finetune", str(base / "last.safetensors"), *flags]
            arguments += ["--epochs", str(args.epochs), "--lr", "0.002", "--seed", str(seed)]
            train(args.output_dir / f"{arm}-s{seed}", *arguments)


def report(args: argparse.Namespace) -> None:
    """Print the table, and plot the figure."""
    curves: dict[str, dict[int, list[float]]] = {arm: {} for arm in ARMS}
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    trained: dict[str, int] = {}
    for arm in ARMS:
        for folder in sorted(args.output_dir.glob(f"{arm}-s*")):
            rows = read_log(folder / LOG)
            curves[arm][int(folder.name.rpartition("-s")[2])] = [row["test_acc1"] for row in rows]
            trained[arm] = rows[-1]["n_parameters"]
            with (folder / "metrics.csv").open(newline="") as file:
                seconds[arm].append(sum(float(row["seconds"]) for row in csv.DictReader(file)))
    seeds = sorted(set.intersection(*(set(runs) for runs in curves.values())))
    base = read_log(args.output_dir / "base" / LOG)[-1]["test_acc1"]
    goal = statistics.mean(curves["plain"][seed][-1] for seed in seeds)
    print(f"Base: {base:.2f}. Seeds {', '.join(map(str, seeds))}.\n")
    print("| arm | parameters trained | Acc@1 | - (a) | epochs to (a)'s last | time |")
    print("|---|---|---|---|---|---|")
    for arm, (title, _, _) in ARMS.items():
        last = [curves[arm][seed][-1] for seed in seeds]
        gain = [mine - curves["plain"][seed][-1] for mine, seed in zip(last, seeds, strict=True)]
        mean = [statistics.mean(at) for at in zip(*(curves[arm][seed] for seed in seeds), strict=True)]
        reached = next((str(epoch) for epoch, acc1 in enumerate(mean, start=1) if acc1 >= goal), "never")
        time = f"{statistics.median(seconds[arm]):.0f} s"
        cells = [title, f"{trained[arm]:,}", mean_std(last), mean_std(gain) if arm != "plain" else "", reached, time]
        print(f"| {' | '.join(cells)} |")
    if args.figure:
        draw({arm: [curves[arm][seed] for seed in seeds] for arm in ARMS}, base, args.figure)


def draw(curves: dict[str, list[list[float]]], base: float, image: Path) -> None:
    """Plot the mean accuracy by epoch, with a dot per seed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 3.8), dpi=110, layout="constrained")
    axes = figure.subplots()
    for arm, (title, _, color) in ARMS.items():
        means = [statistics.mean(at) for at in zip(*curves[arm], strict=True)]
        axes.plot(range(1, len(means) + 1), means, color=color, label=title)
        for acc1 in curves[arm]:
            axes.scatter(range(1, len(acc1) + 1), acc1, color=color, s=10)
    axes.axhline(base, color="#b9c2c9", linestyle=":", label="before fine-tuning")
    axes.set(xlabel="epochs of fine-tuning", ylabel="Acc@1 (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e9ec")
    axes.set_axisbelow(True)
    figure.savefig(image)


def main() -> None:
    """Run the benchmark, or report its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--data-path", type=Path)
    parser.add_argument("--base-epochs", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/gain"))
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    {"run": run, "report": report}[args.what](args)


if __name__ == "__main__":
    main()
