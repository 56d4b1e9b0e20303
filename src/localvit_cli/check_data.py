"""`localvit check-data`: find what would harm training in a folder of images."""

import io
import json
import logging
import shutil
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from localvit.dataset_check.findings import SEVERITIES, Finding, Severity
from localvit.dataset_check.report import CheckReport, check_folder
from localvit.utils.devices import cpu_cores
from localvit.utils.tables import format_table, wrap_text
from localvit_cli import UsageError
from localvit_cli.console import progress
from localvit_cli.streams import printable

logger = logging.getLogger(__name__)

_EXAMPLES = 5
"""Locations shown of each finding."""
_CLASSES = 20
"""Classes shown; of more, only the largest and the smallest."""


@dataclass(frozen=True, kw_only=True)
class CheckData:
    """Find what would harm training on a folder of images. Exits with 1 on errors."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder that contains train/ and val/ (and optionally test/), or one folder per class."""
    json: bool = False
    """Print JSON with all locations of each finding, instead of tables with the first few."""
    workers: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: one per CPU core)")] = None
    """Number of processes that decode images. 0 decodes in the main process."""

    def run(self) -> int:
        """Check the folder and print the report."""
        if self.workers is not None and self.workers < 0:
            raise UsageError(f"--workers {self.workers} must not be negative")
        workers = cpu_cores() if self.workers is None else self.workers
        logger.info(f"checking {self.folder}")
        report = check_folder(self.folder, workers=workers, progress=progress)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        print(json.dumps(report.to_dict(), indent=2) if self.json else _text(report), flush=True)
        return 1 if report.count("error") else 0


def _text(report: CheckReport) -> str:
    parts = []
    if report.counts:
        parts += [_class_table(report), _sizes(report)]
    if report.findings:
        rows = [(finding.severity, f"{len(finding.locations):,}", finding.name) for finding in report.findings]
        parts.append(format_table(rows, headings=("severity", "count", "finding"), right=(1,)))
        parts += map(_details, report.findings)
        parts.append(", ".join(_total(report, severity) for severity in SEVERITIES))
    else:
        parts.append("no problems found")
    return "\n\n".join(parts)


def _total(report: CheckReport, severity: Severity) -> str:
    """How many places have a problem of a severity, as in the table, and of how many kinds, if that differs."""
    counts = [len(finding.locations) for finding in report.findings if finding.severity == severity]
    kinds = f" of {_plural(len(counts), 'kind')}" if len(counts) != sum(counts) else ""
    return f"{_plural(sum(counts), severity)}{kinds}"


def _plural(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _class_table(report: CheckReport) -> str:
    """Number of images by class and split; of many classes, only the largest and the smallest."""
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
    label = "1 class" if len(names) == 1 else f"{len(names):,} classes"
    total = [label, *(f"{sum(report.counts[split].values()):,}" for split in splits)]
    return format_table([*rows, total], headings=[title, *splits], right=range(1, len(splits) + 1))


def _sizes(report: CheckReport) -> str:
    values = report.to_dict()
    sides = []
    for side in ("width", "height"):
        if values[side] is None:
            return "no image could be read"
        low, median, high = (round(values[side][key]) for key in ("smallest", "median", "largest"))
        sides.append(f"{side} {low}" if low == high else f"{side} {low} to {high}, median {median}")
    return f"size in pixels: {'; '.join(sides)}"


def _details(finding: Finding) -> str:
    """What a finding means, what to do, and its first few locations."""
    advice = wrap_text(printable(finding.advice), width=shutil.get_terminal_size().columns - 2)
    lines = [f"{finding.severity}: {finding.title}", textwrap.indent(advice, "  ")]
    for location in finding.locations[:_EXAMPLES]:
        paths = ", ".join(map(printable, location.paths))
        lines.append(f"    {paths}{f': {printable(location.note)}' if location.note else ''}")
    if len(finding.locations) > _EXAMPLES:
        lines.append(f"    and {len(finding.locations) - _EXAMPLES:,} more; --json lists all of them")
    return "\n".join(lines)
