"""The check of a folder of pictures, from beginning to end, and the report on it."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localvit.data.check.classes import class_findings
from localvit.data.check.duplicates import duplicate_findings
from localvit.data.check.findings import SEVERITIES, Finding, Progress, Severity
from localvit.data.check.inspection import PictureFacts, inspect
from localvit.data.check.pictures import picture_findings
from localvit.data.check.splits import SplitPictures, open_splits
from localvit.data.pictures import FilePictures


@contextmanager
def _silent(title: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda done: None


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What a check found."""

    root: Path
    counts: dict[str, dict[str, int]]
    """Pictures by split and class, unreadable ones too; the one split of class folders alone is called "all"."""
    sizes: list[tuple[int, int]]
    """Width and height of each picture that can be read, in pixels."""
    findings: list[Finding]
    """Errors first."""

    def number(self, severity: Severity) -> int:
        """How many findings are of this severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON; paths go from the folder that was checked."""
        return {
            "folder": str(self.root),
            "pictures": {split: sum(classes.values()) for split, classes in self.counts.items()},
            "classes": self.counts,
            "width": _range(width for width, _ in self.sizes),
            "height": _range(height for _, height in self.sizes),
            "errors": self.number("error"),
            "warnings": self.number("warning"),
            "findings": [
                {
                    "severity": finding.severity,
                    "name": finding.name,
                    "title": finding.title,
                    "advice": finding.advice,
                    "count": len(finding.places),
                    "places": [{"paths": list(place.paths), "note": place.note} for place in finding.places],
                }
                for finding in self.findings
            ],
        }


def check_folder(root: Path, *, workers: int = 0, progress: Progress = _silent) -> CheckReport:
    """Look at every picture of a data set, in its splits (train/, val/, test/) or class folders alone.

    Args:
        root: the folder.
        workers: processes that decode; 0 decodes in this one.
        progress: how to give an account of the two long parts, decoding and comparing.

    Raises:
        DataError: when `root` is no folder.
        UnreadablePicture: when a picture goes away while it is looked at a second time.
        RuntimeError: when a worker process dies.
    """
    splits, findings = open_splits(root)
    counts = {split: _class_counts(pictures) for split, pictures in splits.items()}
    findings += class_findings(counts)
    pictures = SplitPictures(root, splits)
    sizes: list[tuple[int, int]] = []
    if len(pictures):
        with progress("look", len(pictures)) as advance:
            seen = inspect(pictures, workers, advance)
        sizes = [facts.size for facts in seen.facts if isinstance(facts, PictureFacts)]
        findings += picture_findings(pictures.paths, seen)
        findings += duplicate_findings(pictures, seen, workers, progress)
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return CheckReport(root=root, counts=counts, sizes=sizes, findings=findings)


def _range(sides: Iterable[int]) -> dict[str, float] | None:
    found = list(sides)
    return {"smallest": min(found), "median": statistics.median(found), "largest": max(found)} if found else None


def _class_counts(pictures: FilePictures) -> dict[str, int]:
    counted = Counter(pictures.labels)
    return {name: counted[label] for label, name in enumerate(pictures.class_names or [])}
