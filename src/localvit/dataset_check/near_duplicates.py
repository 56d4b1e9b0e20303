"""Images that look alike: a perceptual hash, and the nearest earlier image among many.

The hash is pHash from the library imagehash (C. Zauner, Implementation and Benchmarking of Perceptual Image Hash
Functions, 2010) with 16 x 16 instead of 8 x 8 frequencies, as in PDQ: with 64 bits, unrelated images among tens of
thousands of small photographs would match. The search is here because imagehash compares one pair of hashes at a time.

Shapes: N images.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

THUMBNAIL_SIDE = 32
"""Side of the grayscale thumbnail that is hashed, in pixels."""
NEAR_BITS = 31
"""Near duplicates differ in at most this many of the 256 bits, as recommended for PDQ, a hash of the same kind and
length (facebook/ThreatExchange, pdq/README). Unrelated photographs differ in about 128. Copies that were scaled,
compressed, brightened or cropped by one percent are found; mirrored ones and crops by several percent are not. In
CIFAR-10, the 60 test images that it finds in the training set are all true duplicates."""
FLAT = 2.0
"""Standard deviation of a thumbnail's gray levels (0 to 255) below which noise decides its hash."""

_BLOCK = 32, 4096
"""Queries and candidates compared at a time, so that their distances fit into a core's cache."""


def require_imagehash() -> None:
    """Raise ImportError, with the command to run, if imagehash is not installed.

    Call it before worker processes start, because their errors arrive as tracebacks.
    """
    try:
        import imagehash  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{error}; checking images needs: pip install "localvit[check]"') from error


def perceptual_hash(thumbnail: Image.Image) -> NDArray[np.uint64]:
    """256 bits, as (4,), of a grayscale thumbnail: which low frequencies are above their median."""
    import imagehash

    bits = imagehash.phash(thumbnail, hash_size=16, highfreq_factor=THUMBNAIL_SIDE // 16).hash
    return np.packbits(bits).view(np.uint64)


def nearest_before(
    hashes: NDArray[np.uint64],
    queries: NDArray[np.int64],
    candidates: NDArray[np.int64],
    advance: Callable[[int], None] = lambda done: None,
) -> list[tuple[int, int, int]]:
    """For each query, find the nearest candidate with a lower index, if it is within NEAR_BITS.

    Compares all pairs. If two hashes differ in at most 31 bits, at least one of their four words differs in at most 7,
    so comparing the words separately first rejects almost all pairs.

    Args:
        hashes: The hashes of all images, (N, 4).
        queries: Indices of images, ascending.
        candidates: Indices of images, ascending.
        advance: Called with the number of queries done since the last call.

    Returns:
        (query, candidate, number of differing bits), in the order of `queries`.
    """
    num_words = hashes.shape[1]
    words = np.ascontiguousarray(hashes.T)
    none = (NEAR_BITS + 1) * len(hashes)
    nearest: list[tuple[int, int, int]] = []
    for start in range(0, len(queries), _BLOCK[0]):
        block = queries[start : start + _BLOCK[0]]
        best = np.full(len(block), none)  # distance * N + index, so that of equal distances the lowest index wins
        for begin in range(0, len(candidates), _BLOCK[1]):
            others = candidates[begin : begin + _BLOCK[1]]
            if others[0] > block[-1]:
                break
            possible = np.zeros((len(block), len(others)), bool)
            for word in words:
                possible |= np.bitwise_count(word[block, None] ^ word[others]) <= NEAR_BITS // num_words
            if possible.any():
                row, column = np.nonzero(possible & (others < block[:, None]))
                bits = np.bitwise_count(hashes[block[row]] ^ hashes[others[column]]).sum(axis=1, dtype=np.int64)
                np.minimum.at(best, row, bits * len(hashes) + others[column])
        within = np.flatnonzero(best < none)
        bits, index = np.divmod(best[within], len(hashes))
        nearest += zip(block[within].tolist(), index.tolist(), bits.tolist(), strict=True)
        advance(len(block))
    return nearest
