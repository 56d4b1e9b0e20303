"""The files in a run's output folder, and finding the checkpoint to resume from.

`checkpoint.pth` is the newest training checkpoint, `checkpoint.1.pth` the one before, and so on. `last.safetensors` and
`best.safetensors` are the models after the last and the best epoch. `log.txt` has one line per epoch. `config.yaml`
contains the settings.
"""

import errno
import itertools
import json
import logging
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import safetensors
import torch

from localvit.checkpoints import HEADER, save_checkpoint, versions
from localvit.train.config import TrainConfig
from localvit.train.state import Row, TrainState, may_be_best
from localvit.utils.files import atomic_write
from localvit.utils.weight_files import CheckpointError, read_header, read_weight_file

logger = logging.getLogger(__name__)

STATE = "checkpoint.pth"
_UNPLACED = "checkpoint.new.pth"  # complete, but not yet renamed; remains if the run is killed at that moment
LAST = "last.safetensors"
BEST = "best.safetensors"
LOG = "log.txt"
CONFIG = "config.yaml"
_COUNT = "states"
"""Entry of a training checkpoint: how many of the newest checkpoints `save_state` has kept, with this one."""


def save_state(entries: Mapping[str, Any], directory: Path, keep: int) -> None:
    """Save `entries` as the newest checkpoint, and keep the newest `keep`. Other files are never replaced or removed.

    Raises OSError with the cause; the earlier checkpoints are then unchanged.
    """
    unplaced = directory / _UNPLACED
    own = _count_states(directory)
    taken = (number for number in range(own, keep) if (directory / _name(number)).exists())
    count = min(own + 1, next(taken, keep))
    try:
        with atomic_write(unplaced) as unfinished:
            torch.save({**entries, _COUNT: count}, unfinished)
        for number in reversed(range(count - 1)):
            if (directory / _name(number)).exists():
                (directory / _name(number)).replace(directory / _name(number + 1))
        unplaced.replace(directory / STATE)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError if the disk is full
        raise _unwritable(directory, error) from error
    for number in range(count, own):
        (directory / _name(number)).unlink(missing_ok=True)


def _name(number: int) -> str:
    return f"checkpoint.{number}.pth" if number else STATE


def _count_states(directory: Path) -> int:
    """Number of checkpoints that `save_state` has written and kept; a person may have copied one beside them."""
    newest = directory / STATE
    if not newest.exists() and _numbered_states(directory):
        newest = directory / _UNPLACED  # killed just before it was renamed
    try:
        return int(read_weight_file(newest, mmap=True)[_COUNT])
    except (OSError, CheckpointError, KeyError):  # none, damaged, or from before this number was saved
        return 0 if not (states := _numbered_states(directory)) else states[-1] + 1


def _numbered_states(directory: Path) -> list[int]:
    """The numbers of the checkpoints, without a gap. The first may be missing if the run was killed just then."""
    numbers = itertools.takewhile(lambda number: (directory / _name(number)).exists(), itertools.count(1))
    return ([0] if (directory / STATE).exists() else []) + list(numbers)


def states(directory: Path) -> list[Path]:
    """The training checkpoints in a folder, newest first."""
    unplaced = [directory / _UNPLACED] if (directory / _UNPLACED).exists() else []
    return unplaced + [directory / _name(number) for number in _numbered_states(directory)]


def contains_run(directory: Path) -> bool:
    """Whether a folder has files of a run that another run would replace."""
    return bool(states(directory)) or any((directory / name).exists() for name in (LAST, BEST, LOG))


def remove_run(directory: Path) -> None:
    """Remove the checkpoints, models and log of the run in a folder."""
    for path in (*states(directory), *(directory / name for name in (LAST, BEST, LOG))):
        path.unlink(missing_ok=True)


def _unwritable(directory: Path, error: Exception) -> OSError:
    free = shutil.disk_usage(directory).free if directory.exists() else None
    full = getattr(error, "errno", None) == errno.ENOSPC or (free is not None and free < 1 << 20)
    why = f"its disk is full ({free or 0:,} bytes free)" if full else str(error).splitlines()[0]
    return OSError(f"cannot write to {directory}: {why}; the checkpoints saved before are unchanged")


