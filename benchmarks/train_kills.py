"""Check that a run that is killed many times gives the same result, bit for bit, as an uninterrupted run.

    python benchmarks/train_kills.py [--kills 20] [--workers 0 1 3] [--epochs 4] [--seed 0]

For each number of workers, train on the digits once without interruption, and once with SIGKILL at `--kills` random
times, each followed by `--resume auto`. Then all weights, buffers, averages, moments and the log must be identical. All
sources of random numbers are on: augmentation, mixing, stochastic depth. The exit status is 1 if anything differs.
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

from localvit.train.run_folder import LOG, STATE, read_state

SETTINGS = shlex.split(
    "--recipe digits --batch-size 32 --checkpoint-steps 3 --drop-path-rate 0.1 --ema-decay 0.99 --repeated-aug "
    "--mixup 0.8 --cutmix 1.0 --auto-augment rand-m9-mstd0.5-inc1 --random-erasing 0.25 --device cpu"
)


def start(folder: Path, workers: int, epochs: int, *more: str) -> subprocess.Popen:
    """Start a training process."""
    flags = [*SETTINGS, "--epochs", str(epochs), "--workers", str(workers), "--output-dir", str(folder), *more]
    return subprocess.Popen(
        [sys.executable, "-m", "localvit", "train", *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait(run: subprocess.Popen) -> None:
    """Wait for a run. Raises RuntimeError if it fails."""
    _, err = run.communicate()
    if run.returncode:
        raise RuntimeError(err)


def train_with_kills(folder: Path, workers: int, epochs: int, kills: int, seconds: tuple[float, float]) -> int:
    """Train, and kill the process up to `kills` times, `seconds` (range) after a start. Returns the number of kills."""
    for number in range(kills):
        run = start(folder, workers, epochs, "--resume", "auto")
        deadline = time.monotonic() + random.uniform(*seconds)
        while run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        if run.poll() is not None:
            wait(run)
            return number
        run.kill()
        run.communicate()
    wait(start(folder, workers, epochs, "--resume", "auto"))
    return kills


def same(one: object, other: object) -> bool:
    """Whether two trees of plain values and tensors are bit-exact."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def differences(one: Path, other: Path) -> list[str]:
    """Names of the entries in which two finished runs differ."""
    states = [read_state(folder / STATE) for folder in (one, other)]
    names = ("model", "model_ema", "optimizer", "lr_scheduler", "scaler", "epoch")
    found = [name for name in names if not same(states[0][name], states[1][name])]
    return found + ([LOG] if (one / LOG).read_text() != (other / LOG).read_text() else [])


def main() -> int:
    """Run, and print one line per number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 3])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    failed = False
    for workers in options.workers:
        root = Path(tempfile.mkdtemp())
        begin = time.monotonic()
        uninterrupted = start(root / "uninterrupted", workers, options.epochs)
        while uninterrupted.poll() is None and not (root / "uninterrupted" / STATE).exists():
            time.sleep(0.01)
        startup = time.monotonic() - begin
        wait(uninterrupted)
        training = time.monotonic() - begin - startup
        # Some kills hit the startup, most the training, and none comes after its end.
        seconds = (startup / 2, startup + training / options.kills)
        kills = train_with_kills(root / "killed", workers, options.epochs, options.kills, seconds)
        found = differences(root / "uninterrupted", root / "killed")
        failed |= bool(found) or kills < options.kills
        print(
            f"{workers} workers: {kills} kills, {', '.join(found) + ' differ' if found else 'bit-exact'}",
            flush=True,
        )
        shutil.rmtree(root)
    return failed


if __name__ == "__main__":
    sys.exit(main())
