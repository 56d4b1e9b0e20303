"""The recipes: their settings, and the arms of the ablations with their numbers of parameters."""

import re
from functools import cache

import pytest
import torch

from localvit.models.factory import create_model
from localvit.models.registry import find_model, registered_models
from localvit.train.config import TrainConfig
from localvit.train.recipe import RECIPES, read_recipe, recipe_names
from localvit_cli.train import parse

ABLATIONS = sorted(path.stem for path in RECIPES.glob("ablation_*.yaml"))
ARM = re.compile(r"^#   (?P<flags>--\S.*?)  +(?P<parameters>[\d,]+)(?:  (?P<acc1>[\d.]+))?$", re.MULTILINE)


@cache
def config_of(recipe: str, *flags: str) -> TrainConfig:
    return parse(["--recipe", recipe, *flags]).to_config()


def arms(recipe: str) -> list[tuple[list[str], int, str | None]]:
    """Flags, parameters and published accuracy of each arm in the comments of the recipe."""
    listed = ARM.finditer((RECIPES / f"{recipe}.yaml").read_text())
    return [(arm["flags"].split(), int(arm["parameters"].replace(",", "")), arm["acc1"]) for arm in listed]


ALL_ARMS = [(recipe, *arm) for recipe in ABLATIONS for arm in arms(recipe)]


PUBLISHED = {
    "model": "localvit_tiny",
    "drop_path_rate": 0.1,
    "data_set": "IMNET",
    "epochs": 300,
    "batch_size": 128,
    "opt": "adamw",
    "opt_eps": 1e-8,
    "lr": 5e-4,
    "weight_decay": 0.05,
    "sched": "cosine",
    "warmup_epochs": 5,
    "warmup_lr": 1e-6,
    "min_lr": 1e-5,
    "ema_decay": 0.99996,
    "label_smoothing": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "mixup_switch_prob": 0.5,
    "repeated_aug": True,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "interpolation": "bicubic",
    "random_erasing": 0.25,
    "random_erasing_mode": "pixel",
}
"""The published recipe (arXiv 2104.05707, section 4.1; arXiv 2012.12877, table 9)."""
OFF = {"ema_decay": None, "mixup": 0.0, "cutmix": 0.0, "repeated_aug": False, "random_erasing": 0.0}
SMALL = OFF | {"model": "localvit_nano_patch4_32", "drop_path_rate": 0.0, "auto_augment": None, "color_jitter": 0.0}
DIFFERENCES = {
    "deit_300": {"workers": 10},
    **{recipe: {"workers": 10} for recipe in ABLATIONS},
    "cifar10": {"model": "localvit_nano_patch4_32", "drop_path_rate": 0.0, "data_set": "FOLDER", "cache": True}
    | {"epochs": 100, "batch_size": 512, "lr": 0.003, "clip_grad": 1.0, "sched_on_updates": True}
    | {"warmup_lr": 1e-5, "ema_decay": 0.998, "auto_augment": "rand-m7-mstd0.5-inc1", "random_erasing": 0.2}
    | {"repeated_aug": False, "mixup": 0.0, "mixup_prob": 0.3},
    "digits": SMALL
    | {"data_set": "DIGITS", "epochs": 10, "batch_size": 64, "lr": 0.008, "warmup_epochs": 1, "warmup_lr": 5e-4}
    | {"hflip": 0.0, "workers": 1},
    "finetune": {"ema_decay": None, "repeated_aug": False, "random_erasing": 0.0, "finetune": "localvit_tiny"}
    | {"drop_path_rate": 0.0, "data_set": "FOLDER", "epochs": 30, "batch_size": 64, "lr": 0.0016}
    | {"sched_on_updates": True, "warmup_epochs": 1, "warmup_lr": 1e-6, "min_lr": 1e-6},
    "small_images_32": SMALL
    | {"epochs": 10, "batch_size": 128, "lr": 0.004, "sched_on_updates": True, "warmup_epochs": 0.5}
    | {"warmup_lr": 1e-5, "min_lr": 1e-5, "workers": 1},
}
"""The settings of each recipe that differ from the published recipe."""


@pytest.mark.parametrize("recipe", recipe_names())
def test_settings_of_the_recipes(recipe):
    settings = TrainConfig(**read_recipe(recipe)).to_dict()
    expected = PUBLISHED | DIFFERENCES[recipe]
    assert {name: settings[name] for name in expected} == expected
    defaults = TrainConfig().to_dict()
    assert {name for name, value in settings.items() if value != defaults[name]} <= DIFFERENCES[recipe].keys()


@pytest.mark.parametrize("recipe", recipe_names())
def test_recipes_contain_only_differences_from_the_defaults(recipe):
    defaults = TrainConfig().to_dict()
    assert [name for name, value in read_recipe(recipe).items() if value == defaults[name]] == []


