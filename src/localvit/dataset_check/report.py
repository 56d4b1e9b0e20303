"""The check of a folder of images, from beginning to end, and the report on it."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localvit.data.images import FileImages
from localvit.dataset_check.classes import class_findings
from localvit.dataset_check.duplicates import duplicate_findings
from localvit.dataset_check.findings import SEVERITIES, Finding, Progress, Severity
from localvit.dataset_check.inspection import ImageFacts, inspect
from localvit.dataset_check.quality import image_findings
from localvit.dataset_check.splits import SplitImages, open_splits


@contextmanager
def _silent(title: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda done: None


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What a check found."""

    root: Path
    counts: dict[str, dict[str, int]]
    """Images by split and class, unreadable ones too; the one split of class folders alone is called "all"."""
    sizes: list[tuple[int, int]]
    """Width and height of each image that can be read, in pixels."""
    findings: list[Finding]
    """Errors first."""

    def number(self, severity: Severity) -> int:
        """How many findings are of this severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON; paths go from the folder that was checked."""
        return {
            "folder": str(self.root),
            "images": {split: sum(classes.values()) for split, classes in self.counts.items()},
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
    """Look at every image of a data set, in its splits (train/, val/, test/) or class folders alone.

    Args:
        root: the folder.
        workers: processes that decode; 0 decodes in this one.
        progress: how to give an account of the two long parts, decoding and comparing.

    Raises:
        DataError: when `root` is no folder.
        UnreadableImage: when an image goes away while it is looked at a second time.
        RuntimeError: when a worker process dies.
    """
    splits, findings = open_splits(root)
    counts = {split: _class_counts(images) for split, images in splits.items()}
    findings += class_findings(counts)
    images = SplitImages(root, splits)
    sizes: list[tuple[int, int]] = []
    if len(images):
        with progress("look", len(images)) as advance:
            seen = inspect(images, workers, advance)
        sizes = [facts.size for facts in seen.facts if isinstance(facts, ImageFacts)]
        findings += image_findings(images.paths, seen)
        findings += duplicate_findings(images, seen, workers, progress)
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return CheckReport(root=root, counts=counts, sizes=sizes, findings=findings)


def _range(sides: Iterable[int]) -> dict[str, float] | None:
    found = list(sides)
    return {"smallest": min(found), "median": statistics.median(found), "largest": max(found)} if found else None


def _class_counts(images: FileImages) -> dict[str, int]:
    counted = Counter(images.labels)
    return {name: counted[label] for label, name in enumerate(images.class_names or [])}
