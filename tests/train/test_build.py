"""Building a run: optimizer, schedule and augmentation against the published ones, weights, and errors."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import RandomResizedCropAndInterpolation
from tiny import STILL, tiny_config

import localvit
import localvit.train
from localvit.data.images import DataError
from localvit.data.preprocessing import Preprocessing
from localvit.train.augmentation import augmentation, build_mixup
from localvit.train.builder import build
from localvit.train.config import TrainConfig
from localvit.train.loop import fit
from localvit.train.optimization import build_optimizer, build_scheduler, set_learning_rate

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
def test_parameters_without_weight_decay(name, own):
    model = localvit.create_model(name, device="meta")
    optimizer = build_optimizer(TrainConfig(weight_decay=0.07), model, 512)
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
    optimizer = build_optimizer(config, torch.nn.Linear(3, 5), 8 * 128)
    scheduler = build_scheduler(config, optimizer, steps_per_epoch=7)
    for epoch in epochs:
        set_learning_rate(scheduler, epoch)
        yield optimizer.param_groups[0]["lr"]


def test_learning_rate_is_as_published_in_every_epoch():
    published = json.loads((GOLDEN / "schedule.json").read_text())["learning_rate_by_epoch"]
    config = TrainConfig()
    # Equal formulas in float64, in another order of operations at most.
    assert list(learning_rates(config, range(300))) == pytest.approx(published, rel=1e-12, abs=0)
    assert list(learning_rates(config, [211])) == pytest.approx(published[211:212], rel=1e-12, abs=0)


def test_small_images_are_padded_and_cropped():
    height, width = 28, 31
    pixels = np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)
    transform = augmentation(TrainConfig(**PLAIN), Preprocessing.published((height, width)), 0.0)
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
    assert len(seen) > 20  # of 81 places; 40 uniform samples hit 32 different ones on average


def test_images_of_another_size_are_first_resized():
    preprocessing = Preprocessing.published((32, 32))
    image = Image.fromarray(np.random.default_rng(7).integers(0, 256, (53, 71, 3), dtype=np.uint8))
    assert augmentation(TrainConfig(**PLAIN), preprocessing, 0.0)(image).shape == (3, 32, 32)


def test_larger_images_are_cropped_and_resized():
    transform = augmentation(TrainConfig(), Preprocessing.published((48, 64)), 0.25)
    image = Image.fromarray(np.random.default_rng(7).integers(0, 256, (53, 71, 3), dtype=np.uint8))
    assert isinstance(transform.transforms[0], RandomResizedCropAndInterpolation)
    assert transform(image).shape == (3, 48, 64)


def test_posterizing_to_0_bits_is_black():
    """As in Pillow before version 13, which raises an error. The published policy uses it now and then."""
    transform = augmentation(
        TrainConfig(auto_augment="rand-m10-n9-mstd0-inc1", hflip=0.0), Preprocessing.published((48, 64)), 0.0
    )
    operations = [op for step in transform.transforms for op in getattr(step, "ops", ())]
    (posterize,) = (op for op in operations if op.name == "PosterizeIncreasing")
    image = Image.fromarray(np.random.default_rng(7).integers(0, 256, (53, 71, 3), dtype=np.uint8))
    for level, kept in ((0.0, 4), (5.0, 2), (10.0, 0)):
        posterize.prob, posterize.magnitude = 1.0, level
        expected = np.asarray(image) & ~np.uint8(2 ** (8 - kept) - 1)
        assert np.array_equal(np.asarray(posterize(image)), expected)


def test_mixed_labels_are_smoothed_probabilities():
    mixup = build_mixup(TrainConfig(label_smoothing=0.1), num_classes=5)
    _, targets_BM = mixup(torch.randn(6, 3, 16, 16), torch.arange(6) % 5)
    # Rows sum to 1; smoothing spreads 0.1 over 5 classes, so nothing is below 0.02. float32 rounding of the two.
    torch.testing.assert_close(targets_BM.sum(1), torch.ones(6), rtol=0, atol=1e-6)
    assert targets_BM.min().item() == pytest.approx(0.02, abs=1e-6)
    assert build_mixup(TrainConfig(mixup=0.0, cutmix=0.0), num_classes=5) is None


def test_weights_follow_from_the_seed(tiny_digits, tmp_path):
    def first_weights(seed):
        return build(tiny_config(tiny_digits, tmp_path, seed=seed)).state.model.state_dict()

    once, again, other = first_weights(3), first_weights(3), first_weights(4)
    assert all(torch.equal(once[key], again[key]) for key in once)
    assert not torch.equal(once["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"batch_size": 40}, ValueError, "batch_size=40 is more than the 39 images"),
        ({"model": "localvit_nan"}, ValueError, "localvit_nan"),
        ({"opt": "adamx"}, ValueError, "adamx"),
        ({"device": "gpu"}, ValueError, "torch does not know this device"),
        ({"data_set": "IMNET-A", "below": "train"}, DataError, "used for both training and evaluation"),
        ({"data_set": "IMNET", "below": "nowhere"}, DataError, "no such folder"),
    ],
)
def test_errors_name_the_cause_and_create_no_folder(tiny_digits, tmp_path, changes, error, words):
    settings = {name: value for name, value in changes.items() if name != "below"}
    with pytest.raises(error, match=words):
        build(tiny_config(tiny_digits / changes.get("below", ""), tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def test_a_warm_up_that_takes_the_whole_run_is_a_warning(tiny_digits, tmp_path, caplog):
    build(tiny_config(tiny_digits, tmp_path, epochs=2, warmup_epochs=2))
    assert any("the run has 2 epochs, and the warm-up takes 2" in line for line in caplog.messages)


def test_a_convolutional_network_takes_any_size(tiny_digits, tmp_path):
    training = build(tiny_config(tiny_digits, tmp_path, model="resnet10t", input_size=(28, 36)))
    assert training.preprocessing.input_size == (28, 36)
    assert "img_size" not in training.state.model.made_from["args"]


def test_another_run_is_not_overwritten(tiny_digits, tmp_path):
    (tmp_path / "log.txt").write_text("{}\n")
    with pytest.raises(FileExistsError, match="files of a run but no checkpoint"):
        build(tiny_config(tiny_digits, tmp_path))


@pytest.mark.parametrize("below", ["", "train"])
def test_a_folder_without_val_is_split(tiny_digits, tmp_path, caplog, below):
    shutil.copytree(tiny_digits / "train", tmp_path / "digits" / below, dirs_exist_ok=True)
    config = tiny_config(tmp_path / "digits", tmp_path / "run", data_set="FOLDER", seed=5)
    training = build(config)
    train_images, val_images = training.batches.images.images, training.val_images
    names = [[images.name(index) for index in range(len(images))] for images in (train_images, val_images)]
    assert [val_images.labels.count(label) for label in range(3)] == [2, 2, 2]  # 15 % of 13, rounded
    assert len(set(names[0]) | set(names[1])) == 39 == len(names[0]) + len(names[1])
    assert any("6 of its 39 images, selected with seed 5" in line for line in caplog.messages)


def test_fine_tuning_uses_the_normalization_of_the_weights(tiny_digits, tmp_path):
    """timm's ViT-Ti was trained with mean and deviation 0.5; from scratch it uses ImageNet's, as published."""
    own = {"model": "vit_tiny_patch16_224", "input_size": (32,)}
    localvit.save_checkpoint(localvit.create_model(own["model"], num_classes=5), tmp_path / "five.safetensors")
    fresh = build(tiny_config(tiny_digits, tmp_path / "run", **own)).preprocessing
    tuned = build(tiny_config(tiny_digits, tmp_path / "run", **own, finetune=str(tmp_path / "five.safetensors")))
    assert (fresh.mean, fresh.std) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert (tuned.preprocessing.mean, tuned.preprocessing.std) == ((0.5,) * 3, (0.5,) * 3)
    transform = tuned.batches.images.repeated.transform
    assert [step.mean.tolist() for step in transform.transforms if hasattr(step, "mean")] == [[0.5] * 3]


def test_a_custom_loss_is_minimized(tiny_digits, tmp_path):
    """The first loss is that of torch's margin loss in float64, on the same batch with the same weights."""
    settings = {"epochs": 1, "warmup_epochs": 0, "batch_size": 20, "drop_path_rate": 0.0, **STILL}
    training = build(tiny_config(tiny_digits, tmp_path / "run", **settings), criterion=torch.nn.MultiMarginLoss())
    fit(training)
    fresh = build(tiny_config(tiny_digits, tmp_path / "fresh", **settings))
    ((images_BCHW, labels_B),) = fresh.batches.epoch(0)
    logits_BM = fresh.state.model.double().train()(images_BCHW.double())
    expected = torch.nn.functional.multi_margin_loss(logits_BM, labels_B).item()
    # float32 training against float64
    assert training.state.rows[0]["train_loss"] == pytest.approx(expected, rel=1e-4)


def test_a_run_in_python_prints_what_it_is_and_its_result(tiny_digits, tmp_path):
    # 731,074 parameters with 10 classes, and 97 per class of the head.
    training = localvit.train.build(tiny_config(tiny_digits, tmp_path, epochs=2, model_args={}))
    assert str(training).splitlines() == [
        "localvit_nano_patch4_32: 730,395 trained parameters, images of 32 x 32 pixels",
        "DIGITS: 39 training images, 9 validation images",
        "2 epochs of 2 steps with 14 images, on cpu in float32",
    ]
    result = localvit.train.fit(training)
    rows = training.state.rows
    assert (result.num_epochs, result.last) == (2, result.last | rows[1])
    lines = dict(line.split("  ", 1) for line in str(result).splitlines() if line[:1].strip())
    best = 1 + (rows[1]["test_acc1"] > rows[0]["test_acc1"])
    assert lines["best epoch"].strip().startswith(f"{best}: Acc@1 {rows[best - 1]['test_acc1']:.3f} %")
    assert lines["last epoch"].strip().startswith("2: ")
    assert lines["speed"].endswith("images/s")
