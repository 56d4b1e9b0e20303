"""Runs side by side: what each came to, the settings in which they differ, and means over those of other seeds."""

import csv
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from localvit.train.run_folder import CONFIG, LOG, read_log
from localvit.train.settings import read_settings
from localvit.train.state import Row
from localvit.train.summary import RunNumbers
from localvit.train.trackers import METRICS

_NEEDED = ("epoch", "train_loss", "test_loss", "test_acc1", "n_parameters")
_NO_RESULT = ("output_dir", "workers", "checkpoint_steps", "keep", "tensorboard", "wandb")
"""Settings that change no number of the log."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the folder of a run tells."""

    name: str
    """What sets its path apart from those of the others."""
    path: Path
    """Its folder."""
    rows: list[Row]
    """The rows of its log, with those of metrics.csv where it has them."""
    settings: dict[str, Any] | None
    """What it was told, `model_args.NAME` for each of the model's arguments; None without config.yaml."""

    @property
    def numbers(self) -> RunNumbers | None:
        """Its finished epochs in short; None while there is none."""
        return RunNumbers.of(self.rows) if self.rows else None

    @property
    def state(self) -> str:
        """done, stopped early, unfinished, no epoch yet, or "?" where the number of epochs to train is not known."""
        if not self.rows:
            return "no epoch yet"
        if self.settings is None:
            return "?"
        if len(self.rows) >= self.settings["epochs"]:
            return "done"
        patience = self.settings.get("early_stopping")
        since_best = self.rows[-1]["epoch"] - RunNumbers.of(self.rows).best["epoch"]
        return "stopped early" if patience and since_best >= patience else "unfinished"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A number over several runs."""

    mean: float
    std: float
    """Sample standard deviation, with n - 1 in the denominator."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least two values; NaN where one of them is not finite."""
        return cls(mean=fmean(values), std=stdev(values) if all(map(math.isfinite, values)) else math.nan)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Finished runs that differ in nothing but their seed."""

    name: str
    """What the names of its runs share, or all of them."""
    runs: list[Run]
    """At least two, each of another seed."""
    left_out: dict[str, str]
    """Names of runs of the same settings that are not in the means, and why."""
    best_acc1: Spread
    """Of the accuracy of each one's best epoch, in percent."""
    last_acc1: Spread
    """Of the accuracy after the last epoch, in percent."""
    last_loss: Spread
    """Of the validation loss after the last epoch, in nats."""


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """What the folders of runs tell, in their order; a folder without a log is a run without an epoch.

    Raises:
        FileNotFoundError: for a folder that is not there.
        ValueError: for a file in the place of a folder, a folder of runs, a folder named twice, or a log, metrics.csv
            or config.yaml that is none.
    """
    for directory in directories:
        if not directory.exists():
            raise FileNotFoundError(f"{directory}: no such folder")
        if not directory.is_dir():
            raise ValueError(f"{directory} is a file; name the folder of the run")
        if not (directory / LOG).exists() and any(directory.glob(f"*/{LOG}")):
            raise ValueError(f"{directory} is a folder of runs; name the runs in it, such as {directory}/*/")
    resolved = [directory.resolve() for directory in directories]
    for directory, path in zip(directories, resolved, strict=True):
        if resolved.count(path) > 1:
            raise ValueError(f"{directory} is named twice")
    shared = os.path.commonpath([path.parent for path in resolved]) if resolved else ""
    return [
        Run(
            name=path.relative_to(shared).as_posix(),
            path=directory,
            rows=_read_rows(directory),
            settings=_read_settings(directory / CONFIG),
        )
        for directory, path in zip(directories, resolved, strict=True)
    ]


def _read_rows(directory: Path) -> list[Row]:
    log, metrics = directory / LOG, directory / METRICS
    if not log.exists() or not log.stat().st_size:
        return []
    rows = read_log(log)
    for number, row in enumerate(rows, 1):
        if missing := [key for key in _NEEDED if not isinstance(row, dict) or key not in row]:
            raise ValueError(f"{log} is no training log: line {number} has no {', '.join(missing)}")
    if not metrics.exists():
        return rows
    try:
        with metrics.open(encoding="utf-8", newline="") as file:
            measured = {
                float(line["epoch"]): {key: float(text) for key, text in line.items() if text}
                for line in csv.DictReader(file, strict=True)
            }
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{metrics} does not hold a run's numbers: {error or type(error).__name__}") from error
    return [measured.get(row["epoch"], {}) | row for row in rows]


def _read_settings(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    settings = read_settings(path)
    if not isinstance(settings.get("epochs"), int):
        raise ValueError(f"{path} is no run's: it does not say epochs")
    named = {each: settings.pop(each, None) for each in ("model_args", "localize")}
    if named["localize"] is not None:
        settings["localize"] = True
    apart = [(f"{each}.{name}", value) for each in named for name, value in (named[each] or {}).items()]
    return settings | dict(apart)


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Names of the settings, but for the folder, that are not the same in all runs that tell theirs."""
    told = [run.settings for run in runs if run.settings is not None]
    names = dict.fromkeys(name for settings in told for name in settings if name != "output_dir")
    return [name for name in names if len({_text(settings.get(name)) for settings in told}) > 1]


def alike(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs in lots, in order: in one lot those whose settings differ in the seed, if in anything that matters."""
    lots: dict[str, list[Run]] = {}
    for run in runs:
        settings = run.settings
        key = (
            f"alone: {run.name}"  # nobody knows what it was told
            if settings is None
            else _text({name: value for name, value in settings.items() if name not in (*_NO_RESULT, "seed")})
        )
        lots.setdefault(key, []).append(run)
    return list(lots.values())


def groups(runs: Sequence[Run]) -> list[Group]:
    """Means and spreads over the seeds, for each lot of alike runs of which two or more are finished."""
    found = []
    for lot in alike(runs):
        kept: dict[Any, Run] = {}
        left_out = {}
        for run in lot:
            seed = run.settings.get("seed") if run.settings else None
            if run.state not in ("done", "stopped early"):
                left_out[run.name] = run.state
            elif seed in kept:
                left_out[run.name] = f"seed {seed} again"
            else:
                kept[seed] = run
        numbers = [run.numbers for run in kept.values() if run.numbers]
        if len(numbers) > 1:
            found.append(
                Group(
                    name=shared_name(list(kept.values()), runs),
                    runs=list(kept.values()),
                    left_out=left_out,
                    best_acc1=Spread.of([each.best["test_acc1"] for each in numbers]),
                    last_acc1=Spread.of([each.last["test_acc1"] for each in numbers]),
                    last_loss=Spread.of([each.last["test_loss"] for each in numbers]),
                )
            )
    return found


def shared_name(lot: Sequence[Run], runs: Sequence[Run]) -> str:
    """One name for a lot of `runs`: what theirs begin with, where no other run's does, or all of them."""
    if len(lot) == 1:
        return lot[0].name
    names = [run.name for run in lot]
    prefix = os.path.commonprefix(names)  # noqa: RUF071 (by character, for `arm-s0` and `arm-s1`)
    beginning_so = [run for run in runs if run.name.startswith(prefix)]
    return f"{prefix}*" if prefix and len(beginning_so) == len(lot) else ", ".join(names)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
