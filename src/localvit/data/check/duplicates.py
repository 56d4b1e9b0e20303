"""Pictures that are there twice, to the pixel or nearly, and what follows from it where they are."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from operator import itemgetter

import numpy as np

from localvit.data.check.findings import Finding, Place, Progress, Severity, found
from localvit.data.check.inspection import Inspection, PictureFacts, pixel_digests
from localvit.data.check.perceptual_hash import FLAT, NEAR_BITS, nearest_before
from localvit.data.check.splits import UNSPLIT, SplitPictures
from localvit.data.pictures import FilePictures


def duplicate_findings(pictures: SplitPictures, seen: Inspection, workers: int, progress: Progress) -> list[Finding]:
    """Pictures that are the same, anywhere; and nearly the same, in different splits or where there is but one.

    Args:
        pictures: of all splits.
        seen: what a look at them told.
        workers: processes that decode those again whose thumbnails are equal.
        progress: how to give an account of the comparison.

    Raises:
        UnreadablePicture: when one can no longer be read.
        RuntimeError: when a worker process dies.
    """
    undivided = pictures.splits == [UNSPLIT]
    places = defaultdict(list)
    groups = _equal_pictures(pictures, seen.facts, workers)
    for group in groups:
        place = _place(pictures, group)
        if len({pictures.split_of[index] for index in group}) > 1:
            places["same-across-splits"].append(place)
        else:
            places["same-in-classes" if place.note else "same-twice"].append(place)
    copies = [index for group in groups for index in group[1:]]
    for query, candidate, bits in sorted(_near_pairs(pictures, seen, copies, progress), key=itemgetter(2)):
        place = _place(pictures, (query, candidate), f"{bits} of 256 bits differ")
        places["near-twice" if undivided else "near-across-splits"].append(place)
    return [
        finding
        for name, (severity, title, advice) in _texts(undivided).items()
        for finding in found(severity, name, title, advice, places[name])
    ]


def _place(pictures: SplitPictures, group: Sequence[int], note: str = "") -> Place:
    if len({pictures.labels[index] for index in group}) > 1:
        note = ", ".join(filter(None, (note, "under different classes")))
    return Place(tuple(pictures.paths[index] for index in group), note)


def _texts(undivided: bool) -> dict[str, tuple[Severity, str, str]]:
    """Severity, title and advice by name; `undivided` if training has yet to part train from val."""
    alike = (
        f"Perceptual hashes of 256 bits differ in {NEAR_BITS} or less: mostly one picture scaled, compressed or "
        "retouched, the surest ones first; now and then two takes of one scene, or drawings as simple as a digit. "
    )
    by_lot = (
        "Part of each class is kept for evaluation, by lot: of two, one may be trained on and the other evaluated. "
    )
    return {
        "same-across-splits": (
            "error",
            "pictures that are in several splits, the same to the pixel",
            "A model knows the answer to a picture that it was trained on: the accuracy comes out too high. Delete all "
            "but one.",
        ),
        "same-in-classes": (
            "warning",
            "pictures that are in several classes, the same to the pixel",
            "A label is wrong, or the classes overlap. Keep the right one.",
        ),
        "same-twice": (
            "warning",
            "pictures that are in one class several times, the same to the pixel",
            f"{by_lot if undivided else 'They count several times. '}Delete all but one.",
        ),
        "near-across-splits": (
            "warning",
            "pictures nearly the same as one of an earlier split",
            f"{alike}A model has all but seen them before it is evaluated on them. Look at them, and delete one of "
            "each two.",
        ),
        "near-twice": (
            "warning",
            "pictures nearly the same as another",
            f"{alike}{by_lot}Look at them, and delete one of each two, or make train/ and val/ by hand.",
        ),
    }


def _equal_pictures(pictures: FilePictures, facts: Sequence[PictureFacts | str], workers: int) -> list[list[int]]:
    """Groups of pictures with equal pixels. Only those with equal thumbnails are decoded again."""
    alike = defaultdict(list)
    for index, fact in enumerate(facts):
        if isinstance(fact, PictureFacts):
            alike[fact.thumbnail_digest].append(index)
    suspects = sorted(index for group in alike.values() if len(group) > 1 for index in group)
    equal = defaultdict(list)
    for index, digest in zip(suspects, pixel_digests(pictures, suspects, workers), strict=True):
        equal[digest].append(index)
    return [group for group in equal.values() if len(group) > 1]


def _near_pairs(
    pictures: SplitPictures, seen: Inspection, copies: Sequence[int], progress: Progress
) -> Iterator[tuple[int, int, int]]:
    """Pictures and the nearest of an earlier split, or, of class folders alone, of those before them."""
    usable = seen.contrasts >= FLAT
    usable[copies] = False
    split_of = np.array(pictures.split_of)
    if pictures.splits == [UNSPLIT]:
        searches = [(np.flatnonzero(usable), np.flatnonzero(usable))]
    else:
        searches = [
            (np.flatnonzero(usable & (split_of == split)), np.flatnonzero(usable & (split_of < split)))
            for split in range(1, len(pictures.splits))
        ]
    total = sum(len(queries) for queries, _ in searches)
    if not total:
        return
    with progress("compare", total) as advance:
        for queries, candidates in searches:
            yield from nearest_before(seen.hashes, queries, candidates, advance)
