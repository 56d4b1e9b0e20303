"""Settings: validation and its messages, recipes and files, and the flags of `localvit train`."""

import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from localvit.train.config import TrainConfig
from localvit.train.recipe import RECIPES, describe_errors, read_recipe, read_settings
from localvit_cli import UsageError, main
from localvit_cli.train import parse


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("epochs", 0, "greater than or equal to 1"),
        ("epochs", 2.5, "a valid integer"),
        ("epochs", True, "a valid integer"),
        ("batch_size", 0, "greater than or equal to 1"),
        ("batch_size", 63, "even"),
        ("lr", 0.0, "greater than 0"),
        ("lr", math.nan, "a finite number"),
        ("lr", math.inf, "a finite number"),
        ("lr", "1e-3", "YAML reads 1e-3 as text, so write 0.001"),
        ("min_lr", -1e-5, "greater than or equal to 0"),
        ("warmup_lr", math.nan, "a finite number"),
        ("warmup_epochs", -1, "greater than or equal to 0"),
        ("weight_decay", -0.05, "greater than or equal to 0"),
        ("clip_grad", 0.0, "greater than 0"),
        ("ema_decay", 1.0, "less than 1"),
        ("drop_path_rate", 1.0, "less than 1"),
        ("label_smoothing", -0.1, "greater than or equal to 0"),
        ("mixup", -0.8, "greater than or equal to 0"),
        ("cutmix", math.inf, "a finite number"),
        ("mixup_prob", 1.1, "less than or equal to 1"),
        ("mixup_switch_prob", -0.1, "greater than or equal to 0"),
        ("hflip", 2.0, "less than or equal to 1"),
        ("random_erasing", math.nan, "less than or equal to 1"),
        ("color_jitter", -0.4, "greater than or equal to 0"),
        ("auto_augment", 9, "a valid string or None (null in YAML)"),
        ("interpolation", "lanczos", "'bicubic', 'bilinear' or 'random'"),
        ("dtype", "fp16", "'float32', 'bfloat16' or 'float16'"),
        ("input_size", (32, 32, 32), "one side, or height and width"),
        ("input_size", (0,), "greater than or equal to 1"),
        ("input_size", (32.5,), "input_size[0]=32.5 must be a valid integer"),
        ("seed", -1, "greater than or equal to 0"),
        ("grad_accum", 0, "greater than or equal to 1"),
        ("keep", 0, "greater than or equal to 1"),
        ("checkpoint_steps", 0, "greater than or equal to 1"),
        ("early_stopping", 0, "greater than or equal to 1"),
        ("layer_decay", 0.0, "greater than 0"),
        ("val_fraction", 1.0, "less than 1"),
        ("opt_eps", 0.0, "greater than 0"),
        ("opt_betas", (0.9,), "two numbers"),
        ("opt_betas", (0.9, 1.0), "less than 1"),
        ("momentum", 1.1, "less than or equal to 1"),
        ("cutmix_minmax", (0.2,), "two fractions of a side"),
        ("cutmix_minmax", (0.2, 1.2), "less than or equal to 1"),
        ("lr_noise", (0.1, 0.2, 0.3), "one or two fractions"),
        ("decay_milestones", (0,), "greater than or equal to 1"),
        ("distillation_tau", 0.0, "greater than 0"),
        ("distillation_alpha", math.nan, "less than or equal to 1"),
        ("random_erasing_mode", "blur", "'pixel', 'rand' or 'const'"),
        ("sched", "linear", "'cosine', 'tanh'"),
        ("nonfinite", "ignore", "'stop' or 'skip'"),
        ("model_args", ["depthwise"], "a valid dictionary"),
        ("freeze", "blocks", "a valid tuple"),
        ("wandb", True, "a valid string or None (null in YAML)"),
        ("workers", -1, "greater than or equal to 0"),
        ("model", None, "a valid string"),
        ("output_dir", 7, "a valid path"),
    ],
)
def test_bad_values_are_errors_with_the_name(name, value, words):
    with pytest.raises(ValidationError) as raised:
        TrainConfig(**{name: value})
    message = describe_errors(raised.value)
    assert message.startswith(name)
    assert words in message
    assert "\n" not in message


