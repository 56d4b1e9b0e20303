"""Duplicate images: identical pixels anywhere, and near duplicates where they make the accuracy too high."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from operator import itemgetter

import numpy as np

from localvit.data.images import FileImages
from localvit.dataset_check.findings import Finding, Location, Progress, Severity, finding_at
from localvit.dataset_check.inspection import ImageFacts, Inspection, pixel_digests
from localvit.dataset_check.near_duplicates import FLAT, NEAR_BITS, nearest_before
from localvit.dataset_check.splits import UNSPLIT, SplitImages


def duplicate_findings(images: SplitImages, inspection: Inspection, workers: int, progress: Progress) -> list[Finding]:
    """Find identical images in the whole data set, and near duplicates in different splits.

    In a folder without splits, near duplicates are reported everywhere, because part of it will be kept for validation.

    Args:
        images: The images of all splits.
        inspection: The inspection of these images.
        workers: Number of worker processes that decode images with equal thumbnails again.
        progress: Shows the progress of the comparison.

    Raises:
        UnreadableImage: An image can no longer be read.
        RuntimeError: A worker process died.
    """
    unsplit = images.splits == [UNSPLIT]
    locations = defaultdict(list)
    groups = _identical_images(images, inspection.facts, workers)
    for group in groups:
        location = _location(images, group)
        if len({images.split_of[index] for index in group}) > 1:
            locations["same-across-splits"].append(location)
        else:
            locations["same-in-classes" if location.note else "same-twice"].append(location)
    copies = [index for group in groups for index in group[1:]]
    for query, candidate, bits in sorted(_near_pairs(images, inspection, copies, progress), key=itemgetter(2)):
        location = _location(images, (query, candidate), f"{bits} of 256 bits differ")
        locations["near-twice" if unsplit else "near-across-splits"].append(location)
    return [
        finding
        for name, (severity, title, advice) in _texts(unsplit).items()
        for finding in finding_at(severity, name, title, advice, locations[name])
    ]


def _location(images: SplitImages, group: Sequence[int], note: str = "") -> Location:
    if len({images.labels[index] for index in group}) > 1:
        note = ", ".join(filter(None, (note, "in different classes")))
    return Location(tuple(images.paths[index] for index in group), note)


def _texts(unsplit: bool) -> dict[str, tuple[Severity, str, str]]:
    """Severity, title and advice of each finding, by name."""
    near = (
        f"Their perceptual hashes differ in at most {NEAR_BITS} of 256 bits. Most are one image that was scaled, "
        "compressed or edited; some are two photographs of one scene, or simple drawings such as digits. The most "
        "similar pairs are listed first. "
    )
    random_split = (
        "Part of each class is chosen at random for validation, so one copy may be in the training set and the other "
        "in the validation set. "
    )
    return {
        "same-across-splits": (
            "error",
            "identical images in several splits",
            "The model is evaluated on images that it was trained on, so the accuracy is too high. Delete all copies "
            "but one.",
        ),
        "same-in-classes": (
            "warning",
            "identical images in several classes",
            "A label is wrong, or the classes overlap. Keep the image in the right class only.",
        ),
        "same-twice": (
            "warning",
            "identical images in one class",
            f"{random_split if unsplit else 'They count several times. '}Delete all copies but one.",
        ),
        "near-across-splits": (
            "warning",
            "near duplicates of images in an earlier split",
            f"{near}The model is evaluated on images that it has almost been trained on. Look at them, and delete one "
            "of each pair.",
        ),
        "near-twice": (
            "warning",
            "near duplicates of other images",
            f"{near}{random_split}Look at them, and delete one of each pair, or create train/ and val/ yourself.",
        ),
    }


def _identical_images(images: FileImages, facts: Sequence[ImageFacts | str], workers: int) -> list[list[int]]:
    """Groups of images with identical pixels. Only images with identical thumbnails are decoded again."""
    by_thumbnail = defaultdict(list)
    for index, fact in enumerate(facts):
        if isinstance(fact, ImageFacts):
            by_thumbnail[fact.thumbnail_digest].append(index)
    candidates = sorted(index for group in by_thumbnail.values() if len(group) > 1 for index in group)
    by_pixels = defaultdict(list)
    for index, digest in zip(candidates, pixel_digests(images, candidates, workers), strict=True):
        by_pixels[digest].append(index)
    return [group for group in by_pixels.values() if len(group) > 1]


def _near_pairs(
    images: SplitImages, inspection: Inspection, copies: Sequence[int], progress: Progress
) -> Iterator[tuple[int, int, int]]:
    """Each image with its nearest one in an earlier split, or, in a folder without splits, among those before it."""
    usable = inspection.contrasts >= FLAT
    usable[copies] = False
    split_of = np.array(images.split_of)
    if images.splits == [UNSPLIT]:
        searches = [(np.flatnonzero(usable), np.flatnonzero(usable))]
    else:
        searches = [
            (np.flatnonzero(usable & (split_of == split)), np.flatnonzero(usable & (split_of < split)))
            for split in range(1, len(images.splits))
        ]
    total = sum(len(queries) for queries, _ in searches)
    if not total:
        return
    with progress("compare", total) as advance:
        for queries, candidates in searches:
            yield from nearest_before(inspection.hashes, queries, candidates, advance)
