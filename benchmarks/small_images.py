"""Does locality help where there are few and small images, and does it still when training is longer?

    python benchmarks/small_images.py run --data-path cifar10 --epochs 1 3 --seeds 0 1 2 --output-dir runs/small
    python benchmarks/small_images.py report --output-dir runs/small --figure docs/figures/small_images.png

`run` trains three arms of the recipe `small_images_32` that differ in nothing else: LocalViT; the control, its
feed-forward without the depth-wise convolution (same norms, activations and gate, no neighbors); and the plain
transformer. Runs that are finished are left alone, those that were interrupted go on. `report` prints the accuracies as
a Markdown table and draws them. cifar10/ holds train/<class>/ and val/<class>/.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from localvit.train.run_folder import LOG, read_log

ARMS = {
    "local": ("LocalViT", [], "#c0392b"),
    "control": ("control: no neighbors", ["--model-args", "depthwise=false"], "#2471a3"),
    "plain": ("plain transformer", ["--model-args", "local_blocks=[]"], "#7a8794"),
}


def run(asked: argparse.Namespace) -> None:
    """Train what is not yet trained, short schedules first."""
    for epochs in sorted(asked.epochs):
        for seed in asked.seeds:
            for arm, (_, flags, _) in ARMS.items():
                folder = asked.output_dir / f"{arm}-e{epochs}-s{seed}"
                told = ["--recipe", "small_images_32", "--data-path", str(asked.data_path), *flags]
                told += ["--epochs", str(epochs), "--seed", str(seed), "--output-dir", str(folder), "--resume", "auto"]
                subprocess.run(
                    [sys.executable, "-m", "localvit", "train", *told],
                    env={"OMP_NUM_THREADS": "1"} | os.environ,  # so that a seed gives the same bits on any machine
                    check=True,
                )


def finished(directory: Path) -> Iterator[tuple[int, int, str, list[float]]]:
    """Epochs, seed, arm, and Acc@1 after each epoch, of every finished run."""
    for folder in sorted(directory.glob("*-e*-s*")):
        arm, epochs, seed = folder.name.split("-")
        if (folder / LOG).exists():
            acc1 = [row["test_acc1"] for row in read_log(folder / LOG)]
            if len(acc1) == int(epochs[1:]):
                yield int(epochs[1:]), int(seed[1:]), arm, acc1


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def report(asked: argparse.Namespace) -> None:
    """Print the table, and draw the figure."""
    curves: dict[int, dict[str, dict[int, list[float]]]] = {}
    for epochs, seed, arm, acc1 in finished(asked.output_dir):
        curves.setdefault(epochs, {name: {} for name in ARMS})[arm][seed] = acc1
    print(f"| epochs | seeds | {' | '.join(title for title, _, _ in ARMS.values())} | LocalViT - plain | - control |")
    print(f"|---|---|{'---|' * (len(ARMS) + 2)}")
    for epochs, arms in sorted(curves.items()):
        seeds = sorted(set.intersection(*(set(runs) for runs in arms.values())))
        if not seeds:
            continue
        last = {arm: [runs[seed][-1] for seed in seeds] for arm, runs in arms.items()}
        gains = [
            spread([local - other for local, other in zip(last["local"], last[arm], strict=True)])
            for arm in ("plain", "control")
        ]
        cells = [str(epochs), ", ".join(map(str, seeds)), *(spread(last[arm]) for arm in ARMS), *gains]
        print(f"| {' | '.join(cells)} |")
    if asked.figure:
        draw(curves, asked.figure)


def draw(curves: dict[int, dict[str, dict[int, list[float]]]], image: Path) -> None:
    """Accuracy by epoch of the longest schedule, and at the end of each."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    by_epoch, by_length = figure.subplots(1, 2, sharey=True)
    longest = max(curves)
    for arm, (title, _, color) in ARMS.items():
        for number, (_, acc1) in enumerate(sorted(curves[longest][arm].items())):
            label = title if number == 0 else None
            by_epoch.plot(range(1, longest + 1), acc1, color=color, marker="o", ms=3, label=label)
        ends = {
            epochs: [acc1[-1] for acc1 in arms[arm].values()] for epochs, arms in sorted(curves.items()) if arms[arm]
        }
        by_length.plot(list(ends), [statistics.mean(values) for values in ends.values()], color=color)
        for epochs, values in ends.items():
            by_length.scatter([epochs] * len(values), values, color=color, s=14)
    by_epoch.set(title=f"schedule of {longest} epochs, a line a seed", xlabel="epochs trained", ylabel="Acc@1 (%)")
    by_length.set(title="end of each schedule, a dot a seed", xlabel="epochs of the schedule")
    by_epoch.legend(frameon=False)
    for axes in (by_epoch, by_length):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e9ec")
        axes.set_axisbelow(True)
        axes.title.set_fontsize(10)
    figure.savefig(image)


def main() -> None:
    """Run or report, as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--data-path", type=Path)
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/small"))
    parser.add_argument("--figure", type=Path)
    asked = parser.parse_args()
    {"run": run, "report": report}[asked.what](asked)


if __name__ == "__main__":
    main()
