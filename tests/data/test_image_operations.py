"""Operations on many images at once, compared with PIL, timm and torchvision on each image."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageEnhance, ImageOps
from timm.data import auto_augment

from localvit.data import image_operations
from localvit.data.image_randomness import ImageRandomness, combined

SIZE = (31, 29)  # more than 3 * 255 pixels, which is what equalizing rounds


@pytest.fixture(scope="module")
def images_BCHW():
    """Noise, a dark and a bright gradient, one color, and two colors."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (2, 3, *SIZE), generator=generator)
    ramp = torch.arange(SIZE[0] * SIZE[1]).view(1, 1, *SIZE).expand(1, 3, -1, -1)
    plain = torch.tensor([10, 200, 77])[None, :, None, None].expand(1, 3, *SIZE)
    return torch.cat([noise, ramp // 8 + 20, 255 - ramp % 256, plain, (noise[:1] > 128) * 90 + 7]).byte()


def to_pil(image_CHW):
    return Image.fromarray(image_CHW.permute(1, 2, 0).numpy())


def from_pil(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def worst(batched_BCHW, images):
    one_by_one = torch.stack([from_pil(image) for image in images])
    return (batched_BCHW.int() - one_by_one.int()).abs().max().item()


@pytest.mark.parametrize(
    ("name", "enhance"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("color", ImageEnhance.Color),
        ("sharpness", ImageEnhance.Sharpness),
    ],
)
def test_enhancements_are_those_of_pil(images_BCHW, name, enhance):
    factors = [0.0, 0.1, 0.37, 1.0, 1.45, 1.9]
    batched = getattr(image_operations, name)(images_BCHW, torch.tensor(factors))
    expected = [enhance(to_pil(image)).enhance(factor) for image, factor in zip(images_BCHW, factors, strict=True)]
    assert worst(batched, expected) == 0


@pytest.mark.parametrize(
    ("name", "one", "arguments", "tolerance"),
    [
        ("invert", lambda image, _: ImageOps.invert(image), [0] * 6, 0),
        ("posterize", lambda image, bits: ImageOps.posterize(image, bits), [1, 2, 4, 7, 8, 3], 0),
        ("solarize", lambda image, threshold: ImageOps.solarize(image, threshold), [0, 26, 128, 200, 255, 256], 0),
        ("solarize_add", lambda image, add: auto_augment.solarize_add(image, add), [0, 11, 55, 110, 128, 99], 0),
        ("equalize", lambda image, _: ImageOps.equalize(image), [0] * 6, 0),
        ("auto_contrast", lambda image, _: ImageOps.autocontrast(image), [0] * 6, 1),
    ],
)
def test_operations_on_colors_are_those_of_pil(images_BCHW, name, one, arguments, tolerance):
    batched = getattr(image_operations, name)(images_BCHW, torch.tensor(arguments, dtype=torch.float32))
    expected = [one(to_pil(image), argument) for image, argument in zip(images_BCHW, arguments, strict=True)]
    assert worst(batched, expected) <= tolerance
    assert batched.dtype == torch.uint8


def test_posterizing_to_no_bits_is_black(images_BCHW):
    assert image_operations.posterize(images_BCHW, torch.zeros(6)).sum() == 0


def test_auto_contrast_and_equalize_agree_with_torchvision(images_BCHW):
    nothing = torch.zeros(6)
    assert torch.equal(image_operations.equalize(images_BCHW, nothing), TF.equalize(images_BCHW))
    contrast = image_operations.auto_contrast(images_BCHW, nothing).int() - TF.autocontrast(images_BCHW).int()
    assert contrast.abs().max() <= 1


def test_a_warp_is_that_of_pil(images_BCHW):
    angle = math.radians(17)
    rotation = (math.cos(angle), math.sin(angle), -1.0, -math.sin(angle), math.cos(angle), 2.3)
    shifts = [(1, 0, 2.6, 0, 1, 0), (1, 0, 0, 0, 1, -3.2), (1, 0.27, 0, 0, 1, 0), (1, 0, 0, -0.3, 1, 0)]
    matrices = [(1, 0, 0, 0, 1, 0), *shifts, rotation]
    fill = (124, 116, 104)
    batched = image_operations.warp(
        images_BCHW, torch.tensor(matrices).view(-1, 2, 3), torch.tensor(fill, dtype=torch.uint8)
    )
    expected = [
        to_pil(image).transform(SIZE[::-1], Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=fill)
        for image, matrix in zip(images_BCHW, matrices, strict=True)
    ]
    assert worst(batched, expected) <= 1
    assert torch.equal(batched[0], images_BCHW[0])


def test_a_crop_is_that_of_torchvision(images_BCHW):
    tops, lefts, flips = [-4, 0, 3, -1, 2, 8], [2, -3, 0, 4, -4, 5], [False, True, True, False, True, False]
    size = (9, 10)
    batched = image_operations.crop(images_BCHW, torch.tensor(tops), torch.tensor(lefts), size, torch.tensor(flips))
    for row, (top, left, is_flipped) in enumerate(zip(tops, lefts, flips, strict=True)):
        expected = TF.crop(TF.pad(images_BCHW[row], 9), top + 9, left + 9, *size)
        assert torch.equal(batched[row], TF.hflip(expected) if is_flipped else expected)


def test_the_hash_is_splitmix64():
    """The first numbers of SplitMix64 for the seed 1234567, as listed for implementations to compare with."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    numbers = combined(1234567, torch.arange(5)).tolist()
    assert [number % 2**64 for number in numbers] == expected


def test_random_numbers_have_their_distribution():
    """Means and variances of 100,000 numbers within 5 standard errors; neighboring keys and draws are uncorrelated."""
    randomness = ImageRandomness(combined(3, torch.arange(1000)))
    uniform = randomness.uniform(100).double()
    assert 0 <= uniform.min() < 1e-3
    assert 0.999 < uniform.max() < 1
    assert abs(uniform.mean() - 1 / 2) < 5 * (1 / 12 / 1e5) ** 0.5
    assert abs(uniform.var() - 1 / 12) < 5 * (1 / 180 / 1e5) ** 0.5
    for one, other in ((uniform[1:], uniform[:-1]), (uniform[:, 1:], uniform[:, :-1])):
        assert abs(torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1]) < 5 / 1e5**0.5
    normal = randomness.normal(100).double()
    assert abs(normal.mean()) < 5 * (1 / 1e5) ** 0.5
    assert abs(normal.var() - 1) < 5 * (2 / 1e5) ** 0.5
    assert randomness.below(3, 50).unique().tolist() == [0, 1, 2]


def test_a_number_depends_on_its_position_only():
    """Drawn one by one, or together."""
    keys_B = combined(5, torch.arange(4))
    together, one_by_one = ImageRandomness(keys_B).uniform(6), ImageRandomness(keys_B)
    parts = [one_by_one.uniform(2), one_by_one.uniform(), one_by_one.uniform(3)]
    assert torch.equal(torch.cat([part.view(4, -1) for part in parts], 1), together)
    assert len(together.unique()) == 24
