"""Problems of single images."""

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence

from localvit.dataset_check.findings import Finding, Location, Severity, finding_at
from localvit.dataset_check.inspection import ImageFacts, Inspection
from localvit.dataset_check.near_duplicates import FLAT

SMALL_SIDE = 32
"""An image with a shorter side below this many pixels is small, if the median is more than twice as long."""
INPUT_SIDE = 224
"""Input size of most models, in pixels."""
LARGE_PIXELS = 4096 * 4096
"""Number of pixels above which decoding an image takes longer than training on it."""
ELONGATED = 4
"""Largest aspect ratio that is not reported; a center crop then contains a quarter of the image."""


def image_findings(paths: Sequence[str], inspection: Inspection) -> list[Finding]:
    """Find the problems of single images.

    Args:
        paths: Path of each image.
        inspection: The inspection of these images.
    """
    locations: dict[str, list[Location]] = defaultdict(list)
    sizes = [facts.size for facts in inspection.facts if isinstance(facts, ImageFacts)]
    median_side = statistics.median(min(size) for size in sizes) if sizes else 0
    for path, facts, contrast in zip(paths, inspection.facts, inspection.contrasts.tolist(), strict=True):
        if isinstance(facts, str):
            locations["unreadable"].append(Location((path,), facts))
            continue
        for name, note in _problems(facts, contrast, median_side):
            locations[name].append(Location((path,), note))
    if sizes and median_side <= SMALL_SIDE:
        note = f"the median of the shorter sides is {median_side:g} pixels"
        locations["small-for-most-models"].append(Location((".",), note))
    return [
        finding
        for name, (severity, title, advice) in _IMAGE_FINDINGS.items()
        for finding in finding_at(severity, name, title, advice, locations[name])
    ]


def _problems(facts: ImageFacts, contrast: float, median_side: float) -> Iterator[tuple[str, str]]:
    width, height = facts.size
    size = f"{width} x {height}"
    if min(facts.size) < SMALL_SIDE and 2 * min(facts.size) < median_side:
        yield "small", size
    if width * height > LARGE_PIXELS:
        yield "large", size
    if max(facts.size) > ELONGATED * min(facts.size):
        yield "elongated", size
    if contrast < FLAT:
        yield "blank", ""
    if facts.rotated:
        yield "rotated", ""
    if facts.ignored:
        yield "partly-ignored", facts.ignored
    if facts.decoder_warning:
        yield "decoder-warnings", facts.decoder_warning


_IMAGE_FINDINGS: dict[str, tuple[Severity, str, str]] = {
    "unreadable": (
        "error",
        "unreadable images",
        "Training stops at the first of them, unless it is told to --skip-unreadable. Download them again, or delete "
        "them.",
    ),
    "small": (
        "warning",
        "images much smaller than the others",
        "They are blurred when enlarged to the model's input size. Often they are thumbnails or icons that were "
        "included by mistake. Look at them.",
    ),
    "small-for-most-models": (
        "warning",
        f"data sets of images of at most {SMALL_SIDE} pixels",
        f"A model with an input of {INPUT_SIDE} x {INPUT_SIDE} pixels, as most have, sees them enlarged "
        f"{INPUT_SIDE // SMALL_SIDE} times or more, which costs time and shows nothing new. Use a model for small "
        "images, such as localvit_nano_patch4_32, or --input-size.",
    ),
    "large": (
        "warning",
        f"images of more than {LARGE_PIXELS // 10**6} million pixels",
        "Decoding them takes longer than training on them. Save them smaller, but larger than the model's input size.",
    ),
    "elongated": (
        "warning",
        f"images with an aspect ratio above {ELONGATED}",
        "Evaluation uses a center crop, which contains only a small part of them. Crop them to what matters.",
    ),
    "blank": (
        "warning",
        "images of a single color",
        "Failed exposures and placeholders look like this. They contain nothing about their class. Look at them.",
    ),
    "rotated": (
        "warning",
        "images that viewers rotate but training does not",
        "Training ignores their EXIF orientation, so the model sees them on their side or upside down. Rotate the "
        "pixels, for example with `mogrify -auto-orient`.",
    ),
    "partly-ignored": (
        "warning",
        "images with contents that training ignores",
        "Transparent areas show the color that was saved there, only the first frame of an animation is used, and "
        "12-bit values stored as 16 bits become nearly black. Convert them to what the model should see.",
    ),
    "decoder-warnings": (
        "warning",
        "images with decoder warnings",
        "They can be read, but may be damaged. Look at them.",
    ),
}