def prepare_folder(directory: Path, entries: Mapping[str, Any], keep: int) -> None:
    """Create the folder of a run, and check it as `check_folder` does. Raises OSError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot create {directory}: {error}; choose another --output-dir") from error
    check_folder(directory, entries, keep)


def check_folder(directory: Path, entries: Mapping[str, Any], keep: int) -> None:
    """Check that the folder of a run can be created and written, and that its files will fit on the disk.

    Args:
        directory: the output folder, which need not exist.
        entries: the checkpoint entries at the start of the run, for their size.
        keep: number of checkpoints to keep.

    Raises OSError. Leaves nothing behind.
    """
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        action = "cannot write to" if existing == directory else "cannot create"
        raise OSError(f"{action} {directory}: {error.strerror}: {existing}; choose another --output-dir") from error
    weights = sum(value.nbytes for value in entries["model"].values())
    models = 2 if entries["model_ema"] else 1
    # Checkpoints with the two moments of Adam, one more during writing, and the models of the last and the best epoch.
    needed = (keep + 1) * (models + 2) * weights + 2 * models * weights
    free = shutil.disk_usage(existing).free
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
    row, held = state.rows[-1], saved_epoch(directory / BEST)
    # The best epoch may be from before a resume into a new folder, and its weights lost.
    is_best = may_be_best(row) and (
        state.best is row or not _is_one_of(held, state.rows) or row["test_acc1"] > held["test_acc1"]
    )
    if is_best and state.best is not None and state.best is not row and held and not _is_one_of(held, state.rows):
        _warn_of_lost_best(state.best, directory)  # replaced by a later epoch, before which the run was resumed
    try:
        for name in (LAST, BEST) if is_best else (LAST,):
            save_model(state, directory / name, description)
        write_log(state, directory)
    except (OSError, RuntimeError) as error:
        raise _unwritable(directory, error) from error


def save_model(state: TrainState, path: Path, description: Mapping[str, Any]) -> None:
    """Write the model, which has the weights after the last finished epoch."""
    row = state.rows[-1]
    count = {name: value for name, value in state.metrics[-1].items() if name == "test_images"}
    save_checkpoint(
        state.model,
        path,
        ema=state.ema.module.state_dict() if state.ema else None,
        class_names=description["class_names"],
        preprocessing=description["preprocessing"],
        about={"epoch": row["epoch"], "metrics": row, **count, **description["about"]},
    )


def complete_folder(
    state: TrainState, directory: Path, description: Mapping[str, Any], source: Path, *, is_over: bool
) -> None:
    """Write the models and the log of a resumed run, as far as its folder does not contain them.

    Args:
        state: the resumed state.
        directory: the folder of the run.
        description: as for `save_epoch`.
        source: folder of the checkpoint that was resumed.
        is_over: whether no epoch will be trained.

    Raises CheckpointError if the run is over, and the weights or the accuracy of its last epoch are in no file.
    """
    if is_over and not state.rows:
        raise CheckpointError(
            f"no epoch is left to train, and the checkpoint does not contain the accuracy of its {state.epoch} epochs: "
            f"resume with --epochs {state.epoch + 1} or more, or evaluate its weights with localvit eval --checkpoint"
        )
    if state.best is None:
        return
    last = state.rows[-1]
    for name, row in ((LAST, last), (BEST, state.best)):
        held = saved_epoch(directory / name)
        if _is_one_of(held, [row]) or (held and held["epoch"] > last["epoch"] and not is_over):
            continue  # a later epoch whose end was interrupted will be repeated
        if row is last and state.step == 0:
            save_model(state, directory / name, description)
        elif _is_one_of(saved_epoch(source / name), [row]):
            _copy(source / name, directory / name)
        elif name == BEST:
            _warn_of_lost_best(row, source)
            if may_be_best(last) and _is_one_of(saved_epoch(directory / LAST), [last]):
                _copy(directory / LAST, directory / BEST)
        elif is_over:
            raise CheckpointError(
                f"no epoch is left to train, and the weights after epoch {last['epoch'] + 1:.0f} are not in {source}: "
                f"the checkpoint is from a later step; resume with --epochs {state.epoch + 1} or more"
            )
    write_log(state, directory)


def _copy(source: Path, target: Path) -> None:
    with atomic_write(target) as file:
        shutil.copyfile(source, file)


def _warn_of_lost_best(row: Row, directory: Path) -> None:
    logger.warning(
        f"the weights of the best epoch, {row['epoch'] + 1:.0f}, are not in {directory}: {BEST} will be the best of "
        "the others"
    )


def saved_epoch(path: Path) -> Row | None:
    """The row of the epoch whose weights a model file of a run contains; None if there is no such file."""
    try:
        return (read_header(path, HEADER) or {})["about"]["metrics"] if path.exists() else None
    except (safetensors.SafetensorError, CheckpointError, KeyError):
        return None


def _is_one_of(row: Row | None, rows: Sequence[Row]) -> TypeGuard[Row]:
    # As text, because losses may be NaN, which is not equal to itself.
    keys = ("epoch", "test_acc1", "test_loss", "train_loss")
    return row is not None and any(all(str(row.get(key)) == str(each.get(key)) for key in keys) for each in rows)


def write_log(state: TrainState, directory: Path) -> None:
    """Write the log of the finished epochs."""
    with atomic_write(directory / LOG) as log:
        log.write_text("".join(json.dumps(each) + "\n" for each in state.rows))


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
    found = states(directory)
    for path in found:
        try:
            entries = read_state(path)
        except CheckpointError as error:
            logger.warning(f"{error}; trying the checkpoint before")
            continue
        logger.info(f"resuming from {path}")
        return entries
    if found:
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
