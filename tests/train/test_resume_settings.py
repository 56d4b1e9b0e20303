"""Every setting on resume: it takes effect, or it is refused, and nothing is reported that is not so."""

import json

import pytest
import torch
from tiny import STILL, tiny_config

import localvit
from localvit.models.published_names import published_key
from localvit.train.builder import build
from localvit.train.config import TrainConfig
from localvit.train.loop import fit
from localvit.train.resume import FIXED
from localvit.train.run_folder import STATE, read_state
from localvit.train.step import train_step
from localvit.utils.weight_files import CheckpointError

REFUSED = {
    "inat_category": "order",
    "val_fraction": 0.4,
    "model": "localvit_small_patch16_224",
    "model_args": {"depth": 3},
    "localize": {"kernel_size": 5},
    "finetune": "other.safetensors",
    "freeze": ("pos_embed",),
    "opt": "lamb",
    "seed": 5,
    "input_size": (16,),
}
"""Another value of each setting that cannot change."""
MOVES = {
    "epochs": ({}, 9),
    "batch_size": ({}, 6),
    "grad_accum": ({}, 2),
    "opt_eps": ({}, 0.5),
    "opt_betas": ({}, (0.5, 0.6)),
    "momentum": ({"opt": "momentum"}, 0.2),
    "lr": ({}, 0.3),
    "layer_decay": ({}, 0.5),
    "locality_lr_scale": ({}, 7.0),
    "weight_decay": ({}, 0.9),
    "clip_grad": ({"opt": "momentum"}, 0.01),
    "ema_decay": ({}, 0.1),
    "sched": ({}, "poly"),
    "sched_on_updates": ({}, True),
    "warmup_epochs": ({}, 4),
    "warmup_lr": ({"warmup_epochs": 4}, 0.1),
    "min_lr": ({}, 0.01),
    "decay_epochs": ({"sched": "step"}, 1.0),
    "decay_milestones": ({"sched": "multistep"}, (1, 2)),
    "decay_rate": ({"sched": "step", "decay_epochs": 1.0}, 0.7),
    "lr_noise": ({}, (0.0, 1.0)),
    "lr_noise_pct": ({"lr_noise": (0.0, 1.0)}, 0.01),
    "lr_noise_std": ({"lr_noise": (0.0, 1.0)}, 0.1),
    "drop_rate": ({}, 0.5),
    "drop_path_rate": ({"model_args": {"depth": 2}}, 0.7),
    "cache": ({}, True),
    "hflip": ({}, 1.0),
    "auto_augment": ({}, "rand-m9-mstd0.5-inc1"),
    "color_jitter": ({}, 0.9),
    "random_erasing": ({}, 1.0),
    "random_erasing_mode": ({"random_erasing": 1.0}, "const"),
    "random_erasing_count": ({"random_erasing": 1.0}, 7),
    "repeated_aug": ({}, True),
    "resplit": ({"random_erasing": 1.0, "repeated_aug": True}, True),
    "mixup": ({}, 0.8),
    "cutmix": ({}, 1.0),
    "cutmix_minmax": ({}, (0.3, 0.9)),
    "mixup_prob": ({"mixup": 0.8}, 0.0),
    "mixup_switch_prob": ({"mixup": 0.8, "cutmix": 1.0}, 1.0),
    "mixup_mode": ({"mixup": 0.8}, "elem"),
    "label_smoothing": ({}, 0.3),
    "dtype": ({}, "bfloat16"),
}
"""Settings that change the weights: those of the run, and another value."""
OTHER = {
    "how the same images are found": ("data_set", "data_path"),
    "the same numbers, computed in another way": (
        "workers",
        "device",
        "compile",
        "cuda_graph",
        "channels_last",
        "ema_on_cpu",
    ),
    "the same numbers in one process, up to rounding": ("grad_checkpointing", "sync_bn"),
    "not a setting of the images that can be read": ("skip_unreadable",),
    "files and when the run ends": ("output_dir", "checkpoint_steps", "keep", "tensorboard", "wandb"),
    "read in each epoch by the loop": ("early_stopping", "nonfinite"),
    "needs a longer run: test_a_plateau_schedule": ("patience_epochs",),
    "only above 32 pixels": ("interpolation",),
    "read by the loss, which is built as for a new run": (
        *("class_weights", "distillation", "teacher", "teacher_checkpoint", "distillation_alpha", "distillation_tau"),
    ),
}
"""Settings that do not change the weights in this test, by the reason."""


