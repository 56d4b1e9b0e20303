"""Settings: what is refused, and by which name; recipes and files."""

import math
from dataclasses import fields
from pathlib import Path

import pytest

from localvit.train.config import TrainConfig
from localvit.train.settings import RECIPES, read_recipe, read_settings
from localvit_cli import main


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("epochs", 0, "at least 1"),
        ("epochs", 2.5, "a whole number"),
        ("epochs", True, "a whole number"),
        ("batch_size", 0, "at least 1"),
        ("batch_size", 63, "even"),
        ("lr", 0.0, "above 0"),
        ("lr", math.nan, "above 0"),
        ("lr", math.inf, "finite"),
        ("lr", "1e-3", "YAML reads 1e-3 as text, so write 0.001"),
        ("min_lr", -1e-5, "at least 0"),
        ("warmup_lr", math.nan, "at least 0"),
        ("warmup_epochs", -1, "at least 0"),
        ("weight_decay", -0.05, "at least 0"),
        ("clip_grad", 0.0, "above 0"),
        ("ema_decay", 1.0, "in [0, 1)"),
        ("drop_path_rate", 1.0, "in [0, 1)"),
        ("label_smoothing", -0.1, "in [0, 1)"),
        ("mixup", -0.8, "at least 0"),
        ("cutmix", math.inf, "finite"),
        ("mixup_prob", 1.1, "in [0, 1]"),
        ("mixup_switch_prob", -0.1, "in [0, 1]"),
        ("hflip", 2.0, "in [0, 1]"),
        ("random_erasing", math.nan, "in [0, 1]"),
        ("color_jitter", -0.4, "at least 0"),
        ("auto_augment", 9, "text or none"),
        ("interpolation", "lanczos", "one of bicubic, bilinear, random"),
        ("dtype", "fp16", "one of float32, bfloat16, float16"),
        ("input_size", (32, 32, 32), "one side, or height and width"),
        ("input_size", (0,), "at least 1"),
        ("input_size", (32.5,), "whole numbers"),
        ("seed", -1, "at least 0"),
        ("grad_accum", 0, "at least 1"),
        ("keep", 0, "at least 1"),
        ("checkpoint_steps", 0, "at least 1"),
        ("early_stopping", 0, "at least 1"),
        ("layer_decay", 0.0, "in (0, 1]"),
        ("val_fraction", 1.0, "in (0, 1)"),
        ("opt_eps", 0.0, "above 0"),
        ("opt_betas", (0.9,), "two numbers"),
        ("opt_betas", (0.9, 1.0), "in [0, 1)"),
        ("momentum", 1.1, "in [0, 1]"),
        ("cutmix_minmax", (0.2,), "two parts of a side"),
        ("cutmix_minmax", (0.2, 1.2), "in [0, 1]"),
        ("lr_noise", (0.1, 0.2, 0.3), "one or two parts"),
        ("decay_milestones", (0,), "at least 1"),
        ("distillation_tau", 0.0, "above 0"),
        ("distillation_alpha", math.nan, "in [0, 1]"),
        ("random_erasing_mode", "blur", "one of pixel, rand, const"),
        ("sched", "linear", "one of cosine"),
        ("nonfinite", "ignore", "one of stop, skip"),
        ("model_args", ["depthwise"], "names with values"),
        ("freeze", "blocks", "a list of texts"),
        ("wandb", True, "text or none"),
        ("workers", -1, "at least 0"),
        ("model", None, "text"),
        ("output_dir", 7, "a path"),
    ],
)
def test_bad_values_are_refused_by_name(name, value, words):
    with pytest.raises(ValueError, match=name) as raised:
        TrainConfig.of({name: value})
    assert words in str(raised.value)


def test_a_name_that_is_no_setting_gets_the_closest_one():
    with pytest.raises(ValueError, match="batchsize is no training setting; did you mean batch_size"):
        TrainConfig.of({"batchsize": 64})


def test_an_odd_batch_is_fine_where_nothing_is_mixed():
    assert TrainConfig(batch_size=63, mixup=0.0, cutmix=0.0).batch_size == 63


def test_plain_values_come_back():
    changes = {"freeze": ("pos_embed",), "model_args": {"depthwise": False}, "finetune": "a.pth", "clip_grad": 1.5}
    config = TrainConfig(input_size=(28, 36), data_path=Path("somewhere"), teacher_checkpoint=Path("t.pth"), **changes)
    assert TrainConfig.of(config.to_dict()) == config


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_settings_and_say_what_to_expect(path):
    TrainConfig.of(read_recipe(path.stem))
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("Expected:", "Hardware:", f"localvit train --recipe {path.stem}"):
        assert any(word in line for line in comment)


def test_an_unknown_recipe_names_those_there_are():
    with pytest.raises(ValueError, match="no recipe is called 'digit'; there is"):
        read_recipe("digit")


@pytest.mark.parametrize(("text", "words"), [("- 1\n- 2\n", "must hold settings"), ("a: [", "is not YAML")])
def test_a_file_that_holds_no_settings_is_refused(tmp_path, text, words):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_settings(path)


def test_flags_go_before_the_file_and_the_file_before_the_recipe(tmp_path):
    import tyro

    from localvit_cli.train import Train

    path = tmp_path / "settings.yaml"
    path.write_text("epochs: 7\nlr: 0.3\n")
    # The flag repeats the class's default, which must still go before the file's value.
    asked = tyro.cli(Train, args=["--recipe", "digits", "--config", str(path), "--lr", "0.0005"])
    config = asked.to_config()
    assert (config.lr, config.epochs, config.model) == (0.0005, 7, "localvit_nano_patch4_32")


def test_arguments_of_the_model_are_merged_by_name(tmp_path):
    import tyro

    from localvit_cli import UsageError
    from localvit_cli.train import Train

    path = tmp_path / "settings.yaml"
    path.write_text("model_args: {act: relu6, reduction: 4}\n")
    asked = tyro.cli(Train, args=["--config", str(path), "--model-args", "reduction=8", "local_blocks=[]"])
    assert asked.to_config().model_args == {"act": "relu6", "reduction": 8, "local_blocks": []}
    with pytest.raises(UsageError, match="--model-args depthwise must be NAME=VALUE"):
        tyro.cli(Train, args=["--model-args", "depthwise"]).to_config()


def test_the_command_line_shows_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    for field in fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in told
