"""Resuming a run: what it starts from, and which settings, images and classes it may have then.

Each setting that differs from the run's takes effect, or is refused. A state resumes without the file of initial
weights.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from localvit.checkpoints import HEADER
from localvit.data.images import DataError
from localvit.data.recorded_images import Record
from localvit.models.registry import find_model
from localvit.train.config import TrainConfig
from localvit.train.derived import keep_recorded
from localvit.train.run_folder import contains_run, newest_state, read_state, states
from localvit.utils.distributed import read_launch
from localvit.utils.weight_files import CheckpointError, read_weight_file

logger = logging.getLogger(__name__)

FIXED = (
    *("inat_category", "val_fraction", "model", "model_args", "localize", "finetune", "freeze", "opt", "seed"),
    "input_size",  # compared by the size that results, because None is the model's own
)
"""Settings that cannot change on resume, because they determined something that is in the checkpoint."""
_QUIET = ("workers", "output_dir", "device", "keep")
"""Settings whose change is not worth a message."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a run starts from."""

    run_id: str
    """Identifies the run; a run resumed in another folder becomes another run."""
    entries: Mapping[str, Any] | None = None
    """The entries of a training checkpoint; None for a new run."""
    source: Path
    """Folder of the checkpoint."""

    @property
    def header(self) -> Mapping[str, Any]:
        """What localvit wrote about the checkpoint; empty for a new run, or a checkpoint of the published program."""
        return (self.entries or {}).get(HEADER, {})

    @property
    def record(self) -> Record | None:
        """The images of the run, if they are known."""
        return self.header.get("images")

    @property
    def settings(self) -> Mapping[str, Any]:
        """The known settings of the run."""
        if self.header:
            return self.header["about"].get("config", {})
        published = getattr((self.entries or {}).get("args"), "opt", None)
        return {"opt": published} if isinstance(published, str) else {}


def find_start(config: TrainConfig, resume: str | None) -> Start:
    """What a run starts from; `resume` is as for `localvit.train.build`.

    Raises FileExistsError if the output folder contains another run, and FileNotFoundError or CheckpointError if the
    checkpoint cannot be used.
    """
    directory = config.output_dir
    if resume != "auto" and _is_restarted() and _contains_run_with(config):
        resume = "auto"
    if resume == "auto":
        entries = newest_state(directory)
        if entries is not None:
            return Start(run_id=_run_id(entries) or uuid4().hex, entries=entries, source=directory)
    elif resume is not None:
        return _start_from_file(Path(resume), directory)
    if contains_run(directory):
        raise _another_run(directory)
    if resume == "auto":
        logger.info(f"no checkpoint in {directory}: starting a new run")
    return Start(run_id=uuid4().hex, source=directory)


def _start_from_file(path: Path, directory: Path) -> Start:
    entries = read_state(path)
    if not contains_run(directory):
        return Start(run_id=uuid4().hex, entries=entries, source=path.parent)
    run_id = _run_id(entries)
    is_own = path.resolve().parent == directory.resolve()  # checkpoints had no id before
    if run_id is not None and states(directory):
        is_own = run_id == _run_id(newest_state(directory) or {})
    if not is_own:
        raise _another_run(directory)
    return Start(run_id=run_id or uuid4().hex, entries=entries, source=path.parent)


def _another_run(directory: Path) -> FileExistsError:
    if not states(directory):
        return FileExistsError(
            f"{directory} contains files of a run but no checkpoint to resume from: choose another --output-dir for a "
            "new run, or remove the folder"
        )
    return FileExistsError(
        f"{directory} contains another run: resume it with --resume auto, choose another --output-dir for a new run, "
        "or remove the folder"
    )


def _run_id(entries: Mapping[str, Any]) -> str | None:
    return entries.get(HEADER, {}).get("run_id")


def _is_restarted() -> bool:
    """Whether torchrun has started this process again, after one of its processes died."""
    launch, _ = read_launch()
    return launch is not None and launch.restarts > 0


def _contains_run_with(config: TrainConfig) -> bool:
    """Whether the output folder contains a run with these settings."""
    found = states(config.output_dir) and newest_state(config.output_dir)
    recorded = found[HEADER]["about"]["config"] if found and HEADER in found else None
    return recorded is not None and not _changes(keep_recorded(config, recorded), recorded, except_for=("finetune",))


def recorded_settings(path: Path) -> dict[str, Any]:
    """The settings in a training checkpoint; empty if it has none or cannot be read."""
    try:
        entries = read_weight_file(path, mmap=True)
        return dict(entries[HEADER]["about"]["config"])
    except (OSError, CheckpointError, KeyError, TypeError):
        return {}


def settings_on_resume(config: TrainConfig, start: Start) -> TrainConfig:
    """The settings of a resumed run. Logs those that differ from the run's; the others are refused.

    Raises CheckpointError for a setting that cannot change.
    """
    if start.entries is None:
        return config
    recorded = start.settings
    config = keep_recorded(config, recorded)
    if config.finetune is None or not start.header:  # the weights are in the checkpoint
        config = config.model_copy(update={"finetune": recorded.get("finetune")})
    for name, (now, before) in _changes(config, recorded).items():
        if name in FIXED and name != "input_size":
            raise _fixed(name, now, before)
        if name not in _QUIET:
            logger.warning(f"resuming with {name}={now!r}; the run started with {before!r}")
    return config


def _changes(
    config: TrainConfig, recorded: Mapping[str, Any], except_for: Sequence[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, with the present and the recorded value."""
    now = config.to_dict()
    return {
        name: (now[name], before)
        for name, before in recorded.items()
        if name in now
        and name not in except_for
        and now[name] != before
        and not (name == "model" and _published_name(now[name]) == _published_name(before))
    }


def _published_name(model: str) -> str:
    info = find_model(model)
    return info.name if info else model


def _fixed(name: str, now: object, before: object) -> CheckpointError:
    return CheckpointError(
        f"{name}={now!r} cannot take effect on resume, and the run started with {before!r}: resume without "
        f"--{name.replace('_', '-')}, or start a new run from the run's weights with --finetune"
    )


def check_input_size(size: tuple[int, int], start: Start) -> None:
    """Raise CheckpointError if the run had another image size, in pixels."""
    before = (start.header.get("preprocessing") or {}).get("input_size", size)
    if tuple(before) != tuple(size):
        raise _fixed("input_size", tuple(size), tuple(before))


def check_classes(class_names: Sequence[str] | None, start: Start) -> None:
    """Raise DataError if the run had other classes, or in another order."""
    before, now = start.header.get("class_names"), class_names
    if not start.header or before == (None if now is None else list(now)):
        return
    missing = sorted(set(before or ()) - set(now or ()))
    added = sorted(set(now or ()) - set(before or ()))
    changes = [
        f"{word} {', '.join(map(repr, names[:5]))}" for word, names in (("no", missing), ("new", added)) if names
    ]
    raise DataError(
        f"the classes have changed since the run started ({'; '.join(changes) or 'their order'}): restore the class "
        "folders to resume the run, or start a new run from its weights with --finetune"
    )
