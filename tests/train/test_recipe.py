"""What a config builds, against the published facts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import RandomResizedCropAndInterpolation
from tiny import tiny_config

import localvit
from localvit.data.pictures import DataError
from localvit.data.preprocessing import Preprocessing
from localvit.train.config import TrainConfig
from localvit.train.recipe import augmentation, build, build_optimizer, build_scheduler, mixing, set_learning_rate

GOLDEN = Path(__file__).parents[1] / "golden"

PLAIN = {"hflip": 0.0, "auto_augment": None, "color_jitter": 0.0, "random_erasing": 0.0}


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("localvit_nano_patch4_32", {"pos_embed", "cls_token"}),
        ("localvit_pvt_tiny", {"cls_token"}),
        ("localvit_tnt_tiny", {"patch_pos", "pixel_pos", "cls_token"}),
        ("localvit_t2t_7", {"cls_token"}),
        ("localvit_swin_tiny", set()),
    ],
)
def test_what_has_no_weight_decay(name, own):
    model = localvit.create_model(name, device="meta")
    optimizer = build_optimizer(TrainConfig(weight_decay=0.07), model)
    decay_of = {parameter: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    named = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert own <= named.keys()
    assert decay_of.keys() == set(named.values())  # each parameter, once
    for key, parameter in named.items():
        free = parameter.ndim <= 1 or key.endswith(".bias") or key in own
        assert decay_of[parameter] == (0.0 if free else 0.07), key
    assert isinstance(optimizer, torch.optim.AdamW)
    assert all(group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8 for group in optimizer.param_groups)


def learning_rates(config, epochs):
    optimizer = build_optimizer(config, torch.nn.Linear(3, 5))
    scheduler = build_scheduler(config, optimizer)
    for epoch in epochs:
        set_learning_rate(scheduler, epoch)
        yield optimizer.param_groups[0]["lr"]


def test_learning_rate_is_the_published_one_in_every_epoch():
    published = json.loads((GOLDEN / "schedule.json").read_text())["learning_rate_by_epoch"]
    config = TrainConfig(batch_size=8 * 128)
    # Equal formulas in float64, in another order of operations at most.
    assert list(learning_rates(config, range(300))) == pytest.approx(published, rel=1e-12, abs=0)
    assert list(learning_rates(config, [211])) == pytest.approx(published[211:212], rel=1e-12, abs=0)


def test_a_small_picture_is_cropped_from_its_padded_self():
    height, width = 28, 31
    pixels = np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)
    transform = augmentation(TrainConfig(**PLAIN), Preprocessing.published((height, width)))
    padded = np.zeros((height + 8, width + 8, 3), dtype=np.float32)
    padded[4:-4, 4:-4] = pixels / 255
    normal = (padded - np.float32(IMAGENET_DEFAULT_MEAN)) / np.float32(IMAGENET_DEFAULT_STD)
    seen = set()
    for seed in range(40):
        torch.manual_seed(seed)
        crop = transform(Image.fromarray(pixels)).numpy().transpose(1, 2, 0)
        assert crop.shape == (height, width, 3)
        # float32 rounding of values up to 3; another crop differs by tenths.
        places = [
            (y, x)
            for y in range(9)
            for x in range(9)
            if np.allclose(normal[y : y + height, x : x + width], crop, atol=1e-5)
        ]
        assert len(places) == 1
        seen |= set(places)
    assert len(seen) > 20  # of 81 places; 40 even draws hit 32 on average


def test_a_picture_of_another_size_is_first_resized_as_for_evaluation():
    preprocessing = Preprocessing.published((32, 32))
    picture = Image.fromarray(np.random.default_rng(7).integers(0, 256, (53, 71, 3), dtype=np.uint8))
    assert augmentation(TrainConfig(**PLAIN), preprocessing)(picture).shape == (3, 32, 32)


def test_a_larger_picture_is_cropped_and_resized():
    transform = augmentation(TrainConfig(), Preprocessing.published((48, 64)))
    picture = Image.fromarray(np.random.default_rng(7).integers(0, 256, (53, 71, 3), dtype=np.uint8))
    assert isinstance(transform.transforms[0], RandomResizedCropAndInterpolation)
    assert transform(picture).shape == (3, 48, 64)


def test_mixed_labels_are_smoothed_probabilities():
    mixup = mixing(TrainConfig(label_smoothing=0.1), num_classes=5)
    _, targets_BM = mixup(torch.randn(6, 3, 16, 16), torch.arange(6) % 5)
    # Rows sum to 1; smoothing spreads 0.1 over 5 classes, so nothing is below 0.02. float32 rounding of the two.
    torch.testing.assert_close(targets_BM.sum(1), torch.ones(6), rtol=0, atol=1e-6)
    assert targets_BM.min().item() == pytest.approx(0.02, abs=1e-6)
    assert mixing(TrainConfig(mixup=0.0, cutmix=0.0), num_classes=5) is None


def test_weights_follow_from_the_seed(tiny_digits, tmp_path):
    def first_weights(seed):
        return build(tiny_config(tiny_digits, tmp_path, seed=seed)).state.model.state_dict()

    once, again, other = first_weights(3), first_weights(3), first_weights(4)
    assert all(torch.equal(once[key], again[key]) for key in once)
    assert not torch.equal(once["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"batch_size": 40}, ValueError, "batch_size=40 is more than the 39 pictures"),
        ({"model": "localvit_nan"}, ValueError, "no model is called 'localvit_nan'"),
        ({"opt": "adamx"}, ValueError, "adamx"),
        ({"device": "gpu"}, ValueError, "torch knows no such device"),
        ({"data_set": "FOLDER", "below": "train"}, DataError, "trained and evaluated on alike"),
        ({"data_set": "IMNET", "below": "nowhere"}, DataError, "no such folder"),
    ],
)
def test_what_cannot_be_built_says_so(tiny_digits, tmp_path, changes, error, words):
    settings = {name: value for name, value in changes.items() if name != "below"}
    with pytest.raises(error, match=words):
        build(tiny_config(tiny_digits / changes.get("below", ""), tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def test_another_run_is_not_written_over(tiny_digits, tmp_path):
    (tmp_path / "log.txt").write_text("{}\n")
    with pytest.raises(FileExistsError, match="holds another run"):
        build(tiny_config(tiny_digits, tmp_path))
