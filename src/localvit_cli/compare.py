"""`localvit compare`: training runs side by side."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from localvit_cli import UsageError

if TYPE_CHECKING:
    from localvit.train.compare import Group, Run, Spread

_HEADINGS = ("run", "state", "epochs", "best Acc@1", "epoch", "last Acc@1", "loss", "time", "images/s", "parameters")
_RESULTS_ON_THE_RIGHT = range(2, len(_HEADINGS))
_GROUP_HEADINGS = ("runs alike but for the seed", "n", "best Acc@1", "last Acc@1", "loss")


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Put training runs side by side: results, the settings in which they differ, and means over seeds."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
    """Folders of runs (--output-dir of each). Of runs that differ in the seed alone, mean and spread are told too."""
    json: bool = False
    """JSON instead of tables."""
    plot: Path | None = None
    """Image of accuracy and training loss to draw: PNG, SVG or PDF by its ending."""

    def run(self) -> None:
        """Print the comparison, and draw it if asked."""
        if not self.runs:
            raise UsageError("no run is named; give the folders of one or more, such as runs/*/")
        from localvit.train.compare import groups, read_runs

        runs = read_runs(self.runs)
        if self.plot:
            _draw(runs, self.plot)
        print(_as_json(runs, groups(runs)) if self.json else _as_text(runs, groups(runs)), flush=True)


def _draw(runs: "list[Run]", image: Path) -> None:
    from localvit.train.compare import alike, shared_name
    from localvit.train.curves import FORMATS, draw_comparison
    from localvit_cli.console import say

    if image.suffix.lower() not in FORMATS:
        raise UsageError(f"--plot {image} must end in {', '.join(FORMATS)}")
    lots = alike([run for run in runs if run.rows])
    draw_comparison({shared_name(lot, runs): [run.rows for run in lot] for lot in lots}, image)
    say(f"plot: {image}")


def _as_json(runs: "list[Run]", groups: "list[Group]") -> str:
    from localvit.train.compare import differing_settings

    differing = differing_settings(runs)
    facts = {
        "runs": [
            {
                "name": run.name,
                "path": str(run.path),
                "state": run.state,
                "epochs": len(run.rows),
                "epochs_to_train": run.settings["epochs"] if run.settings else None,
                **(asdict(run.numbers) if run.numbers else {}),
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
    # Losses of a run that went wrong may be NaN, which JSON does not have.
    return json.dumps(json.loads(json.dumps(facts, default=str), parse_constant=lambda constant: None), indent=2)


def _as_text(runs: "list[Run]", groups: "list[Group]") -> str:
    from localvit.train.compare import differing_settings
    from localvit.utils.tables import format_table

    parts = [format_table([*map(_result, runs)], headings=_HEADINGS, right=_RESULTS_ON_THE_RIGHT)]
    if differing := differing_settings(runs):
        parts.append(format_table([_settings(run, differing) for run in runs], headings=("run", *differing)))
    if groups:
        parts.append(
            format_table([*map(_group, groups)], headings=_GROUP_HEADINGS, right=range(1, len(_GROUP_HEADINGS)))
        )
    left_out = [f"{name} ({why})" for group in groups for name, why in group.left_out.items()]
    notes = (
        "Acc@1 is in percent; epochs count from 0, as in log.txt.",
        "The loss is the last epoch's on the validation images, in nats.",
        "Time (h:mm:ss) is that of the training steps, without evaluation.",
        "?: the folder has no config.yaml that would say." if any(run.settings is None for run in runs) else "",
        "Means are told with the sample standard deviation over n runs." if groups else "",
        f"Not in the means: {', '.join(left_out)}." if left_out else "",
    )
    return "\n\n".join([*parts, "\n".join(filter(None, notes))])


def _result(run: "Run") -> tuple[str, ...]:
    from datetime import timedelta

    numbers = run.numbers
    epochs = f"{len(run.rows)}/{run.settings['epochs'] if run.settings else '?'}"
    if numbers is None:
        return (run.name, run.state, epochs, *["-"] * 7)
    return (
        run.name,
        run.state,
        epochs,
        f"{numbers.best['test_acc1']:.3f}",
        f"{numbers.best['epoch']:.0f}",
        f"{numbers.last['test_acc1']:.3f}",
        f"{numbers.last['test_loss']:.4f}",
        "-" if numbers.seconds is None else str(timedelta(seconds=round(numbers.seconds))),
        "-" if numbers.images_per_second is None else f"{numbers.images_per_second:,.1f}",
        f"{numbers.last['n_parameters']:,.0f}",
    )


def _settings(run: "Run", names: Sequence[str]) -> tuple[str, ...]:
    from localvit.train.summary import setting_text

    told = run.settings
    if told is None:
        return (run.name, *["?"] * len(names))
    return (run.name, *(setting_text(told[name]) if name in told else "-" for name in names))


def _group(group: "Group") -> tuple[str, ...]:
    def text(spread: "Spread", digits: int) -> str:
        return f"{spread.mean:.{digits}f} ± {spread.std:.{digits}f}"

    spreads = (text(group.best_acc1, 3), text(group.last_acc1, 3), text(group.last_loss, 4))
    return (group.name, str(len(group.runs)), *spreads)
