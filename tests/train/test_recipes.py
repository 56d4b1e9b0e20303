"""The recipes: the published one is what it says, and every arm of an ablation builds, with the parameters it names."""

import re
from dataclasses import replace
from functools import cache

import pytest
import torch
import tyro

from localvit.models.factory import create_model
from localvit.models.registry import find_model, registered_models
from localvit.train.config import TrainConfig
from localvit.train.settings import RECIPES, read_recipe
from localvit_cli.train import Train

ABLATIONS = sorted(path.stem for path in RECIPES.glob("ablation_*.yaml"))
ARM = re.compile(r"^#   (?P<flags>--\S.*?)  +(?P<parameters>[\d,]+)(?:  (?P<acc1>[\d.]+))?$", re.MULTILINE)


@cache
def config_of(recipe: str, *flags: str) -> TrainConfig:
    return tyro.cli(Train, args=["--recipe", recipe, *flags]).to_config()


def arms(recipe: str) -> list[tuple[list[str], int, str | None]]:
    """Flags, parameters and published accuracy of each arm that the recipe's opening lists."""
    listed = ARM.finditer((RECIPES / f"{recipe}.yaml").read_text())
    return [(arm["flags"].split(), int(arm["parameters"].replace(",", "")), arm["acc1"]) for arm in listed]


ALL_ARMS = [(recipe, *arm) for recipe in ABLATIONS for arm in arms(recipe)]


def test_the_published_recipe_is_what_training_does_by_default():
    assert TrainConfig.of(read_recipe("deit_300")) == TrainConfig(workers=10)


def test_every_table_of_the_paper_has_its_arms():
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
def test_an_arm_differs_in_the_model_alone_and_builds(recipe, flags, parameters, acc1):
    config = config_of(recipe, *flags)
    assert replace(config, model="localvit_tiny", model_args={}) == config_of("deit_300")
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


def test_fine_tuning_starts_low_from_released_weights():
    config = config_of("finetune")
    assert find_model(config.finetune).file
    assert config.model == config.finetune
    assert config.lr * config.batch_size / 512 == pytest.approx(2e-4, rel=1e-12)
    assert config.warmup_lr < 2e-4 / 10