def test_each_setting_is_classified():
    """A new setting must be added to one of the tables."""
    others = [name for names in OTHER.values() for name in names]
    assert sorted([*REFUSED, *MOVES, *others]) == sorted(TrainConfig.model_fields)
    assert sorted(REFUSED) == sorted(FIXED)


SMALL = {
    **STILL,
    **{"input_size": (8,), "batch_size": 12, "model_args": {"depth": 1}, "drop_path_rate": 0.0},
    **{"epochs": 4, "warmup_epochs": 0},
}
_states = {}


def interrupted(tiny_digits, tmp_path_factory, **settings):
    """A state after one of three steps of the third epoch, and its settings."""
    key = json.dumps(settings, sort_keys=True)
    if key not in _states:
        folder = tmp_path_factory.mktemp("interrupted")
        training = build(tiny_config(tiny_digits, folder, **SMALL | settings))
        steps(training, 1)
        for epoch in range(2):
            training.state.finish_epoch({"epoch": epoch, "test_acc1": 50.0}, {})
        steps(training, 1)
        torch.save(training.state.to_entries(training.describe()), folder / STATE)
        _states[key] = folder / STATE
    return _states[key], SMALL | settings


def steps(training, count):
    state = training.state
    if state.step == 0:
        state.begin_epoch()
    batches = training.device_batches(state.epoch, state.step * training.config.grad_accum)
    for _ in range(count):
        if training.config.sched_on_updates:
            state.scheduler.step_update(state.epoch * training.steps_per_epoch + state.step)
        train_step(training, batches, stop=False)
        state.step += 1


def after_a_step(training):
    """Weights, average and rate after a step of the present epoch and one of the next."""
    steps(training, 1)
    training.state.finish_epoch({"epoch": 2, "test_acc1": 50.0}, {})
    steps(training, 1)
    tensors = [*training.state.model.state_dict().values(), *training.state.ema.module.state_dict().values()]
    return [each.clone() for each in tensors]


_unchanged = {}


@pytest.mark.parametrize("name", MOVES)
def test_a_setting_takes_effect(tiny_digits, tmp_path, tmp_path_factory, name):
    base, value = MOVES[name]
    state, settings = interrupted(tiny_digits, tmp_path_factory, **base)
    if state not in _unchanged:
        _unchanged[state] = after_a_step(build(tiny_config(tiny_digits, tmp_path, **settings), resume=str(state)))
    config = tiny_config(tiny_digits, tmp_path, **settings | {name: value})
    if name in ("batch_size", "grad_accum"):  # refused within an epoch
        with pytest.raises(CheckpointError, match="images per step"):
            build(config, resume=str(state))
        return
    changed = after_a_step(build(config, resume=str(state)))
    assert not all(map(torch.equal, changed, _unchanged[state]))


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_is_refused(tiny_digits, tmp_path, tmp_path_factory, name):
    state, settings = interrupted(tiny_digits, tmp_path_factory)
    config = tiny_config(tiny_digits, tmp_path, **settings | {name: REFUSED[name]})
    with pytest.raises(
        CheckpointError, match=f"^{name}=.*without --{name.replace('_', '-')}, or start a new"
    ) as raised:
        build(config, resume=str(state))
    assert "\n" not in str(raised.value)


def test_the_optimizer_has_the_settings_of_the_resumed_run(tiny_digits, tmp_path, tmp_path_factory):
    state, settings = interrupted(tiny_digits, tmp_path_factory)
    changes = {"weight_decay": 0.9, "opt_eps": 0.25, "opt_betas": (0.5, 0.75), "lr": 0.0625}
    training = build(tiny_config(tiny_digits, tmp_path, **settings | changes), resume=str(state))
    groups = training.state.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.0, 0.9]
    assert [(group["eps"], group["betas"], group["initial_lr"]) for group in groups] == [
        (0.25, (0.5, 0.75), 0.0625 * 12 / 512)
    ] * 2
    # In the third epoch, the cosine of epoch 1 of 4.
    assert groups[0]["lr"] == pytest.approx(1e-5 + (0.0625 * 12 / 512 - 1e-5) * (2 + 2**0.5) / 4)


