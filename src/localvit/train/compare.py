"""Comparing runs: results, settings that differ, and means over runs that differ only in their seed."""

import csv
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from localvit.train.recipe import read_settings
from localvit.train.run_folder import CONFIG, LOG, read_log
from localvit.train.state import Row
from localvit.train.summary import RunResult
from localvit.train.trackers import METRICS

_REQUIRED_KEYS = ("epoch", "train_loss", "test_loss", "test_acc1", "n_parameters")
_WITHOUT_EFFECT = ("output_dir", "workers", "checkpoint_steps", "keep", "tensorboard", "wandb")
"""Settings that do not affect the numbers in the log."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, read from its folder."""

    name: str
    """The part of its path that differs from those of the other runs."""
    path: Path
    """Its folder."""
    rows: list[Row]
    """The rows of its log, merged with those of metrics.csv if it exists."""
    settings: dict[str, Any] | None
    """Its settings, with `model_args.NAME` for each argument of the model; None without config.yaml."""

    @property
    def result(self) -> RunResult | None:
        """The result of the finished epochs; None if there is no finished epoch."""
        return RunResult.of(self.rows) if self.rows else None

    @property
    def state(self) -> str:
        """done, stopped early, unfinished, no epoch yet, or "?" without the number of epochs to train."""
        if not self.rows:
            return "no epoch yet"
        if self.settings is None:
            return "?"
        if len(self.rows) >= self.settings["epochs"]:
            return "done"
        patience = self.settings.get("early_stopping")
        since_best = self.rows[-1]["epoch"] - RunResult.of(self.rows).best["epoch"]
        return "stopped early" if patience and since_best >= patience else "unfinished"


@dataclass(frozen=True, kw_only=True)
class MeanStd:
    """Mean and standard deviation of a number over several runs."""

    mean: float
    std: float
    """Sample standard deviation, with n - 1 in the denominator."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "MeanStd":
        """Of at least two values; NaN if one of them is not finite."""
        return cls(mean=fmean(values), std=stdev(values) if all(map(math.isfinite, values)) else math.nan)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Finished runs that differ only in their seed."""

    name: str
    """The common prefix of the names of its runs, or all their names."""
    runs: list[Run]
    """At least two runs with different seeds."""
    left_out: dict[str, str]
    """Names of runs with the same settings that are not included in the means, with the reason."""
    best_acc1: MeanStd
    """Acc@1 of the best epoch, in percent."""
    last_acc1: MeanStd
    """Acc@1 after the last epoch, in percent."""
    last_loss: MeanStd
    """Validation loss after the last epoch, in nats."""


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """Read the runs in these folders, in order. A folder without a log is a run without a finished epoch.

    Raises:
        FileNotFoundError: if a folder does not exist.
        ValueError: for a path to a file, a folder that contains runs, a folder given twice, or a log, metrics.csv or
            config.yaml that cannot be read.
    """
    for directory in directories:
        if not directory.exists():
            raise FileNotFoundError(f"{directory}: no such folder")
        if not directory.is_dir():
            raise ValueError(f"{directory} is a file; give the folder of the run")
        if not (directory / LOG).exists() and any(directory.glob(f"*/{LOG}")):
            raise ValueError(f"{directory} is a folder of runs; give the runs in it, such as {directory}/*/")
    resolved = [directory.resolve() for directory in directories]
    for directory, path in zip(directories, resolved, strict=True):
        if resolved.count(path) > 1:
            raise ValueError(f"{directory} is given twice")
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
        if missing := [key for key in _REQUIRED_KEYS if not isinstance(row, dict) or key not in row]:
            raise ValueError(f"{log} is not a training log: line {number} has no {', '.join(missing)}")
    if not metrics.exists():
        return rows
    try:
        with metrics.open(encoding="utf-8", newline="") as file:
            measured = {
                float(line["epoch"]): {key: float(text) for key, text in line.items() if text}
                for line in csv.DictReader(file, strict=True)
            }
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{metrics} does not contain the numbers of a run: {error or type(error).__name__}") from error
    return [measured.get(row["epoch"], {}) | row for row in rows]


def _read_settings(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    settings = read_settings(path)
    if not isinstance(settings.get("epochs"), int):
        raise ValueError(f"{path} is not the config of a run: it has no number of epochs")
    named = {each: settings.pop(each, None) for each in ("model_args", "localize")}
    if named["localize"] is not None:
        settings["localize"] = True
    apart = [(f"{each}.{name}", value) for each in named for name, value in (named[each] or {}).items()]
    return settings | dict(apart)


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Names of the settings, except the folder, that are not the same in all runs with a config.yaml."""
    known = [run.settings for run in runs if run.settings is not None]
    names = dict.fromkeys(name for settings in known for name in settings if name != "output_dir")
    return [name for name in names if len({_text(settings.get(name)) for settings in known}) > 1]


def group_by_settings(runs: Sequence[Run]) -> list[list[Run]]:
    """Group runs whose settings differ at most in the seed and in settings without effect on the numbers."""
    same: dict[str, list[Run]] = {}
    for run in runs:
        settings = run.settings
        key = (
            f"unknown settings: {run.name}"
            if settings is None
            else _text({name: value for name, value in settings.items() if name not in (*_WITHOUT_EFFECT, "seed")})
        )
        same.setdefault(key, []).append(run)
    return list(same.values())


def groups(runs: Sequence[Run]) -> list[Group]:
    """Means over the seeds, for each set of runs with the same settings, if at least two of them are finished."""
    found = []
    for same in group_by_settings(runs):
        kept: dict[Any, Run] = {}
        left_out = {}
        for run in same:
            seed = run.settings.get("seed") if run.settings else None
            if run.state not in ("done", "stopped early"):
                left_out[run.name] = run.state
            elif seed in kept:
                left_out[run.name] = f"seed {seed} is repeated"
            else:
                kept[seed] = run
        results = [run.result for run in kept.values() if run.result]
        if len(results) > 1:
            found.append(
                Group(
                    name=shared_name(list(kept.values()), runs),
                    runs=list(kept.values()),
                    left_out=left_out,
                    best_acc1=MeanStd.of([each.best["test_acc1"] for each in results]),
                    last_acc1=MeanStd.of([each.last["test_acc1"] for each in results]),
                    last_loss=MeanStd.of([each.last["test_loss"] for each in results]),
                )
            )
    return found


def shared_name(same: Sequence[Run], runs: Sequence[Run]) -> str:
    """A name for some of the `runs`: their common prefix if no other run has it, otherwise all their names."""
    if len(same) == 1:
        return same[0].name
    names = [run.name for run in same]
    prefix = os.path.commonprefix(names)  # noqa: RUF071 (by character, for `arm-s0` and `arm-s1`)
    with_prefix = [run for run in runs if run.name.startswith(prefix)]
    return f"{prefix}*" if prefix and len(with_prefix) == len(same) else ", ".join(names)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
