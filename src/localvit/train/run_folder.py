"""What a run leaves in its folder, and finding there where to go on.

`checkpoint.pth` is the newest state, `checkpoint.1.pth` the one before, and so on; `last.safetensors` and
`best.safetensors` are the models of the last epoch and of the best; `log.txt` has a row an epoch; `config.yaml` is what
the run was told.
"""

import errno
import json
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from localvit.checkpoints import save_checkpoint, versions
from localvit.train.config import TrainConfig
from localvit.train.state import Row, TrainState
from localvit.utils.files import atomic_write
from localvit.utils.weight_files import CheckpointError, read_weight_file

STATE = "checkpoint.pth"
_UNPLACED = "checkpoint.new.pth"  # whole, but not yet in its place: a run that is killed just then leaves it
LAST = "last.safetensors"
BEST = "best.safetensors"
LOG = "log.txt"
CONFIG = "config.yaml"


def save_state(entries: Mapping[str, Any], directory: Path, keep: int) -> None:
    """Make `entries` the newest state; the `keep` newest stay.

    Raises OSError, saying what is wrong with the disk; the states of before are then untouched.
    """
    unplaced = directory / _UNPLACED
    try:
        with atomic_write(unplaced) as unfinished:
            torch.save(dict(entries), unfinished)
        for number in reversed(range(keep - 1)):
            if (directory / _name(number)).exists():
                (directory / _name(number)).replace(directory / _name(number + 1))
        unplaced.replace(directory / STATE)
    except (OSError, RuntimeError) as error:  # torch says RuntimeError of a disk that is full
        raise _unwritable(directory, error) from error
    for surplus in _states(directory)[keep:]:
        surplus.unlink()


def _name(number: int) -> str:
    return f"checkpoint.{number}.pth" if number else STATE


def _states(directory: Path) -> list[Path]:
    """The states in a folder, newest first."""
    numbered = sorted(
        (path for path in directory.glob("checkpoint.*.pth") if path.suffixes[0][1:].isdigit()),
        key=lambda path: int(path.suffixes[0][1:]),
    )
    return [path for path in (directory / _UNPLACED, directory / STATE, *numbered) if path.exists()]


def _unwritable(directory: Path, error: Exception) -> OSError:
    free = shutil.disk_usage(directory).free if directory.exists() else None
    full = getattr(error, "errno", None) == errno.ENOSPC or (free is not None and free < 1 << 20)
    why = f"its disk is full ({free or 0:,} bytes free)" if full else str(error).splitlines()[0]
    return OSError(f"{directory} cannot be written to: {why}; the states saved before are still there")


def prepare_folder(directory: Path, entries: Mapping[str, Any], keep: int) -> None:
    """Make the folder of a run that begins with the state `entries`, and find out now whether all of it will fit.

    Raises OSError.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{directory} cannot be made: {error}; give another --output-dir") from error
    weights = sum(value.nbytes for value in entries["model"].values())
    models = 2 if entries["model_ema"] else 1
    # States with the two moments of Adam, one more while it is written, and the models of the last and the best epoch.
    needed, free = (keep + 1) * (models + 2) * weights + 2 * models * weights, shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            f"{directory} has {free / 1e6:,.0f} MB free, and the run may need {needed / 1e6:,.0f} MB for {keep} states "
            "and two models: make room, give another --output-dir, or a smaller --keep"
        )


def save_epoch(state: TrainState, directory: Path, description: Mapping[str, Any]) -> None:
    """Write the models and the log of the epoch just finished, each file whole or not at all.

    `last.safetensors` holds the epoch's weights, `best.safetensors` those of the first epoch with the highest accuracy;
    `log.txt` has a JSON object a line and epoch, under the published program's keys.
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
    """The rows of a log. Raises FileNotFoundError, or ValueError when it is no log or has no row."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no training log: {error}") from error
    if not rows:
        raise ValueError(f"{path} has no finished epoch")
    return rows


def write_config(config: TrainConfig, directory: Path, num_processes: int) -> None:
    """Write what the run was told, for `--config`; versions, git revision and processes stand on top as remarks."""
    about = versions() | {"git revision": _git_revision(), "processes": num_processes}
    remarks = "".join(f"# {name}: {value}\n" for name, value in about.items())
    with atomic_write(directory / CONFIG) as file:
        file.write_text(remarks + yaml.safe_dump(config.to_dict(), sort_keys=False))


def _git_revision() -> str:
    """The revision of the checkout that this package runs from; "none" for an installed one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"


def newest_state(directory: Path, remark: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest whole state in a folder; None when there is none at all.

    A damaged one is remarked on and the one before taken. Raises CheckpointError when all are damaged.
    """
    states = _states(directory)
    for path in states:
        try:
            entries = read_state(path)
        except CheckpointError as error:
            remark(f"warning: {error}; going on from the state before")
            continue
        remark(f"resuming from {path}")
        return entries
    if states:
        raise CheckpointError(f"no state in {directory} is whole; remove them to begin anew")
    return None


def read_state(path: Path) -> dict[str, Any]:
    """The entries of a state, checked against the checksums in it.

    Raises FileNotFoundError, or CheckpointError for a file that is damaged or no state.
    """
    if path.suffix == ".pth" and zipfile.is_zipfile(path):  # torch of 2020 did not write one
        try:
            with zipfile.ZipFile(path) as file:
                torn = file.testzip()
        except zipfile.BadZipFile as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        if torn:
            raise CheckpointError(f"{path} is damaged: its part {torn} does not match its checksum")
    entries = read_weight_file(path)
    if not isinstance(entries.get("model"), Mapping):
        raise CheckpointError(f"{path} is no training state: it has no entry 'model'; to begin from it, use --finetune")
    return entries
