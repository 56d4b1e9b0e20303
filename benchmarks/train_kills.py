"""Does a run that is killed again and again end with the bits of one that never was?

    python benchmarks/train_kills.py [--kills 20] [--workers 0 1 3] [--epochs 4] [--seed 0]

For each number of workers, the digits are trained once undisturbed, and once ended with SIGKILL at so many random
moments, each time gone on with `--resume auto`. Then every weight, buffer, average and moment, and the log, must be the
same. Every random draw is on: augmentation, mixing, stochastic depth. The exit status is 1 if anything differs.
"""

import argparse
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

SETTINGS = shlex.split(
    "--recipe digits --batch-size 32 --checkpoint-steps 3 --drop-path-rate 0.1 --ema-decay 0.99 --repeated-aug "
    "--mixup 0.8 --cutmix 1.0 --auto-augment rand-m9-mstd0.5-inc1 --random-erasing 0.25 --device cpu"
)


def started(folder: Path, workers: int, epochs: int, *more: str) -> subprocess.Popen:
    """A training process."""
    told = [*SETTINGS, "--epochs", str(epochs), "--workers", str(workers), "--output-dir", str(folder), *more]
    return subprocess.Popen(
        [sys.executable, "-m", "localvit", "train", *told],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(run: subprocess.Popen) -> None:
    """Wait for a run, which must succeed."""
    _, told = run.communicate()
    if run.returncode:
        raise RuntimeError(told)


def killed_again_and_again(folder: Path, workers: int, epochs: int, kills: int, moments: tuple[float, float]) -> int:
    """Train with up to `kills` ends at random `moments` after a start; returns how many there were."""
    for number in range(kills):
        run = started(folder, workers, epochs, "--resume", "auto")
        deadline = time.monotonic() + random.uniform(*moments)
        while run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        if run.poll() is not None:
            finished(run)
            return number
        run.kill()
        run.communicate()
    finished(started(folder, workers, epochs, "--resume", "auto"))
    return kills


def same(one: object, other: object) -> bool:
    """Whether two trees of plain values and tensors hold the same bits."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def differences(one: Path, other: Path) -> list[str]:
    """What two finished runs do not share."""
    from localvit.train.run_folder import LOG, STATE, read_state

    states = [read_state(folder / STATE) for folder in (one, other)]
    names = ("model", "model_ema", "optimizer", "lr_scheduler", "scaler", "epoch")
    found = [name for name in names if not same(states[0][name], states[1][name])]
    return found + ([LOG] if (one / LOG).read_text() != (other / LOG).read_text() else [])


def main() -> int:
    """Run and print a line for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 3])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    random.seed(asked.seed)
    failed = False
    for workers in asked.workers:
        root = Path(tempfile.mkdtemp())
        begun = time.monotonic()
        undisturbed = started(root / "undisturbed", workers, asked.epochs)
        while undisturbed.poll() is None and not (root / "undisturbed" / "checkpoint.pth").exists():
            time.sleep(0.01)
        starting = time.monotonic() - begun
        finished(undisturbed)
        training = time.monotonic() - begun - starting
        # Some while it starts, most while it trains, and all of them before it has finished.
        moments = (starting / 2, starting + training / asked.kills)
        kills = killed_again_and_again(root / "killed", workers, asked.epochs, asked.kills, moments)
        found = differences(root / "undisturbed", root / "killed")
        failed |= bool(found) or kills < asked.kills
        print(
            f"{workers} workers: {kills} kills, {', '.join(found) + ' differ' if found else 'the same bits'}",
            flush=True,
        )
        shutil.rmtree(root)
    return failed


if __name__ == "__main__":
    sys.exit(main())
