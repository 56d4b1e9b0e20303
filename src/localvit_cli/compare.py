"""`localvit compare`: compare training runs."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import tyro

from localvit.train.compare import (
    Group,
    MeanStd,
    Run,
    differing_settings,
    group_by_settings,
    groups,
    read_runs,
    shared_name,
)
from localvit.train.state import Row
from localvit.train.summary import setting_text
from localvit.utils.files import check_writable
from localvit.utils.intervals import accuracy_interval, interval_text
from localvit.utils.tables import format_table
from localvit_cli import UsageError
from localvit_cli.streams import printable_lines
from localvit_cli.tyro_rules import optional

logger = logging.getLogger(__name__)

_HEADINGS = ("run", "state", "epochs", "best Acc@1", "epoch", "last Acc@1", "loss", "time", "images/s", "parameters")
_INTERVAL = 6
"""Where the column of intervals is, if any run has one."""
_GROUP_HEADINGS = ("runs with the same settings", "n", "best Acc@1", "last Acc@1", "loss")


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare training runs: results, differing settings, and means over seeds."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
    """Folders of runs (their --output-dir). Runs that differ only in their seed are also averaged."""
    json: bool = False
    """Print JSON instead of tables."""
    plot: Annotated[Path | None, optional("FILE")] = None
    """Plot accuracy and training loss to this file, as PNG, SVG or PDF depending on its suffix."""

    def run(self) -> None:
        """Print the comparison, and plot it if requested."""
        if not self.runs:
            raise UsageError("no run given; give the folders of one or more runs, such as runs/*/")
        runs = read_runs(self.runs)
        draw = _drawing_function(runs, self.plot) if self.plot else None
        try:
            text = _as_json(runs, groups(runs)) if self.json else printable_lines(_as_text(runs, groups(runs)))
            print(text, flush=True)
        finally:  # the plot is drawn even if nobody reads the tables
            if draw:
                draw()
                logger.info(f"plot: {self.plot}")


def _drawing_function(runs: list[Run], image: Path) -> Callable[[], Path]:
    """What draws the plot. Raises the errors that can be known before."""
    from localvit.train.curves import FORMATS, check_number_of_lines, draw_comparison  # needs matplotlib, an extra

    if image.suffix.lower() not in FORMATS:
        raise UsageError(f"--plot {image} must end in {', '.join(FORMATS)}")
    grouped = group_by_settings([run for run in runs if run.rows])
    check_number_of_lines(len(grouped))
    check_writable(image)
    return lambda: draw_comparison({shared_name(same, runs): [run.rows for run in same] for same in grouped}, image)


def _as_json(runs: list[Run], groups: list[Group]) -> str:
    differing = differing_settings(runs)
    facts = {
        "runs": [
            {
                "name": run.name,
                "path": str(run.path),
                "state": run.state,
                "epochs": len(run.rows),
                "epochs_to_train": run.settings["epochs"] if run.settings else None,
                **_result_facts(run),
                "settings": {name: run.settings[name] for name in differing if name in run.settings}
                if run.settings
                else None,
            }
            for run in runs
        ],
        "groups": [
            {
                "name": group.name,
                "runs": [run.name for run in group.runs],
                "n": len(group.runs),
                "left_out": group.left_out,
                "best_acc1": asdict(group.best_acc1),
                "last_acc1": asdict(group.last_acc1),
                "last_loss": asdict(group.last_loss),
            }
            for group in groups
        ],
    }
    # JSON has no NaN, which losses of a failed run may be.
    return json.dumps(json.loads(json.dumps(facts, default=str), parse_constant=lambda constant: None), indent=2)


def _result_facts(run: Run) -> dict[str, object]:
    if run.result is None:
        return {}
    facts = asdict(run.result)
    del facts["num_epochs"]  # is already there as "epochs"
    for name in ("best", "last"):
        if count := facts[name].get("test_images"):
            facts[name]["test_acc1_interval"] = accuracy_interval(facts[name]["test_acc1"], int(count))
    return facts


def _as_text(runs: list[Run], groups: list[Group]) -> str:
    parts = [_results(runs)]
    if differing := differing_settings(runs):
        parts.append(format_table([_settings(run, differing) for run in runs], headings=("run", *differing)))
    if groups:
        right = range(1, len(_GROUP_HEADINGS))
        parts.append(format_table([*map(_group, groups)], headings=_GROUP_HEADINGS, right=right))
    left_out = [f"{name} ({why})" for group in groups for name, why in group.left_out.items()]
    notes = (
        "Acc@1 is in percent. Epochs count from 1 here, and from 0 in log.txt.",
        "The loss is the validation loss after the last epoch, in nats.",
        "The 95 % interval is that of the last Acc@1, from its number of validation images alone (Wilson)."
        if any(map(_interval, runs))
        else "",
        "Time (h:mm:ss) is the duration of the training steps, without evaluation.",
        "?: unknown, because the folder has no config.yaml." if any(run.settings is None for run in runs) else "",
        "Means are over n runs, with their sample standard deviation." if groups else "",
        f"Not included in the means: {', '.join(left_out)}." if left_out else "",
    )
    return "\n\n".join([*parts, "\n".join(filter(None, notes))])


def _results(runs: list[Run]) -> str:
    rows, headings = [list(_result(run)) for run in runs], list(_HEADINGS)
    if any(map(_interval, runs)):
        for line, cell in zip([headings, *rows], ["95 % interval", *map(_interval, runs)], strict=True):
            line.insert(_INTERVAL, cell or "-")
    return format_table(rows, headings=headings, right=range(2, len(headings)))


def _result(run: Run) -> tuple[str, ...]:
    result = run.result
    epochs = f"{len(run.rows)}/{run.settings['epochs'] if run.settings else '?'}"
    if result is None:
        return (run.name, run.state, epochs, *["-"] * 7)
    return (
        run.name,
        run.state,
        epochs,
        f"{result.best['test_acc1']:.3f}",
        f"{result.best['epoch'] + 1:.0f}",
        f"{result.last['test_acc1']:.3f}",
        f"{result.last['test_loss']:.4f}",
        "-" if result.seconds is None else str(timedelta(seconds=round(result.seconds))),
        "-" if result.images_per_second is None else f"{result.images_per_second:,.1f}",
        f"{result.last['n_parameters']:,.0f}",
    )


def _interval(run: Run) -> str:
    """The 95 % interval of the last accuracy; empty if the number of images is not known."""
    last: Row = run.result.last if run.result else {}
    return interval_text(last["test_acc1"], int(last["test_images"])) if "test_images" in last else ""


def _settings(run: Run, names: Sequence[str]) -> tuple[str, ...]:
    settings = run.settings
    if settings is None:
        return (run.name, *["?"] * len(names))
    return (run.name, *(setting_text(settings[name]) if name in settings else "-" for name in names))


def _group(group: Group) -> tuple[str, ...]:
    def text(value: MeanStd, digits: int) -> str:
        return f"{value.mean:.{digits}f} ± {value.std:.{digits}f}"

    values = (text(group.best_acc1, 3), text(group.last_acc1, 3), text(group.last_loss, 4))
    return (group.name, str(len(group.runs)), *values)
