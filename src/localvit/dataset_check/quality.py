"""What is wrong with images, each looked at by itself."""

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence

from localvit.dataset_check.findings import Finding, Place, Severity, found
from localvit.dataset_check.inspection import ImageFacts, Inspection
from localvit.dataset_check.perceptual_hash import FLAT

SMALL_SIDE = 32
"""Pixels of the shorter side below which an image is small, if most others have more than twice its side."""
LARGE_PIXELS = 4096 * 4096
"""Pixels above which decoding an image takes longer than training on it."""
ELONGATED = 4
"""Times that the longer side may have the shorter's length: a center crop then shows a quarter of the image."""


def image_findings(paths: Sequence[str], seen: Inspection) -> list[Finding]:
    """What is wrong with images, each by itself."""
    places: dict[str, list[Place]] = defaultdict(list)
    sizes = [facts.size for facts in seen.facts if isinstance(facts, ImageFacts)]
    usual_side = statistics.median(min(size) for size in sizes) if sizes else 0
    for path, facts, contrast in zip(paths, seen.facts, seen.contrasts.tolist(), strict=True):
        if isinstance(facts, str):
            places["unreadable"].append(Place((path,), facts))
            continue
        for name, note in _oddities(facts, contrast, usual_side):
            places[name].append(Place((path,), note))
    return [
        finding
        for name, (severity, title, advice) in _IMAGE_FINDINGS.items()
        for finding in found(severity, name, title, advice, places[name])
    ]


def _oddities(facts: ImageFacts, contrast: float, usual_side: float) -> Iterator[tuple[str, str]]:
    width, height = facts.size
    size = f"{width} x {height}"
    if min(facts.size) < SMALL_SIDE and 2 * min(facts.size) < usual_side:
        yield "small", size
    if width * height > LARGE_PIXELS:
        yield "large", size
    if max(facts.size) > ELONGATED * min(facts.size):
        yield "elongated", size
    if contrast < FLAT:
        yield "blank", ""
    if facts.turned:
        yield "turned", ""
    if facts.unseen:
        yield "unseen", facts.unseen
    if facts.remark:
        yield "remarks", facts.remark


_IMAGE_FINDINGS: dict[str, tuple[Severity, str, str]] = {
    "unreadable": (
        "error",
        "images that cannot be read",
        "Training stops at the first of them. Fetch them again, or delete them.",
    ),
    "small": (
        "warning",
        "images much smaller than the others",
        "Enlarged to the model's size they are a blur; thumbnails and icons often got in by mistake. Look at them.",
    ),
    "large": (
        "warning",
        f"images of more than {LARGE_PIXELS // 10**6} million pixels",
        "Decoding them takes longer than training on them. Save them smaller, with some reserve over the model's size.",
    ),
    "elongated": (
        "warning",
        f"images more than {ELONGATED} times as long as wide",
        "The crop from the middle that is evaluated shows a small part of them. Cut them to what matters.",
    ),
    "blank": (
        "warning",
        "images with next to nothing on them",
        "They are of one shade, as failed exposures and placeholders are, and teach their class nothing. Look at them.",
    ),
    "turned": (
        "warning",
        "images that viewers turn but training does not",
        "Training does not look at their EXIF orientation: the model sees them lying or upside down. Turn the pixels, "
        "for example with `mogrify -auto-orient`.",
    ),
    "unseen": (
        "warning",
        "images of which training sees only a part",
        "Behind transparency lies whatever color was saved there; 12 bits that are stored as 16 come out nearly "
        "black. Convert them to what the model should see.",
    ),
    "remarks": (
        "warning",
        "images that the decoder remarked on",
        "They were read, but may be damaged. Look at them.",
    ),
}
