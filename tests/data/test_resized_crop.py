"""A crop of a resized image, computed from the part it depends on, equals resizing the whole image first."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms import ResizeKeepRatio
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from localvit.data import resized_crop
from localvit.data.preprocessing import Preprocessing
from localvit.data.resized_crop import ResizedCrop
from localvit.train.augmentation import augmentation
from localvit.train.config import TrainConfig

MODES = [InterpolationMode.BICUBIC, InterpolationMode.BILINEAR, InterpolationMode.LANCZOS]


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def check(step: ResizedCrop, image: Image.Image, monkeypatch) -> None:
    """At most one in a thousand values may be rounded to the next one: PIL stores positions in float32."""
    expected = np.asarray(step.crop(step.resize(image))).astype(int)
    monkeypatch.setattr(resized_crop, "LARGEST", 0)
    result = np.asarray(step(image)).astype(int)
    monkeypatch.undo()
    assert result.shape == expected.shape
    difference = np.abs(result - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(701, 3), (3, 701), (401, 307), (61, 53), (1, 1), (997, 31)])
def test_center_crops(mode, shape, monkeypatch):
    check(ResizedCrop(transforms.Resize(59, mode), transforms.CenterCrop((53, 47))), noise(*shape), monkeypatch)
    if mode is InterpolationMode.BICUBIC:
        resize = ResizeKeepRatio((59, 67), interpolation="bicubic")
        check(ResizedCrop(resize, transforms.CenterCrop((53, 61))), noise(*shape), monkeypatch)


@pytest.mark.parametrize("shape", [(701, 3), (3, 701), (61, 53)])
@pytest.mark.parametrize("size", [(31, 31), (31, 17), (17, 31)])
def test_random_crops_at_the_same_position(shape, size, monkeypatch):
    """Also where the crop reaches into the padding, which is black."""
    step = ResizedCrop(transforms.Resize(min(size), MODES[0]), transforms.RandomCrop(size, 4, pad_if_needed=True))
    for seed in range(5):
        torch.manual_seed(seed)
        expected = np.asarray(step.crop(step.resize(noise(*shape)))).astype(int)
        after = torch.rand(1)
        torch.manual_seed(seed)
        with monkeypatch.context() as patch:
            patch.setattr(resized_crop, "LARGEST", 0)
            result = np.asarray(step(noise(*shape))).astype(int)
        assert torch.equal(torch.rand(1), after)
        assert np.abs(result - expected).max() <= 1


def test_a_very_long_image_equals_its_middle():
    """Resized as a whole it would have 3.9 billion pixels. Its middle, of 200 pixels, is resized in the same phase."""
    image = noise(60000, 1)
    middle = image.crop((29900, 0, 30100, 1))
    transform = Preprocessing(input_size=(224, 224)).transform()
    torch.testing.assert_close(transform(image), transform(middle), rtol=0, atol=0)
    tall = noise(60000, 1).transpose(Image.Transpose.TRANSPOSE)
    torch.testing.assert_close(transform(tall), transform(middle).mT, rtol=0, atol=1.01 / 255 / 0.224)


def test_training_on_a_very_long_image():
    """Both rules of augmentation."""
    for size in (224, 32):
        config = TrainConfig(data_set="DIGITS", auto_augment=None)
        tensor = augmentation(config, Preprocessing(input_size=(size, size)), 0.0)(noise(3_000_000, 1))
        assert tensor.shape == (3, size, size)
        assert torch.isfinite(tensor).all()
