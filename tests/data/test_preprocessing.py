"""Preprocessing equals the published rule, and can be saved as JSON."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import resolve_data_config
from torchvision import transforms

import localvit
from localvit.data.preprocessing import Preprocessing


@pytest.mark.parametrize("size", [224, 384, 160, 288, 48])
@pytest.mark.parametrize("shape", [(300, 500), (500, 300), (61, 67), (1, 1)])
def test_published_rule(size, shape):
    """Resize the short side to int(256/224 * size), bicubic; center crop; ImageNet's mean and deviation."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    by_hand = transforms.Compose(
        [
            transforms.Resize(int(256 / 224 * size), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    ours = Preprocessing.published((size, size)).transform()(image)
    torch.testing.assert_close(ours, by_hand(image), rtol=0, atol=0)


def test_small_images_are_not_resized():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    normalized = (np.asarray(image) / np.float32(255) - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    ours = Preprocessing.published((32, 32)).transform()(image)
    np.testing.assert_allclose(ours.permute(1, 2, 0), normalized, rtol=1e-5, atol=1e-6)  # float32 against float64


def test_all_published_models_share_the_preprocessing():
    """The published numbers of TNT were not computed with the configuration in timm either."""
    for name in localvit.list_models():
        if name == "localvit_nano_patch4_32":
            continue
        cfg = localvit.create_model(name, device="meta").pretrained_cfg
        assert Preprocessing.from_pretrained_cfg(cfg) == Preprocessing.published((224, 224)), name


def test_a_timm_model_has_timms_preprocessing():
    """A timm model is evaluated with its own configuration."""
    model = localvit.create_model("vit_tiny_patch16_224")
    theirs = resolve_data_config(model.pretrained_cfg)
    ours = Preprocessing.from_pretrained_cfg(model.pretrained_cfg)
    assert (ours.crop_pct, ours.mean, ours.std) == (theirs["crop_pct"], theirs["mean"], theirs["std"])
    assert ours.interpolation == theirs["interpolation"]


def test_json_round_trip():
    preprocessing = Preprocessing(input_size=(31, 37), crop_pct=0.9, crop_mode="squash", mean=(0.5, 0.25, 0.125))
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"input_size": (0, 3)}, "input_size"), ({"crop_pct": 0.0}, "crop_pct"), ({"crop_pct": 1.2}, "crop_pct")],
)
def test_invalid_values(fields, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**fields)