def test_an_unknown_name_is_an_error_with_a_suggestion():
    with pytest.raises(ValidationError) as raised:
        TrainConfig(batchsize=64, lr=0.0)
    assert describe_errors(raised.value).splitlines() == [
        "lr=0.0 must be greater than 0",
        "batchsize is not a training setting; did you mean batch_size?",
    ]


def test_the_batch_size_may_be_odd_without_mixing():
    assert TrainConfig(batch_size=63, mixup=0.0, cutmix=0.0).batch_size == 63


def test_plain_values_restore_a_config():
    changes = {"freeze": ("pos_embed",), "model_args": {"depthwise": False}, "finetune": "a.pth", "clip_grad": 1.5}
    config = TrainConfig(input_size=(28, 36), data_path=Path("somewhere"), teacher_checkpoint=Path("t.pth"), **changes)
    assert TrainConfig(**config.to_dict()) == config


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_valid_and_document_their_use(path):
    TrainConfig(**read_recipe(path.stem))
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("Expected:", "Hardware:", f"localvit train --recipe {path.stem}"):
        assert any(word in line for line in comment)


def test_an_unknown_recipe_is_an_error_with_all_names():
    with pytest.raises(ValueError, match=r"there is no recipe 'digit'; the recipes are .*digits"):
        read_recipe("digit")


@pytest.mark.parametrize(
    ("text", "words"),
    [("- 1\n- 2\n", "must contain one setting"), ("a: [", "is not valid YAML"), ("1: 2\n", "must contain")],
)
def test_other_files_than_settings_are_refused(tmp_path, text, words):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_settings(path)


def test_flags_override_the_file_and_the_file_overrides_the_recipe(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("epochs: 7\nlr: 0.3\n")
    # The flag has the same value as the default of the setting, and must still override the file.
    config = parse(["--recipe", "digits", "--config", str(path), "--lr", "0.0005"]).to_config()
    assert (config.lr, config.epochs, config.model) == (0.0005, 7, "localvit_nano_patch4_32")


def test_a_flag_makes_the_settings_of_a_file_valid(tmp_path):
    """Settings are checked in combination only after the flags are known."""
    path = tmp_path / "settings.yaml"
    path.write_text("batch_size: 63\n")
    config = parse([f"--config={path}", "--mixup", "0", "--cutmix", "0"]).to_config()
    assert config.batch_size == 63


def test_arguments_of_the_model_are_merged_by_name(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("model_args: {act: relu6, reduction: 4}\n")
    command = parse(["--config", str(path), "--model-args", "reduction=8", "local_blocks=[]"])
    assert command.to_config().model_args == {"act": "relu6", "reduction": 8, "local_blocks": []}


def test_localize_without_arguments_uses_its_defaults():
    assert parse([]).to_config().localize is None
    assert parse(["--localize"]).to_config().localize == {}
    assert parse(["--localize", "kernel_size=5"]).to_config().localize == {"kernel_size": 5}


def test_errors_of_a_file_name_the_file(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("lr: 1e-3\nepochs: 0\n")
    with pytest.raises(UsageError) as raised:
        parse(["--config", str(path)])
    first, second = str(raised.value).splitlines()
    assert first == f"{path}: epochs=0 must be greater than or equal to 1"
    assert second == "lr='1e-3' must be a valid number; YAML reads 1e-3 as text, so write 0.001"


def test_errors_of_flags_are_reported_at_once():
    with pytest.raises(UsageError) as raised:
        parse(["--lr", "0", "--hflip", "2"]).to_config()
    assert sorted(str(raised.value).splitlines()) == [
        "hflip=2.0 must be less than or equal to 1",
        "lr=0.0 must be greater than 0",
    ]


def help_of(capsys, *flags):
    with pytest.raises(SystemExit) as stop:
        main(["train", *flags, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_has_groups_and_every_setting(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(capsys)
    for group in ("data", "model", "optimization", "schedule", "augmentation", "mixing", "loss"):
        assert f"{group} options" in text
    for name, field in TrainConfig.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert field.description, name
    assert max(map(len, text.splitlines())) <= 80


def test_help_shows_the_defaults_of_the_recipe(capsys):
    assert "(default: localvit_nano_patch4_32)" in " ".join(help_of(capsys, "--recipe", "digits").split())
    assert "(default: localvit_nano_patch4_32)" not in " ".join(help_of(capsys).split())
