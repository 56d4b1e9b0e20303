"""Batch size and lowest learning rates where nobody set them: small data sets, and schedules that must not rise."""

import math

import numpy as np
import pytest
from PIL import Image
from tiny import STILL, tiny_config
from torch import nn

import localvit
from localvit.train.builder import build
from localvit.train.config import TrainConfig
from localvit.train.derived import derive_settings
from localvit.train.dry_run import dry_run
from localvit.train.optimization import build_optimizer, build_scheduler, set_learning_rate
from localvit_cli import main
from localvit_cli.train import parse

NANO = "localvit_nano_patch4_32"
UNMIXED = {"mixup": 0.0, "cutmix": 0.0}
SMALL = STILL | {"model_args": {"depth": 1}, "input_size": (8,)}


def brute_force(num_images, limit, step):
    """Of all batch sizes, the largest with which the fewest images are left out in the fewest steps."""
    steps = -(-num_images // limit)
    sizes = [size for size in range(step, limit + 1, step) if size * steps <= num_images]
    return max(sizes, default=0)


@pytest.mark.parametrize(("settings", "step"), [({}, 2), (UNMIXED, 1)], ids=["mixed", "unmixed"])
def test_the_default_batch_size_uses_the_images(settings, step):
    for num_images in range(2, 500):
        size = derive_settings(TrainConfig(**settings), num_images).batch_size
        left_out = num_images % size
        assert size in (128, brute_force(num_images, 128, step))
        # An even size leaves out up to one image more for each step, of which there are at most four.
        assert left_out <= max(num_images // 10, step * -(-num_images // 128) - 1)


def test_a_large_data_set_keeps_the_published_batch_size():
    config = derive_settings(TrainConfig(), 1_281_167 // 8)
    assert (config.batch_size, config.epochs, config.min_lr, config.warmup_lr) == (128, 300, 1e-5, 1e-6)


@pytest.mark.parametrize(
    ("num_images", "settings", "words"),
    [
        (
            8,
            {"batch_size": 64},
            "batch_size=64 is more than the 8 images to train on: add images or use --batch-size 8",
        ),
        (
            9,
            {"batch_size": 6, "grad_accum": 2},
            "times grad_accum=2 is more than the 9 images .* --batch-size 4 or less",
        ),
        (9, {"grad_accum": 10}, "times grad_accum=10 is more than the 9 images .* or use a smaller --grad-accum"),
        (1, {}, "more than the 1 image to train on: add images or turn off mixing"),
        (0, {}, "more than the 0 images to train on: add images$"),
    ],
)
def test_too_few_images_are_an_error_with_a_remedy(num_images, settings, words):
    with pytest.raises(ValueError, match=words):
        derive_settings(TrainConfig(**settings), num_images)


def test_a_batch_size_that_was_set_is_kept_with_a_warning(caplog):
    config = derive_settings(TrainConfig(batch_size=64, epochs=30), 102)
    assert config.batch_size == 64
    left_out, few_steps = caplog.messages
    assert "leaves 38 of the 102 training images out of each epoch" in left_out
    assert "--batch-size 50 would use 100" in left_out
    assert few_steps.startswith("the run has only 30 steps (30 epochs of 1)")
    assert "--epochs 100 or more" in few_steps
    # The remedies lead to a run without warnings.
    caplog.clear()
    derive_settings(TrainConfig(batch_size=50, epochs=100), 102)
    assert caplog.messages == []


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Weights to start from, of a model with other classes."""
    path = tmp_path_factory.mktemp("weights") / "seven.safetensors"
    localvit.save_checkpoint(localvit.create_model(NANO, num_classes=7, depth=2), path)
    return path


def drawn_images(root, counts):
    values = np.random.default_rng(0)
    for class_name, count in zip("ab", counts, strict=True):
        (root / class_name).mkdir(parents=True)
        for number in range(count):
            image = Image.fromarray(values.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            image.save(root / class_name / f"{number}.png")
    return str(root)


def finetune(data, output_dir, weights, *flags):
    """The README's command, with a small model instead of the released one."""
    start = [
        "--model",
        NANO,
        "--model-args",
        "depth=2",
        "--finetune",
        str(weights),
        "--device",
        "cpu",
        "--workers",
        "0",
    ]
    return ["train", "--recipe", "finetune", "--data-path", data, "--output-dir", str(output_dir), *start, *flags]


@pytest.mark.parametrize(("num_images", "batch_size", "steps"), [(10, 8, 1), (30, 26, 1), (100, 42, 2), (130, 54, 2)])
def test_a_dry_run_of_the_recipe_for_small_data_sets(tmp_path, released, capsys, num_images, batch_size, steps):
    """15 % of each class are for evaluation: 2, 4, 16 and 20 images."""
    data = drawn_images(tmp_path / "images", (num_images // 2, num_images // 2))
    assert main(finetune(data, tmp_path / "run", released, "--dry-run")) == 0
    printed = capsys.readouterr()
    assert f"{batch_size} = {batch_size} per batch x 1 batches" in printed.out
    assert f"{30 * steps} = 30 epochs x {steps}" in printed.out
    assert f"batch_size={batch_size} instead of 64" in printed.err
    assert f"the run has only {30 * steps} steps" in printed.err
    assert not (tmp_path / "run").exists()


def test_a_small_run_records_its_batch_size_and_resumes_with_it(tmp_path, released, capsys):
    data = drawn_images(tmp_path / "images", (5, 4))
    command = finetune(data, tmp_path / "run", released, "--epochs", "2")
    assert main(command) == 0
    assert "batch_size: 6\n" in (tmp_path / "run" / "config.yaml").read_text()
    assert "| batch_size | 6 | 128 |" in (tmp_path / "run" / "summary.md").read_text()
    capsys.readouterr()
    assert main([*command, "--resume", "auto", "--epochs", "3"]) == 0
    printed = capsys.readouterr()
    assert "the run started with 2" in printed.err
    assert "batch_size" not in printed.err
    assert printed.out.startswith("Acc@1 ")


def test_a_dry_run_with_one_step_in_an_epoch(tiny_digits, tmp_path):
    facts = dry_run(build(tiny_config(tiny_digits, tmp_path / "run", batch_size=20, epochs=1, **SMALL)))
    assert facts["steps"] == "1 = 1 epochs x 1"


def rates(config, images):
    """The learning rate of each epoch."""
    optimizer = build_optimizer(config, nn.Linear(3, 5), images)
    scheduler = build_scheduler(config, optimizer, steps_per_epoch=7)
    found = []
    for epoch in range(config.epochs):
        set_learning_rate(scheduler, epoch)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("sched", ["cosine", "tanh", "poly"])
@pytest.mark.parametrize("images", [1, 8, 16, 64, 128, 1024])
def test_no_default_schedule_rises_at_its_end(sched, images):
    """It rises during the warm-up, and falls afterwards. At 128 images and more, the published rates are used."""
    config = TrainConfig(epochs=40, sched=sched, batch_size=images, **UNMIXED)
    found = rates(config, images)
    peak = 5e-4 * images / 512
    share = min(1, images / 128)
    assert found[0] == pytest.approx(1e-6 * share, rel=1e-12)
    assert found[1:6] == sorted(found[1:6])
    assert found[7:] == sorted(found[7:], reverse=True)
    assert 1e-5 * share <= found[-1] < max(found) <= peak


def test_a_low_learning_rate_has_lower_lowest_rates():
    found = rates(TrainConfig(epochs=40, lr=1e-6, batch_size=128), 128)
    assert found[0] < max(found) == pytest.approx(max(found[5:8]))
    assert found[-1] < max(found) / 10


@pytest.mark.parametrize(
    ("flags", "warmup_lr", "min_lr"),
    [
        (["--recipe", "digits"], 5e-4, 1e-5),
        (["--recipe", "digits", "--batch-size", "16"], 1.25e-4, 1e-5),
        (["--recipe", "digits", "--batch-size=16", "--warmup-lr", "0.0005"], 5e-4, 1e-5),
        (["--recipe", "digits", "--lr", "0.002"], 1.25e-4, 1e-5),
        (["--recipe", "digits", "--batch-size", "128"], 5e-4, 1e-5),
        (["--recipe", "digits", "--batch-size", "32", "--grad-accum", "2"], 5e-4, 1e-5),
        (["--recipe", "small_images_32", "--batch-size", "8"], 1e-5 / 16, 1e-5 / 2),
        (["--batch-size", "8"], 1e-6 / 16, 1e-5 / 16),
        (["--batch-size", "8", "--min-lr", "0.00001"], 1e-6 / 16, 1e-5),
        (["--recipe", "deit_300"], 1e-6, 1e-5),
    ],
)
def test_lowest_rates_of_the_command_line(flags, warmup_lr, min_lr):
    """A recipe's rates are scaled with its peak, the defaults with the default peak, and given ones are kept."""
    config = derive_settings(parse(flags).to_config(), 100_000)
    assert (config.warmup_lr, config.min_lr) == (pytest.approx(warmup_lr, rel=1e-12), pytest.approx(min_lr, rel=1e-12))


def test_a_file_of_settings_sets_its_rates_and_its_batch_size(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("batch_size: 8\nmin_lr: 0.00001\n")
    config = parse(["--recipe", "digits", "--config", str(path)]).to_config()
    assert {"batch_size", "min_lr"} <= config.model_fields_set
    assert config.min_lr == 1e-5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"min_lr": 1e-5}, "the learning rate rises from 7.81e-06 to min_lr=1e-05"),
        ({"warmup_lr": 5e-4}, "falls during the warm-up, from warmup_lr=0.0005 to its peak of 7.81e-06"),
    ],
)
def test_a_schedule_that_rises_because_of_set_rates_is_a_warning(caplog, settings, words):
    derive_settings(TrainConfig(batch_size=8, **settings), 100_000)
    (message,) = caplog.messages
    assert words in message


def test_the_config_of_a_run_holds_the_rates_in_use(tiny_digits, tmp_path):
    config = tiny_config(tiny_digits, tmp_path / "run", epochs=3, batch_size=6, lr=5e-4, **SMALL)
    training = build(config)
    assert training.config.min_lr == 1e-5 * 6 / 128
    training.state.epoch = 2
    training.state.begin_epoch()
    # The cosine after one of three epochs.
    low, peak = 1e-5 * 6 / 128, 5e-4 * 6 / 512
    expected = low + (peak - low) * (1 + math.cos(math.pi / 3)) / 2
    assert training.state.optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-12)
