"""Images that look alike: a perceptual hash, and the search for the nearest of many.

Shapes: N images, S the side of a thumbnail in pixels, K the frequencies that count each way.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

THUMBNAIL_SIDE = 32
NEAR_BITS = 31
"""How many of the 256 bits of their hashes may differ between near duplicates: what PDQ, a hash of the same kind and
length, recommends (facebook/ThreatExchange, pdq/README). Unrelated photographs differ in about 128. Found are copies
that were scaled, compressed, made lighter or cropped by a hundredth; not mirrored ones, nor crops by some hundredths.
The 60 images of CIFAR-10's test set that it finds in the training set are all really there."""
FLAT = 2.0
"""Standard deviation of a thumbnail's gray levels (0 to 255) below which noise, not what is shown, decides its hash."""

_FREQUENCIES = 16
_BLOCK = 32, 4096
"""Queries and candidates that are compared at a time: few enough for their distances to stay in a core's cache."""


def _cosines() -> NDArray[np.float32]:
    """The first K rows of the discrete cosine transform (type 2, without scale) of S values."""
    frequencies, places = np.arange(_FREQUENCIES)[:, None], np.arange(THUMBNAIL_SIDE)[None]
    return np.cos(np.pi * frequencies * (2 * places + 1) / (2 * THUMBNAIL_SIDE)).astype(np.float32)


_COSINES_KS = _cosines()


def perceptual_hash(thumbnails_NSS: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """256 bits an image, as (N, 4): which of the lowest frequencies of a gray thumbnail are above their median.

    This is pHash (C. Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010) with PDQ's 16 x
    16 frequencies instead of 8 x 8: among tens of thousands of small photographs 64 bits take strangers for alike.
    """
    frequencies_NKK = _COSINES_KS @ thumbnails_NSS.astype(np.float32) @ _COSINES_KS.T
    flat_NK = frequencies_NKK.reshape(len(thumbnails_NSS), -1)
    return np.packbits(flat_NK > np.median(flat_NK, axis=1, keepdims=True), axis=1).view(np.uint64)


def nearest_before(
    hashes: NDArray[np.uint64],
    queries: NDArray[np.int64],
    candidates: NDArray[np.int64],
    advance: Callable[[int], None] = lambda done: None,
) -> list[tuple[int, int, int]]:
    """For each of `queries`, the nearest of those `candidates` that come before it, if one is within NEAR_BITS.

    Every pair is compared. Hashes of which at most 31 bits differ have one of their 4 words with at most 7 of these, so
    a look at each word by itself settles almost every pair.

    Args:
        hashes: of all images, (N, 4).
        queries, candidates: indices of images, ascending.
        advance: told how many queries have been done.

    Returns:
        (query, candidate, bits that differ) in the order of `queries`.
    """
    num_words = hashes.shape[1]
    words = np.ascontiguousarray(hashes.T)
    none = (NEAR_BITS + 1) * len(hashes)
    nearest: list[tuple[int, int, int]] = []
    for start in range(0, len(queries), _BLOCK[0]):
        block = queries[start : start + _BLOCK[0]]
        best = np.full(len(block), none)  # distance * N + index, so that of equal distances the first image counts
        for begin in range(0, len(candidates), _BLOCK[1]):
            others = candidates[begin : begin + _BLOCK[1]]
            if others[0] > block[-1]:
                break
            suspect = np.zeros((len(block), len(others)), bool)
            for word in words:
                suspect |= np.bitwise_count(word[block, None] ^ word[others]) <= NEAR_BITS // num_words
            if suspect.any():
                row, column = np.nonzero(suspect & (others < block[:, None]))
                bits = np.bitwise_count(hashes[block[row]] ^ hashes[others[column]]).sum(axis=1, dtype=np.int64)
                np.minimum.at(best, row, bits * len(hashes) + others[column])
        within = np.flatnonzero(best < none)
        bits, index = np.divmod(best[within], len(hashes))
        nearest += zip(block[within].tolist(), index.tolist(), bits.tolist(), strict=True)
        advance(len(block))
    return nearest
