"""Random augmentation of many images at once, compared with timm's and torchvision's transforms of one image."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing
from torchvision import transforms

from localvit.data.batch_augmentation import BatchAugmentation
from localvit.data.image_randomness import combined
from localvit.data.preprocessing import Preprocessing
from localvit.data.resized_crop import ResizedCrop
from localvit.train.augmentation import augmentation
from localvit.train.config import TrainConfig

HPARAMS = {"img_mean": (124, 116, 104), "translate_const": 8, "interpolation": Image.Resampling.BILINEAR}


def some_images(count, height=16, width=16, seed=0):
    """Noise of the size of a few pixels, as in images."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (count, height // 2, width // 2, 3)).astype(np.uint8)
    large = [Image.fromarray(each).resize((width, height), Image.Resampling.BICUBIC) for each in small]
    return torch.from_numpy(np.stack([np.asarray(each) for each in large])).permute(0, 3, 1, 2).contiguous()


def keys(count, epoch=0):
    return combined(epoch, torch.arange(count))


def to_pil(image_CHW):
    return Image.fromarray(image_CHW.permute(1, 2, 0).numpy())


def composed(*steps):
    plain = transforms.Normalize(torch.zeros(3), torch.ones(3))
    return transforms.Compose([*steps, transforms.ToTensor(), plain])


def published(random_erasing=0.25, **changes):
    return augmentation(TrainConfig(**changes), Preprocessing.published((16, 16)), random_erasing)


def test_without_randomness_it_is_the_transform_of_each_image():
    config = TrainConfig(hflip=0.0, auto_augment=None, color_jitter=0.0)
    transform = augmentation(config, Preprocessing.published((16, 16)), 0.0)
    transform.transforms[0].crop.padding = 0
    images_BCHW = some_images(5)
    expected = torch.stack([transform(to_pil(image)) for image in images_BCHW])
    assert torch.equal(BatchAugmentation(transform)(images_BCHW, keys(5)), expected)


@pytest.mark.parametrize(
    "changes",
    [{}, {"auto_augment": None}, {"random_erasing_mode": "rand", "random_erasing_count": 3}, {"hflip": 0.0}],
    ids=["published", "color jitter", "rectangles of one color", "no flips"],
)
def test_an_image_does_not_depend_on_the_images_beside_it(changes):
    augment = BatchAugmentation(published(**changes))
    images_BCHW, keys_B = some_images(40), keys(40)
    whole = augment(images_BCHW, keys_B)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    for rows in order.split(7):
        torch.manual_seed(int(rows[0]))  # the generator has no effect
        assert torch.equal(augment(images_BCHW[rows], keys_B[rows]), whole[rows])
    assert not torch.equal(augment(images_BCHW, keys(40, epoch=1)), whole)


def test_the_images_that_are_given_do_not_change():
    images_BCHW = some_images(20)
    before = images_BCHW.clone()
    BatchAugmentation(published())(images_BCHW, keys(20))
    assert torch.equal(images_BCHW, before)


NAMES = [*auto_augment._RAND_TRANSFORMS, *auto_augment._RAND_INCREASING_TRANSFORMS, "PosterizeOriginal", "Desaturate"]


@pytest.mark.parametrize("name", sorted({*NAMES, "TranslateX", "TranslateY"}))
@pytest.mark.parametrize("magnitude", [3, 9])
def test_an_operation_of_randaugment_is_that_of_timm(name, magnitude):
    """Each image is the result for one of the two signs, and both occur."""
    operation = auto_augment.AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=HPARAMS)
    augment = BatchAugmentation(composed(auto_augment.RandAugment([operation], num_layers=1)))
    images_BCHW = some_images(16)
    batched = (augment(images_BCHW, keys(16)) * 255).round().int()
    found = []
    for image, result in zip(images_BCHW, batched, strict=True):
        expected = []
        for value in (0.0, 1.0):  # what timm compares with 0.5 to choose the sign
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(auto_augment.random, "random", lambda value=value: value)
                expected.append(torch.from_numpy(np.array(operation(to_pil(image)))).permute(2, 0, 1).int())
        worst = [(result - each).abs().max().item() for each in expected]
        assert min(worst) <= 1
        if (expected[0] - expected[1]).abs().max() > 2:
            found.append(worst.index(min(worst)))
    assert not found or set(found) == {0, 1}


def frequency_of(augment, name, count=4000):
    """The share of black images that a policy of inverting and another operation makes white."""
    white = augment(torch.zeros(count, 3, 4, 4, dtype=torch.uint8), keys(count)).mean((1, 2, 3)) == 1
    return white.double().mean().item()


def test_operations_are_chosen_as_often_as_timm_chooses_them():
    """With p=0.5 and two layers, one of two operations: it is applied once with 2 * 1/4 * 3/4."""
    operations = [auto_augment.AugmentOp(name, 0.5, 9, HPARAMS) for name in ("Invert", "Equalize")]
    augment = BatchAugmentation(composed(auto_augment.RandAugment(operations, num_layers=2)))
    expected = 2 * 1 / 4 * 3 / 4
    assert abs(frequency_of(augment, "Invert") - expected) < 5 * (expected * (1 - expected) / 4000) ** 0.5


