"""Compare LocalViT with a plain transformer on small images, for several lengths of training.

    python benchmarks/small_images.py run --data-path cifar10 --epochs 1 3 --seeds 0 1 2 --output-dir runs/small
    python benchmarks/small_images.py report --output-dir runs/small --figure docs/figures/small_images.png

`run` trains three models with the recipe `small_images_32`, with no other difference: LocalViT; the control, whose
feed-forward lacks the depth-wise convolution (same norms, activations and gate, but no exchange between neighbors); and
the plain transformer. Finished runs are skipped, interrupted ones are resumed. `report` prints the accuracies as a
Markdown table and plots them. cifar10/ contains train/<class>/ and val/<class>/.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from localvit.train.run_folder import LOG, read_log

ARMS = {
    "local": ("LocalViT", [], "#c0392b"),
    "control": ("control: no neighbors", ["--model-args", "depthwise=false"], "#2471a3"),
    "plain": ("plain transformer", ["--model-args", "local_blocks=[]"], "#7a8794"),
}


def run(options: argparse.Namespace) -> None:
    """Train all runs that are not finished, short schedules first."""
    for epochs in sorted(options.epochs):
        for seed in options.seeds:
            for arm, (_, arguments, _) in ARMS.items():
                folder = options.output_dir / f"{arm}-e{epochs}-s{seed}"
                flags = ["--recipe", "small_images_32", "--data-path", str(options.data_path), *arguments]
                flags += ["--epochs", str(epochs), "--seed", str(seed), "--output-dir", str(folder), "--resume", "auto"]
                subprocess.run(
                    [sys.executable, "-m", "localvit", "train", *flags],
                    env={"OMP_NUM_THREADS": "1"} | os.environ,  # results then do not depend on the number of cores
                    check=True,
                )


def finished_runs(directory: Path) -> Iterator[tuple[int, int, str, list[float]]]:
    """Epochs, seed, arm, and Acc@1 after each epoch, for every finished run."""
    for folder in sorted(directory.glob("*-e*-s*")):
        arm, epochs, seed = folder.name.split("-")
        if (folder / LOG).exists():
            acc1 = [row["test_acc1"] for row in read_log(folder / LOG)]
            if len(acc1) == int(epochs[1:]):
                yield int(epochs[1:]), int(seed[1:]), arm, acc1


def mean_std(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def report(options: argparse.Namespace) -> None:
    """Print the table, and plot the figure."""
    curves: dict[int, dict[str, dict[int, list[float]]]] = {}
    for epochs, seed, arm, acc1 in finished_runs(options.output_dir):
        curves.setdefault(epochs, {name: {} for name in ARMS})[arm][seed] = acc1
    print(f"| epochs | seeds | {' | '.join(title for title, _, _ in ARMS.values())} | LocalViT - plain | - control |")
    print(f"|---|---|{'---|' * (len(ARMS) + 2)}")
    for epochs, arms in sorted(curves.items()):
        seeds = sorted(set.intersection(*(set(runs) for runs in arms.values())))
        if not seeds:
            continue
        last = {arm: [runs[seed][-1] for seed in seeds] for arm, runs in arms.items()}
        gains = [
            mean_std([local - other for local, other in zip(last["local"], last[arm], strict=True)])
            for arm in ("plain", "control")
        ]
        cells = [str(epochs), ", ".join(map(str, seeds)), *(mean_std(last[arm]) for arm in ARMS), *gains]
        print(f"| {' | '.join(cells)} |")
    if options.figure:
        draw(curves, options.figure)


def draw(curves: dict[int, dict[str, dict[int, list[float]]]], image: Path) -> None:
    """Plot the accuracy by epoch of the longest schedule, and at the end of each schedule."""
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
    by_epoch.set(title=f"schedule of {longest} epochs, one line per seed", xlabel="epoch", ylabel="Acc@1 (%)")
    by_length.set(title="end of each schedule, one dot per seed", xlabel="epochs of the schedule")
    by_epoch.legend(frameon=False)
    for axes in (by_epoch, by_length):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e9ec")
        axes.set_axisbelow(True)
        axes.title.set_fontsize(10)
    figure.savefig(image)


def main() -> None:
    """Run or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "report"])
    parser.add_argument("--data-path", type=Path)
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/small"))
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    {"run": run, "report": report}[options.action](options)


if __name__ == "__main__":
    main()
