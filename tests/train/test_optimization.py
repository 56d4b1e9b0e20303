"""What moves the weights: groups, layers, frozen parameters, and schedules, against closed forms."""

import math

import pytest
import torch
from tiny import skip_without_plateau
from torch import nn

import localvit
from localvit.train.config import TrainConfig
from localvit.train.optimization import build_optimizer, build_scheduler, freeze, set_learning_rate


def rates(steps_per_epoch=7, epochs=range(13), acc1=lambda epoch: None, **settings):
    """The learning rate of each epoch, or of each step where it moves every step; the highest is 1."""
    config = TrainConfig(**{"epochs": 13, "lr": 1.0, "min_lr": 0.125, "warmup_lr": 0.25} | settings)
    optimizer = build_optimizer(config, nn.Linear(3, 5), 512)
    scheduler = build_scheduler(config, optimizer, steps_per_epoch)
    found = []
    for epoch in epochs:
        set_learning_rate(scheduler, epoch, acc1(epoch - 1))
        if not config.sched_on_updates:
            found.append(optimizer.param_groups[0]["lr"])
            continue
        for step in range(steps_per_epoch):
            scheduler.step_update(epoch * steps_per_epoch + step)
            found.append(optimizer.param_groups[0]["lr"])
    return found


def test_a_learning_rate_that_changes_every_step():
    """Half an epoch of rising, then the cosine over all steps."""
    found = rates(sched_on_updates=True, warmup_epochs=2.5)
    warm = 2.5 * 7
    for step, lr in enumerate(found):
        cosine = 0.125 + 0.5 * (1 - 0.125) * (1 + math.cos(math.pi * step / (13 * 7)))
        assert lr == pytest.approx(0.25 + 0.75 * step / warm if step < warm else cosine, rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({"sched": "step", "decay_epochs": 3, "decay_rate": 0.5}, lambda t: 0.5 ** (t // 3)),
        ({"sched": "multistep", "decay_milestones": (4, 9), "decay_rate": 0.5}, lambda t: 0.5 ** ((t >= 3) + (t >= 8))),
        ({"sched": "poly", "decay_rate": 2.0}, lambda t: 0.125 + 0.875 * (1 - t / 13) ** 2),
    ],
)
def test_families_of_schedules(settings, rate):
    """By the epoch before, as published: the schedule first moves after two epochs."""
    found = rates(warmup_epochs=0, **settings)
    assert found == pytest.approx([rate(max(epoch - 1, 0)) for epoch in range(13)], rel=1e-12)


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler")  # timm saves not all of its state; we play it back
def test_a_plateau_schedule_decays_without_progress():
    """It rises for two epochs, then stands: after a patience of 2 epochs without a better one the rate falls."""
    skip_without_plateau()
    found = rates(
        sched="plateau",
        warmup_epochs=0,
        patience_epochs=2,
        decay_rate=0.5,
        acc1=lambda epoch: None if epoch < 0 else min(epoch, 2) * 10.0 + 1,
    )
    falls = [epoch for epoch in range(1, 13) if found[epoch] < found[epoch - 1]]
    assert falls
    assert found[falls[0]] == 0.5
    assert falls[0] == 6  # best after epoch 2, known at 3; 4 and 5 are within the patience


def test_noise_of_the_learning_rate_depends_on_the_seed():
    quiet, noisy, again, other = (
        rates(warmup_epochs=0, **settings)
        for settings in ({}, *({"lr_noise": (0.25, 0.75), "seed": seed} for seed in (3, 3, 4)))
    )
    assert noisy == again
    assert noisy != other
    moved = [epoch for epoch in range(13) if noisy[epoch] != quiet[epoch]]
    assert moved
    assert all(0.25 * 13 <= epoch - 1 < 0.75 * 13 for epoch in moved)
    assert all(abs(noisy[epoch] / quiet[epoch] - 1) <= 0.67 for epoch in moved)


def test_layer_decay():
    model = localvit.create_model("localvit_nano_patch4_32", num_classes=5)
    optimizer = build_optimizer(TrainConfig(layer_decay=0.5), model, 512)
    scale_of = {parameter: group["lr_scale"] for group in optimizer.param_groups for parameter in group["params"]}
    assert scale_of.keys() == set(model.parameters())
    # Six blocks: head and last norm 1, block 5 a half, ..., block 0 and the embeddings below it.
    for name, exponent in (("head.weight", 0), ("blocks.5.attn.qkv.weight", 1), ("blocks.0.attn.qkv.weight", 6)):
        assert scale_of[model.get_parameter(name)] == 0.5**exponent
    assert scale_of[model.pos_embed] == 0.5**7


@pytest.mark.parametrize("settings", [{}, {"layer_decay": 0.5}, {"sched_on_updates": True}])
def test_locality_lr_scale(settings):
    model = localvit.localize(localvit.create_model("vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=3))
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = []
    for factor in (1.0, 7.0):
        config = TrainConfig(locality_lr_scale=factor, **{"epochs": 13, "lr": 1.0} | settings)
        optimizer = build_optimizer(config, model, 512)
        scheduler = build_scheduler(config, optimizer, steps_per_epoch=5)
        for epoch in range(9):
            set_learning_rate(scheduler, epoch)
        scheduler.step_update(8 * 5 + 3)
        groups = optimizer.param_groups
        assert sum(len(group["params"]) for group in groups) == len(names)
        found.append(
            {names[each]: (group["lr"], group["weight_decay"]) for group in groups for each in group["params"]}
        )
    once, scaled = found
    for name, (lr, weight_decay) in once.items():
        factor = 7.0 if ".locality." in name else 1.0
        assert scaled[name] == (pytest.approx(factor * lr, rel=1e-12), weight_decay)


def test_locality_lr_scale_without_locality_is_refused():
    with pytest.raises(ValueError, match=r"locality_lr_scale=3.0 has no effect: Linear has no locality"):
        build_optimizer(TrainConfig(locality_lr_scale=3.0), nn.Linear(3, 5), 512)


def test_frozen_parameters_are_not_in_the_optimizer():
    model = localvit.create_model("localvit_nano_patch4_32", num_classes=5)
    freeze(model, ("blocks.[0-3].*", "pos_embed"))
    optimizer = build_optimizer(TrainConfig(), model, 512)
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    frozen = {name for name, parameter in model.named_parameters() if parameter not in trained}
    first_blocks = ("blocks.0.", "blocks.1.", "blocks.2.", "blocks.3.")
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith((*first_blocks, "pos_embed"))}


@pytest.mark.parametrize(
    ("patterns", "words"), [(("block.*",), "freeze=block.* matches no parameter"), (("*",), "freezes all parameters")]
)
def test_freezing_nothing_or_everything_is_refused(patterns, words):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (the words below)
        freeze(nn.Linear(3, 5), patterns)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"opt": "sgd", "momentum": 0.7}, {"momentum": 0.7, "nesterov": True}),
        (
            {"opt_betas": (0.8, 0.95), "opt_eps": 1e-6},
            {"betas": (0.8, 0.95), "eps": 1e-6, "fused": True},
        ),
        ({"opt": "lamb"}, {"eps": 1e-8}),
    ],
)
def test_optimizers_take_their_settings(settings, expected):
    group = build_optimizer(TrainConfig(**settings), nn.Linear(3, 5), 256).param_groups[0]
    assert expected.items() <= group.items()
    assert group["lr"] == 5e-4 * 256 / 512


def test_fused_adamw_is_adamw():
    """Against torch's plain loop in float64."""
    torch.manual_seed(3)
    ours, plain = nn.Linear(7, 5).double(), nn.Linear(7, 5).double()
    plain.load_state_dict(ours.state_dict())
    config = TrainConfig(lr=0.01)
    optimizers = [
        build_optimizer(config, ours, 512),
        torch.optim.AdamW(
            [{"params": [plain.bias], "weight_decay": 0.0}, {"params": [plain.weight]}],
            lr=0.01,
            weight_decay=0.05,
            foreach=False,
        ),
    ]
    for _ in range(5):
        x = torch.randn(3, 7, dtype=torch.float64)
        for model, optimizer in zip((ours, plain), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, plain.weight, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours.bias, plain.bias, rtol=1e-12, atol=1e-14)
