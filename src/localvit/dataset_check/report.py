"""The check of a folder of images, and its report."""

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
from localvit.dataset_check.near_duplicates import require_imagehash
from localvit.dataset_check.quality import image_findings
from localvit.dataset_check.splits import SplitImages, open_splits


@contextmanager
def _no_progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda done: None


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """The result of a check."""

    root: Path
    counts: dict[str, dict[str, int]]
    """Number of images, readable or not, by split and class. A folder without splits has one, called "all"."""
    sizes: list[tuple[int, int]]
    """Width and height of each readable image in pixels."""
    findings: list[Finding]
    """Errors first."""

    def count(self, severity: Severity) -> int:
        """Number of findings of a severity."""
        return sum(finding.severity == severity for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON. Paths are relative to the checked folder.

        `errors` and `warnings` are numbers of findings; each finding has the `count` of its locations.
        """
        return {
            "folder": str(self.root),
            "images": {split: sum(classes.values()) for split, classes in self.counts.items()},
            "classes": self.counts,
            "width": _range(width for width, _ in self.sizes),
            "height": _range(height for _, height in self.sizes),
            "errors": self.count("error"),
            "warnings": self.count("warning"),
            "findings": [
                {
                    "severity": finding.severity,
                    "name": finding.name,
                    "title": finding.title,
                    "advice": finding.advice,
                    "count": len(finding.locations),
                    "locations": [
                        {"paths": list(location.paths), "note": location.note} for location in finding.locations
                    ],
                }
                for finding in self.findings
            ],
        }


def check_folder(root: Path, *, workers: int = 0, progress: Progress = _no_progress) -> CheckReport:
    """Check every image of a folder that contains splits (train/, val/, test/) or class folders.

    Args:
        root: The folder.
        workers: Number of worker processes that decode images; 0 decodes in this process.
        progress: Shows the progress of the two long parts, decoding and comparing.

    Raises:
        DataError: `root` is not a folder.
        ImportError: imagehash is not installed.
        UnreadableImage: An image became unreadable during the check.
        RuntimeError: A worker process died.
    """
    require_imagehash()
    splits, findings = open_splits(root)
    counts = {split: _class_counts(images) for split, images in splits.items()}
    findings += class_findings(counts)
    images = SplitImages(root, splits)
    sizes: list[tuple[int, int]] = []
    if len(images):
        with progress("inspect", len(images)) as advance:
            inspection = inspect(images, workers, advance)
        sizes = [facts.size for facts in inspection.facts if isinstance(facts, ImageFacts)]
        findings += image_findings(images.paths, inspection)
        findings += duplicate_findings(images, inspection, workers, progress)
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return CheckReport(root=root, counts=counts, sizes=sizes, findings=findings)


def _range(sides: Iterable[int]) -> dict[str, float] | None:
    values = list(sides)
    return {"smallest": min(values), "median": statistics.median(values), "largest": max(values)} if values else None


def _class_counts(images: FileImages) -> dict[str, int]:
    counts = Counter(images.labels)
    return {name: counts[label] for label, name in enumerate(images.class_names or [])}