@pytest.mark.parametrize("changes", [{"weight_decay": 0.0}, {"layer_decay": 0.5}])
def test_other_groups_keep_the_moments_of_each_parameter(tiny_digits, tmp_path, tmp_path_factory, changes):
    state, settings = interrupted(tiny_digits, tmp_path_factory)
    entries = read_state(state)
    training = build(tiny_config(tiny_digits, tmp_path, **settings | changes), resume=str(state))
    optimizer, model = training.state.optimizer, training.state.model
    assert len(optimizer.param_groups) != len(entries["optimizer"]["param_groups"])
    for number, name in enumerate(entries["localvit"]["parameter_names"]):
        (parameter,) = (each for own, each in model.named_parameters() if published_key(model, own) == name)
        assert torch.equal(optimizer.state[parameter]["exp_avg"], entries["optimizer"]["state"][number]["exp_avg"])


@pytest.mark.parametrize(("before", "now"), [(False, True), (True, False)])
def test_moments_follow_the_memory_format_of_the_weights(tiny_digits, tmp_path, tmp_path_factory, before, now):
    """The fused AdamW on the CPU reads weights and moments in the order of memory."""
    state, settings = interrupted(tiny_digits, tmp_path_factory, channels_last=before)
    results = []
    for channels_last in (before, now):
        config = tiny_config(tiny_digits, tmp_path, **settings | {"channels_last": channels_last})
        training = build(config, resume=str(state))
        steps(training, 1)
        results.append(training.state.model.patch_embed.proj.weight.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler")
def test_a_plateau_schedule_takes_another_rate_and_patience(tiny_digits, tmp_path, tmp_path_factory):
    state, settings = interrupted(tiny_digits, tmp_path_factory, sched="plateau", patience_epochs=1)
    training = build(tiny_config(tiny_digits, tmp_path, **settings | {"lr": 0.3}), resume=str(state))
    assert training.state.optimizer.param_groups[0]["lr"] == 0.3 * 12 / 512
    falls = {}
    for patience in (1, 3):
        config = tiny_config(tiny_digits, tmp_path, **settings | {"patience_epochs": patience})
        training = build(config, resume=str(state))
        rates = []
        for epoch in range(2, 9):
            training.state.finish_epoch({"epoch": epoch, "test_acc1": 50.0}, {})
            training.state.begin_epoch()
            rates.append(training.state.optimizer.param_groups[0]["lr"])
        falls[patience] = next(index for index, rate in enumerate(rates) if rate < 0.9 * rates[0])
    assert falls[3] == falls[1] + 2


def test_a_state_resumes_without_the_file_of_initial_weights(tiny_digits, tmp_path):
    """Its normalization and its trained head are in the state; only the head and the locality modules are trained."""
    base = {"model": "vit_tiny_patch16_224", "input_size": (32,), "ema_decay": None, "epochs": 1}
    arguments = {"depth": 2, "embed_dim": 24, "num_heads": 3, "patch_size": 8}
    model = localvit.create_model(base["model"], img_size=32, num_classes=7, **arguments)
    file = tmp_path / "base.safetensors"
    preprocessing = {"input_size": [32, 32], "mean": [0.5, 0.25, 0.75], "std": [0.5, 0.5, 0.5]}
    localvit.save_checkpoint(model, file, preprocessing=preprocessing)
    settings = base | {"model_args": arguments, "localize": {"trainable": "locality"}, "finetune": str(file)}
    fit(build(tiny_config(tiny_digits, tmp_path / "run", **settings)))
    expected = read_state(tmp_path / "run" / STATE)
    file.unlink()
    training = build(tiny_config(tiny_digits, tmp_path / "run", **settings | {"epochs": 2}), resume="auto")
    assert training.preprocessing.mean == (0.5, 0.25, 0.75)
    trained = {name for name, each in training.state.model.named_parameters() if each.requires_grad}
    assert trained == set(expected["localvit"]["parameter_names"])
    assert "head.weight" in trained
    assert "blocks.0.attn.qkv.weight" not in trained


def test_the_setting_of_initial_weights_may_be_left_out(tiny_digits, tmp_path):
    model = localvit.create_model("localvit_nano_patch4_32", num_classes=7, depth=1)
    file = tmp_path / "base.safetensors"
    preprocessing = {"input_size": [32, 32], "mean": [0.5, 0.25, 0.75], "std": [0.5, 0.5, 0.5]}
    localvit.save_checkpoint(model, file, preprocessing=preprocessing)
    settings = {"model_args": {"depth": 1}, "epochs": 1}
    fit(build(tiny_config(tiny_digits, tmp_path / "run", finetune=str(file), **settings)))
    file.unlink()
    training = build(tiny_config(tiny_digits, tmp_path / "run", **settings), resume="auto")
    assert training.preprocessing.mean == (0.5, 0.25, 0.75)
    assert training.config.finetune == str(file)
