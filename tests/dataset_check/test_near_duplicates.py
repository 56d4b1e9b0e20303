"""The perceptual hash equals its definition, and the search equals the comparison of all pairs."""

import sys

import numpy as np
import pytest
from data_sets import save
from PIL import Image

from localvit.data.images import FileImages
from localvit.dataset_check.inspection import inspect
from localvit.dataset_check.near_duplicates import (
    FLAT,
    NEAR_BITS,
    THUMBNAIL_SIDE,
    nearest_before,
    perceptual_hash,
)
from localvit.dataset_check.report import check_folder


def test_the_hash_is_the_sign_of_low_frequencies_minus_their_median():
    pytest.importorskip("imagehash", reason="imagehash is an extra that is not installed")
    fft = pytest.importorskip("scipy.fft")
    thumbnails = np.random.default_rng(0).integers(0, 256, (7, THUMBNAIL_SIDE, THUMBNAIL_SIDE), dtype=np.uint8)
    for thumbnail in thumbnails:
        bits = np.unpackbits(perceptual_hash(Image.fromarray(thumbnail)).view(np.uint8))
        assert bits.shape == (256,)
        frequencies = fft.dctn(thumbnail.astype(np.float64), type=2)[:16, :16].ravel()
        above = frequencies - np.median(frequencies)
        clear = np.abs(above) > 1e-9  # float64 sums of 1,024 products of up to 255 round by about 1e-10
        assert clear.sum() > 250
        np.testing.assert_array_equal(bits[clear], (above > 0)[clear])


def test_a_missing_imagehash_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagehash", None)
    with pytest.raises(ImportError, match=r'pip install "localvit\[check\]"'):
        check_folder(tmp_path)


def flipped(number: int, bits_of_words: tuple[int, ...]) -> int:
    """`number` with the given number of bits of each of its 64-bit words inverted."""
    for word, bits in enumerate(bits_of_words):
        number ^= ((1 << bits) - 1) << (64 * word + 5)
    return number


def test_the_search_equals_the_comparison_of_all_pairs():
    rng = np.random.default_rng(0)
    numbers = [int.from_bytes(rng.bytes(32), "little") for _ in range(9001)]
    for index, (of, bits_of_words) in {
        4500: (3, (31, 0, 0, 0)),
        4501: (4, (8, 8, 8, 8)),  # 32 bits, one too many
        4502: (4099, (7, 8, 8, 8)),
        4503: (4502, (0, 1, 0, 0)),
        25: (20, (0, 0, 0, 9)),
        4504: (20, (1, 0, 0, 0)),  # further from 25, which is in the same block
        8999: (4400, (0, 0, 8, 23)),
        9000: (8999, (0, 0, 0, 0)),
    }.items():
        numbers[index] = flipped(numbers[of], bits_of_words)
    hashes = np.frombuffer(b"".join(number.to_bytes(32, "little") for number in numbers), np.uint64).reshape(-1, 4)
    queries, candidates = np.arange(4490, 9001, 1)[[*range(70), -2, -1]], np.arange(0, 9001)
    expected = []
    for query in queries.tolist():
        bits, nearest = min(((numbers[query] ^ numbers[other]).bit_count(), other) for other in range(query))
        if bits <= NEAR_BITS:
            expected.append((query, nearest, bits))
    assert [pair[:2] for pair in expected] == [
        (4500, 3),
        (4502, 4099),
        (4503, 4502),
        (4504, 20),
        (8999, 4400),
        (9000, 8999),
    ]
    done: list[int] = []
    assert nearest_before(hashes, queries, candidates, done.append) == expected
    assert sum(done) == len(queries)
    some = np.array([4, 4400])
    assert nearest_before(hashes, queries, some) == [(8999, 4400, 31), (9000, 4400, 31)]


def test_contrast_of_the_thumbnail(tmp_path):
    levels = np.zeros((64, 64), np.uint8)
    levels[:, 32:] = 10
    save(tmp_path / "a" / "1.png", Image.fromarray(levels))
    pytest.importorskip("imagehash", reason="imagehash is an extra that is not installed")
    inspection = inspect(FileImages(tmp_path, [("a/1.png", 0)], ["a"]), 0)
    # Halves of 0 and 10 have a standard deviation of 5; blur between them changes it by less than 1 / 32.
    assert inspection.contrasts == pytest.approx([5], rel=1 / 32)
    assert FLAT < 5