def test_the_ablations_have_all_arms():
    assert {recipe: len(arms(recipe)) for recipe in ABLATIONS} == {
        "ablation_activation": 5,
        "ablation_depthwise": 18,
        "ablation_expand_ratio": 5,
        "ablation_placement": 6,
        "ablation_reduction": 4,
    }


@pytest.mark.parametrize(
    ("recipe", "flags", "parameters", "acc1"), ALL_ARMS, ids=[" ".join([arm[0], *arm[1]]) for arm in ALL_ARMS]
)
def test_arms_differ_only_in_the_model_and_have_the_stated_parameters(recipe, flags, parameters, acc1):
    config = config_of(recipe, *flags)
    assert config.model_copy(update={"model": "localvit_tiny", "model_args": {}}) == config_of("deit_300")
    with torch.device("meta"):
        model = create_model(config.model, drop_path_rate=config.drop_path_rate, **config.model_args)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    known = find_model(config.model)
    if known and not config.model_args:
        assert parameters == known.parameters
        assert bool(acc1) == bool(known.acc1)
    if acc1:
        assert (parameters, float(acc1)) in {(released.parameters, released.acc1) for released in registered_models()}


def parameters_of_localvit_tiny(
    *, local: int = 12, expand_ratio: int = 4, reduction: int = 192, gate: str = "se", depthwise: bool = True
) -> int:
    """Parameters counted by hand: width 192, depth 12, patches of 16, 1,000 classes."""
    width, hidden = 192, 192 * expand_ratio
    bottleneck = hidden // reduction
    gates = {
        "none": 0,
        "eca": 5,  # the kernel over 768 channels: (log2(768) + 1) / 2 = 5.3
        "se": hidden * bottleneck + bottleneck + bottleneck * hidden + hidden,
    }
    locality = width * hidden + 2 * hidden + (9 + 2) * hidden * depthwise + gates[gate] + hidden * width + 2 * width
    ordinary = 2 * width + width * 4 * width + 4 * width + 4 * width * width + width
    attention = 2 * width + width * 3 * width + 3 * width + width * width + width
    outside = 3 * 16 * 16 * width + width + width + 197 * width + 2 * width + width * 1000 + 1000
    return outside + 12 * attention + local * locality + (12 - local) * ordinary


COUNTED = {
    "act=relu6": {"gate": "none"},
    "act=hs": {"gate": "none"},
    "act=hs+eca": {"gate": "eca"},
    "act=hs+ecah": {"gate": "eca"},
    "act=hs+se": {},
    "local_blocks=[]": {"local": 0},
    "local_blocks=1-4": {"local": 4},
    "local_blocks=5-8": {"local": 4},
    "local_blocks=9-12": {"local": 4},
    "local_blocks=1-8": {"local": 8},
    "local_blocks=1-12": {},
    **{f"reduction={number}": {"reduction": number} for number in (4, 48, 96, 192)},
    **{f"expand_ratio={number}": {"expand_ratio": number} for number in (1, 2, 3, 4, 6)},
}


def test_arms_of_localvit_tiny_are_counted_by_hand():
    listed = {flags[1]: parameters for _, flags, parameters, _ in ALL_ARMS if flags[0] == "--model-args"}
    assert listed == {arm: parameters_of_localvit_tiny(**changes) for arm, changes in COUNTED.items()}


HIDDEN = {
    "localvit_tiny": 12 * 4 * 192,
    "localvit_tiny_mlp6_act1": 12 * 6 * 192,
    "localvit_pvt_tiny": 2 * (8 * 64 + 8 * 128 + 4 * 320 + 4 * 512),
    "localvit_tnt_tiny": 12 * 4 * 192,
    "localvit_swin_tiny": 4 * (2 * 96 + 2 * 192 + 6 * 384 + 2 * 768),
    "localvit_t2t_7": 7 * 2 * 256 + 2 * 64,
}
"""Hidden channels of all locality modules of a network: depths, expansion ratios and widths by the networks' papers."""


@pytest.mark.parametrize(("name", "hidden"), HIDDEN.items())
def test_the_control_lacks_a_3x3_kernel_and_a_norm_for_each_hidden_channel(name, hidden):
    listed = {
        tuple(flags[1:]): parameters for recipe, flags, parameters, _ in ALL_ARMS if recipe == "ablation_depthwise"
    }
    assert listed[name,] - listed[name, "--model-args", "depthwise=false"] == (9 + 2) * hidden


def test_fine_tuning_starts_from_released_weights_with_a_low_learning_rate():
    config = config_of("finetune")
    assert find_model(config.finetune).file
    assert config.model == config.finetune
    assert config.lr * config.batch_size / 512 == pytest.approx(2e-4, rel=1e-12)
    assert config.warmup_lr < 2e-4 / 10
