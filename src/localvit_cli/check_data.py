"""`localvit check-data`: what would hurt in a folder of images, before training on it."""

import io
import json
import os
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from localvit_cli import UsageError
from localvit_cli.prediction_formats import printable

if TYPE_CHECKING:
    from localvit.dataset_check.findings import Finding
    from localvit.dataset_check.report import CheckReport

_EXAMPLES = 5
_CLASSES = 20
_WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class CheckData:
    """Find what would hurt in a folder of images before training on it. With errors found, the exit status is 1."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder with train/ and val/ (and test/, if there is one), or with a folder for each class."""
    json: bool = False
    """JSON with every place of every finding, instead of tables with the first few."""
    workers: int | None = None
    """Processes that decode images; by default one for each CPU core, and 0 decodes in the main one."""

    def run(self) -> int:
        """Check, and print the report."""
        from localvit.dataset_check.report import check_folder
        from localvit_cli.console import progress, say

        if self.workers is not None and self.workers < 0:
            raise UsageError(f"--workers {self.workers} must not be negative")
        workers = _cores() if self.workers is None else self.workers
        say(f"looking through {self.folder}")
        report = check_folder(self.folder, workers=workers, progress=progress)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        print(json.dumps(report.to_dict(), indent=2) if self.json else _tables(report), flush=True)
        return 1 if report.number("error") else 0


def _cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _tables(report: "CheckReport") -> str:
    """The report for a person."""
    from localvit.utils.tables import format_table

    parts = []
    if report.counts:
        parts += [_classes(report), _sizes(report)]
    if report.findings:
        rows = [
            (finding.severity, f"{len(finding.places):,}", finding.name, finding.title) for finding in report.findings
        ]
        parts.append(format_table(rows, headings=("severity", "count", "name", "finding"), right=(1,)))
        parts += map(_details, report.findings)
    errors, warnings = report.number("error"), report.number("warning")
    if errors or warnings:
        parts.append(f"{_counted(errors, 'error')}, {_counted(warnings, 'warning')}")
    else:
        parts.append("nothing found that would hurt")
    return "\n\n".join(parts)


def _counted(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _classes(report: "CheckReport") -> str:
    """Images by class and split; of many classes, the largest and the smallest."""
    from localvit.utils.tables import format_table

    splits = list(report.counts)
    names = sorted({name for classes in report.counts.values() for name in classes})
    title = "class"
    if len(names) > _CLASSES:
        names.sort(key=lambda name: -report.counts[splits[0]].get(name, 0))
        title = "class, largest first"
    rows = [
        [
            printable(name),
            *(f"{report.counts[split][name]:,}" if name in report.counts[split] else "-" for split in splits),
        ]
        for name in names
    ]
    if len(names) > _CLASSES:
        half = _CLASSES // 2
        rows[half:-half] = [[f"... {len(names) - 2 * half:,} more ...", *("" for _ in splits)]]
    total = [f"{len(names):,} classes", *(f"{sum(report.counts[split].values()):,}" for split in splits)]
    return format_table([*rows, total], headings=[title, *splits], right=range(1, len(splits) + 1))


def _sizes(report: "CheckReport") -> str:
    told = report.to_dict()
    sides = []
    for side in ("width", "height"):
        if told[side] is None:
            return "no image could be read"
        low, middle, high = (round(told[side][key]) for key in ("smallest", "median", "largest"))
        sides.append(f"{side} {low}" if low == high else f"{side} {low} to {high}, median {middle}")
    return f"pixels: {'; '.join(sides)}"


def _details(finding: "Finding") -> str:
    """What a finding means, and its first few places."""
    advice = textwrap.indent(textwrap.fill(printable(finding.advice), _WIDTH, break_long_words=False), "  ")
    lines = [f"{finding.severity}: {finding.title}", advice]
    for place in finding.places[:_EXAMPLES]:
        paths = ", ".join(map(printable, place.paths))
        lines.append(f"    {paths}{f': {printable(place.note)}' if place.note else ''}")
    if len(finding.places) > _EXAMPLES:
        lines.append(f"    and {len(finding.places) - _EXAMPLES:,} more; --json has them all")
    return "\n".join(lines)
