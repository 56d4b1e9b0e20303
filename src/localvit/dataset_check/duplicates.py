"""Images that are there twice, to the pixel or nearly, and what follows from it where they are."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from operator import itemgetter

import numpy as np

from localvit.data.images import FileImages
from localvit.dataset_check.findings import Finding, Place, Progress, Severity, found
from localvit.dataset_check.inspection import ImageFacts, Inspection, pixel_digests
from localvit.dataset_check.perceptual_hash import FLAT, NEAR_BITS, nearest_before
from localvit.dataset_check.splits import UNSPLIT, SplitImages


def duplicate_findings(images: SplitImages, seen: Inspection, workers: int, progress: Progress) -> list[Finding]:
    """Images that are the same, anywhere; and nearly the same, in different splits or where there is but one.

    Args:
        images: of all splits.
        seen: what a look at them told.
        workers: processes that decode those again whose thumbnails are equal.
        progress: how to give an account of the comparison.

    Raises:
        UnreadableImage: when one can no longer be read.
        RuntimeError: when a worker process dies.
    """
    undivided = images.splits == [UNSPLIT]
    places = defaultdict(list)
    groups = _equal_images(images, seen.facts, workers)
    for group in groups:
        place = _place(images, group)
        if len({images.split_of[index] for index in group}) > 1:
            places["same-across-splits"].append(place)
        else:
            places["same-in-classes" if place.note else "same-twice"].append(place)
    copies = [index for group in groups for index in group[1:]]
    for query, candidate, bits in sorted(_near_pairs(images, seen, copies, progress), key=itemgetter(2)):
        place = _place(images, (query, candidate), f"{bits} of 256 bits differ")
        places["near-twice" if undivided else "near-across-splits"].append(place)
    return [
        finding
        for name, (severity, title, advice) in _texts(undivided).items()
        for finding in found(severity, name, title, advice, places[name])
    ]


def _place(images: SplitImages, group: Sequence[int], note: str = "") -> Place:
    if len({images.labels[index] for index in group}) > 1:
        note = ", ".join(filter(None, (note, "under different classes")))
    return Place(tuple(images.paths[index] for index in group), note)


def _texts(undivided: bool) -> dict[str, tuple[Severity, str, str]]:
    """Severity, title and advice by name; `undivided` if training has yet to part train from val."""
    alike = (
        f"Perceptual hashes of 256 bits differ in {NEAR_BITS} or less: mostly one image scaled, compressed or "
        "retouched, the surest ones first; now and then two takes of one scene, or drawings as simple as a digit. "
    )
    by_lot = (
        "Part of each class is kept for evaluation, by lot: of two, one may be trained on and the other evaluated. "
    )
    return {
        "same-across-splits": (
            "error",
            "images that are in several splits, the same to the pixel",
            "A model knows the answer to an image that it was trained on: the accuracy comes out too high. Delete all "
            "but one.",
        ),
        "same-in-classes": (
            "warning",
            "images that are in several classes, the same to the pixel",
            "A label is wrong, or the classes overlap. Keep the right one.",
        ),
        "same-twice": (
            "warning",
            "images that are in one class several times, the same to the pixel",
            f"{by_lot if undivided else 'They count several times. '}Delete all but one.",
        ),
        "near-across-splits": (
            "warning",
            "images nearly the same as one of an earlier split",
            f"{alike}A model has all but seen them before it is evaluated on them. Look at them, and delete one of "
            "each two.",
        ),
        "near-twice": (
            "warning",
            "images nearly the same as another",
            f"{alike}{by_lot}Look at them, and delete one of each two, or make train/ and val/ by hand.",
        ),
    }


def _equal_images(images: FileImages, facts: Sequence[ImageFacts | str], workers: int) -> list[list[int]]:
    """Groups of images with equal pixels. Only those with equal thumbnails are decoded again."""
    alike = defaultdict(list)
    for index, fact in enumerate(facts):
        if isinstance(fact, ImageFacts):
            alike[fact.thumbnail_digest].append(index)
    suspects = sorted(index for group in alike.values() if len(group) > 1 for index in group)
    equal = defaultdict(list)
    for index, digest in zip(suspects, pixel_digests(images, suspects, workers), strict=True):
        equal[digest].append(index)
    return [group for group in equal.values() if len(group) > 1]


def _near_pairs(
    images: SplitImages, seen: Inspection, copies: Sequence[int], progress: Progress
) -> Iterator[tuple[int, int, int]]:
    """Images and the nearest of an earlier split, or, of class folders alone, of those before them."""
    usable = seen.contrasts >= FLAT
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
            yield from nearest_before(seen.hashes, queries, candidates, advance)
