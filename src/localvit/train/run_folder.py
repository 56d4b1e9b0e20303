"""The files in a run's output folder, and finding the checkpoint to resume from.

`checkpoint.pth` is the newest training checkpoint, `checkpoint.1.pth` the one before, and so on. `last.safetensors` and
`best.safetensors` are the models after the last and the best epoch. `log.txt` has one line per epoch. `config.yaml`
contains the settings.
"""

import errno
import json
import logging
import shutil
import subprocess
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from localvit.checkpoints import save_checkpoint, versions
from localvit.train.config import TrainConfig
from localvit.train.state import Row, TrainState
from localvit.utils.files import atomic_write
from localvit.utils.weight_files import CheckpointError, read_weight_file

logger = logging.getLogger(__name__)

STATE = "checkpoint.pth"
_UNPLACED = "checkpoint.new.pth"  # complete, but not yet renamed; remains if the run is killed at that moment
LAST = "last.safetensors"
BEST = "best.safetensors"
LOG = "log.txt"
CONFIG = "config.yaml"


def save_state(entries: Mapping[str, Any], directory: Path, keep: int) -> None:
    """Save `entries` as the newest checkpoint, and keep the newest `keep`.

    Raises OSError with the cause; the earlier checkpoints are then unchanged.
    """
    unplaced = directory / _UNPLACED
    try:
        with atomic_write(unplaced) as unfinished:
            torch.save(dict(entries), unfinished)
        for number in reversed(range(keep - 1)):
            if (directory / _name(number)).exists():
                (directory / _name(number)).replace(directory / _name(number + 1))
        unplaced.replace(directory / STATE)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError if the disk is full
        raise _unwritable(directory, error) from error
    for surplus in _states(directory)[keep:]:
        surplus.unlink()


def _name(number: int) -> str:
    return f"checkpoint.{number}.pth" if number else STATE


def _states(directory: Path) -> list[Path]:
    """The training checkpoints in a folder, newest first."""
    numbered = sorted(
        (path for path in directory.glob("checkpoint.*.pth") if path.suffixes[0][1:].isdigit()),
        key=lambda path: int(path.suffixes[0][1:]),
    )
    return [path for path in (directory / _UNPLACED, directory / STATE, *numbered) if path.exists()]


def _unwritable(directory: Path, error: Exception) -> OSError:
    free = shutil.disk_usage(directory).free if directory.exists() else None
    full = getattr(error, "errno", None) == errno.ENOSPC or (free is not None and free < 1 << 20)
    why = f"its disk is full ({free or 0:,} bytes free)" if full else str(error).splitlines()[0]
    return OSError(f"cannot write to {directory}: {why}; the checkpoints saved before are unchanged")


def prepare_folder(directory: Path, entries: Mapping[str, Any], keep: int) -> None:
    """Create the folder of a run, and check that its files will fit on the disk.

    Args:
        directory: the output folder.
        entries: the checkpoint entries at the start of the run, for their size.
        keep: number of checkpoints to keep.

    Raises OSError.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot create {directory}: {error}; choose another --output-dir") from error
    weights = sum(value.nbytes for value in entries["model"].values())
    models = 2 if entries["model_ema"] else 1
    # Checkpoints with the two moments of Adam, one more during writing, and the models of the last and the best epoch.
    needed = (keep + 1) * (models + 2) * weights + 2 * models * weights
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            f"{directory} has {free / 1e6:,.0f} MB of free space, and the run may need {needed / 1e6:,.0f} MB for "
            f"{keep} checkpoints and two models: free some space, choose another --output-dir, or a smaller --keep"
        )


def save_epoch(state: TrainState, directory: Path, description: Mapping[str, Any]) -> None:
    """Write the models and the log after an epoch. Each file is replaced atomically.

    `last.safetensors` contains the weights after this epoch, `best.safetensors` those of the first epoch with the
    highest accuracy. `log.txt` has one JSON object per line and epoch, with the published program's keys.
    """
    row = state.rows[-1]
    try:
        for name in (LAST, BEST) if state.best is row else (LAST,):
            save_checkpoint(
                state.model,
                directory / name,
                ema=state.ema.module.state_dict() if state.ema else None,
                class_names=description["class_names"],
                preprocessing=description["preprocessing"],
                about={"epoch": row["epoch"], "metrics": row, **description["about"]},
            )
        with atomic_write(directory / LOG) as log:
            log.write_text("".join(json.dumps(each) + "\n" for each in state.rows))
    except (OSError, RuntimeError) as error:
        raise _unwritable(directory, error) from error


def read_log(path: Path) -> list[Row]:
    """The rows of a log. Raises FileNotFoundError, or ValueError for another kind of file or a log without a row."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a training log: {error}") from error
    if not rows:
        raise ValueError(f"{path} has no finished epoch")
    return rows


def write_config(config: TrainConfig, directory: Path, num_processes: int) -> None:
    """Write the settings, for `--config`, after comments with versions, git revision and number of processes."""
    about = versions() | {"git revision": _git_revision(), "processes": num_processes}
    comments = "".join(f"# {name}: {value}\n" for name, value in about.items())
    with atomic_write(directory / CONFIG) as file:
        file.write_text(comments + str(config))


def _git_revision() -> str:
    """The git revision of the checkout that contains this package; "none" if it is installed."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"


def newest_state(directory: Path) -> dict[str, Any] | None:
    """The entries of the newest intact checkpoint in a folder; None if there is no checkpoint.

    Logs a warning for each damaged one. Raises CheckpointError if all are damaged.
    """
    states = _states(directory)
    for path in states:
        try:
            entries = read_state(path)
        except CheckpointError as error:
            logger.warning(f"{error}; trying the checkpoint before")
            continue
        logger.info(f"resuming from {path}")
        return entries
    if states:
        raise CheckpointError(f"all checkpoints in {directory} are damaged; remove them to start from scratch")
    return None


def read_state(path: Path) -> dict[str, Any]:
    """The entries of a training checkpoint, verified with its checksums.

    Raises FileNotFoundError, or CheckpointError for a file that is damaged or not a training checkpoint.
    """
    if path.suffix == ".pth" and zipfile.is_zipfile(path):  # torch before 1.6 wrote no zip files
        try:
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()
        except zipfile.BadZipFile as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        if damaged:
            raise CheckpointError(f"{path} is damaged: its part {damaged} does not match its checksum")
    entries = read_weight_file(path)
    if not isinstance(entries.get("model"), Mapping):
        raise CheckpointError(
            f"{path} is not a training checkpoint: it has no entry 'model'; use --finetune to start from it"
        )
    return entries