@pytest.mark.parametrize("std", [0.5, 4.0, float("inf")])
def test_magnitudes_are_distributed_as_those_of_timm(std):
    """SolarizeAdd shows the magnitude: it is added to black."""
    hparams = HPARAMS | {"magnitude_std": std}
    operation = auto_augment.AugmentOp("SolarizeAdd", prob=1.0, magnitude=6, hparams=hparams)
    augment = BatchAugmentation(composed(auto_augment.RandAugment([operation], num_layers=1)))
    batched = augment(torch.zeros(3000, 3, 1, 1, dtype=torch.uint8), keys(3000))[:, 0, 0, 0] * 255
    black = Image.new("RGB", (1, 1))
    single = torch.tensor([float(operation(black).getpixel((0, 0))[0]) for _ in range(3000)])
    for quantile in (0.02, 0.25, 0.5, 0.75, 0.98):
        assert abs(batched.quantile(quantile) - single.quantile(quantile)) <= (2 if std < 1 else 4)


def test_color_jitter_has_the_range_of_torchvision():
    """Brightness alone: a factor between 0.6 and 1.4 for each image. All three: each image is one of the 6 orders."""
    gray = torch.full((3000, 3, 2, 2), 100, dtype=torch.uint8)
    augment = BatchAugmentation(composed(transforms.ColorJitter(0.4, 0, 0)))
    values = augment(gray, keys(3000))[:, 0, 0, 0] * 255
    assert 59.9 <= values.min() < 61
    assert 138 < values.max() <= 140.1
    assert abs(values.mean() - 99.5) < 2
    assert torch.equal(values, (augment(gray, keys(3000)) * 255).mean((1, 2, 3)).round())


@pytest.mark.parametrize(("probability", "count"), [(1.0, 1), (0.5, 1), (1.0, 3)])
def test_erased_areas_are_distributed_as_those_of_timm(probability, count):
    """The share of erased pixels of 1,500 images: its mean within 5 standard errors, and some quantiles."""
    erasing = RandomErasing(probability, mode="const", max_count=count, device="cpu")
    white = torch.full((1500, 3, 24, 16), 255, dtype=torch.uint8)
    batched = (BatchAugmentation(composed(erasing))(white, keys(1500))[:, 0] == 0).double().mean((1, 2))
    single = torch.stack([(erasing(torch.ones(3, 24, 16))[0] == 0).double().mean() for _ in range(1500)])
    error = (batched.var() / 1500 + single.var() / 1500).sqrt()
    assert abs(batched.mean() - single.mean()) < 5 * error
    for quantile in (0.1, 0.9):
        assert abs(batched.quantile(quantile) - single.quantile(quantile)) < 0.03


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_what_erased_rectangles_are_filled_with(mode):
    erasing = RandomErasing(1.0, mode=mode, device="cpu")
    gray = torch.full((400, 3, 16, 16), 51, dtype=torch.uint8)
    erased = BatchAugmentation(composed(erasing))(gray, keys(400))
    values = [image[:, (image != 0.2).any(0)] for image in erased]
    assert all(each.shape[1] > 0 for each in values)
    distinct = [len(each.unique()) for each in values]
    if mode == "pixel":
        assert distinct == [each.numel() for each in values] or min(distinct) > 3
    else:
        assert set(distinct) == ({3} if mode == "rand" else {1})
    together = torch.cat([each.flatten() if mode == "pixel" else each[:, :1].flatten() for each in values])
    if mode != "const":
        assert abs(together.mean()) < 0.15
        assert abs(together.std() - 1) < 0.1


def test_only_images_that_may_be_erased_are():
    augment = BatchAugmentation(composed(RandomErasing(1.0, device="cpu")))
    white, may_be = torch.full((10, 3, 8, 8), 255, dtype=torch.uint8), torch.arange(10) % 2 == 0
    is_erased = (augment(white, keys(10), may_be) != 1).flatten(1).any(1)
    assert torch.equal(is_erased, may_be)


def test_crops_and_flips_are_all_those_of_torchvision():
    """Each of the 81 positions and both orientations, about equally often."""
    image_CHW = torch.arange(3 * 64).view(3, 8, 8).byte() + 1
    crop = ResizedCrop(transforms.Resize(8), transforms.RandomCrop(8, padding=4, pad_if_needed=True))
    augment = BatchAugmentation(composed(crop, transforms.RandomHorizontalFlip(0.25)))
    batched = (augment(image_CHW.expand(8100, -1, -1, -1), keys(8100)) * 255).round().byte()
    padded = transforms.functional.pad(image_CHW, 4)
    windows = [padded[:, top : top + 8, left : left + 8] for top in range(9) for left in range(9)]
    counts = {}
    for each, number in zip(*batched.unique(dim=0, return_counts=True), strict=True):
        counts[each.numpy().tobytes()] = int(number)
    expected = {flip: [window.flip(2) if flip else window for window in windows] for flip in (False, True)}
    shares = {flip: [counts.pop(each.contiguous().numpy().tobytes()) for each in expected[flip]] for flip in expected}
    assert not counts
    for flip, mean in ((False, 75), (True, 25)):
        assert min(shares[flip]) > mean - 5 * mean**0.5
        assert max(shares[flip]) < mean + 5 * mean**0.5


@pytest.mark.parametrize("policy", ["v0", "augmix-m3", "3a", "rand-m9-tweights", "rand-t3a"])
def test_a_policy_without_a_batched_form_is_refused(policy):
    with pytest.raises(ValueError, match="has no form for many images at once"):
        BatchAugmentation(published(auto_augment=policy))
