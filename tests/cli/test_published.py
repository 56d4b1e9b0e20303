"""The published command line: every flag by its name and with its default, and what is refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from localvit_cli.published import Published

ROOT = Path(__file__).parents[2]

FLAGS = [
    # flag, a value, field, value read, published default
    ("--batch-size", ["128"], "batch_size", 128, 64),
    ("--epochs", ["3"], "epochs", 3, 300),
    ("--model", ["pvt_tiny"], "model", "pvt_tiny", None),
    ("--input-size", ["32"], "input_size", 32, 224),
    ("--drop", ["0.1"], "drop", 0.1, 0.0),
    ("--drop-path", ["0.2"], "drop_path", 0.2, 0.1),
    ("--no-model-ema", [], "model_ema", False, True),
    ("--model-ema-decay", ["0.9"], "model_ema_decay", 0.9, 0.99996),
    ("--model-ema-force-cpu", [], "model_ema_force_cpu", True, False),
    ("--opt", ["sgd"], "opt", "sgd", "adamw"),
    ("--opt-eps", ["1e-6"], "opt_eps", 1e-6, 1e-8),
    ("--opt-betas", ["0.9", "0.99"], "opt_betas", (0.9, 0.99), ()),
    ("--clip-grad", ["1.5"], "clip_grad", 1.5, None),
    ("--momentum", ["0.8"], "momentum", 0.8, 0.9),
    ("--weight-decay", ["0.1"], "weight_decay", 0.1, 0.05),
    ("--sched", ["step"], "sched", "step", "cosine"),
    ("--lr", ["1e-3"], "lr", 1e-3, 5e-4),
    ("--lr-noise", ["0.4", "0.9"], "lr_noise", (0.4, 0.9), ()),
    ("--lr-noise-pct", ["0.5"], "lr_noise_pct", 0.5, 0.67),
    ("--lr-noise-std", ["0.5"], "lr_noise_std", 0.5, 1.0),
    ("--warmup-lr", ["1e-5"], "warmup_lr", 1e-5, 1e-6),
    ("--min-lr", ["1e-6"], "min_lr", 1e-6, 1e-5),
    ("--decay-epochs", ["20"], "decay_epochs", 20, 30),
    ("--warmup-epochs", ["3"], "warmup_epochs", 3, 5),
    ("--cooldown-epochs", ["3"], "cooldown_epochs", 3, 10),
    ("--patience-epochs", ["3"], "patience_epochs", 3, 10),
    ("--decay-rate", ["0.2"], "decay_rate", 0.2, 0.1),
    ("--dr", ["0.2"], "decay_rate", 0.2, 0.1),
    ("--color-jitter", ["0.3"], "color_jitter", 0.3, 0.4),
    ("--aa", ["original"], "aa", "original", "rand-m9-mstd0.5-inc1"),
    ("--smoothing", ["0"], "smoothing", 0.0, 0.1),
    ("--train-interpolation", ["random"], "train_interpolation", "random", "bicubic"),
    ("--no-repeated-aug", [], "repeated_aug", False, True),
    ("--reprob", ["0"], "reprob", 0.0, 0.25),
    ("--remode", ["const"], "remode", "const", "pixel"),
    ("--recount", ["2"], "recount", 2, 1),
    ("--resplit", [], "resplit", True, False),
    ("--mixup", ["0"], "mixup", 0.0, 0.8),
    ("--cutmix", ["0"], "cutmix", 0.0, 1.0),
    ("--cutmix-minmax", ["0.2", "0.8"], "cutmix_minmax", (0.2, 0.8), ()),
    ("--mixup-prob", ["0.5"], "mixup_prob", 0.5, 1.0),
    ("--mixup-switch-prob", ["0.1"], "mixup_switch_prob", 0.1, 0.5),
    ("--mixup-mode", ["elem"], "mixup_mode", "elem", "batch"),
    ("--teacher-model", ["pvt_tiny"], "teacher_model", "pvt_tiny", "regnety_160"),
    ("--teacher-path", ["t.pth"], "teacher_path", "t.pth", ""),
    ("--distillation-type", ["hard"], "distillation_type", "hard", "none"),
    ("--distillation-alpha", ["0.1"], "distillation_alpha", 0.1, 0.5),
    ("--distillation-tau", ["3"], "distillation_tau", 3.0, 1.0),
    ("--finetune", ["f.pth"], "finetune", "f.pth", ""),
    ("--data-path", ["d"], "data_path", Path("d"), None),
    ("--data-set", ["CIFAR"], "data_set", "CIFAR", "IMNET"),
    ("--inat-category", ["order"], "inat_category", "order", "name"),
    ("--output_dir", ["o"], "output_dir", "o", ""),
    ("--output-dir", ["o"], "output_dir", "o", ""),
    ("--device", ["cpu"], "device", "cpu", "cuda"),
    ("--seed", ["3"], "seed", 3, 0),
    ("--resume", ["r.pth"], "resume", "r.pth", ""),
    ("--start_epoch", ["3"], "start_epoch", 3, 0),
    ("--eval", [], "eval", True, False),
    ("--dist-eval", [], "dist_eval", True, False),
    ("--num_workers", ["3"], "num_workers", 3, 10),
    ("--no-pin-mem", [], "pin_mem", False, True),
    ("--world_size", ["2"], "world_size", 2, 1),
    ("--dist_url", ["env://x"], "dist_url", "env://x", "env://"),
]


@pytest.mark.parametrize(("flag", "values", "field", "read", "default"), FLAGS, ids=[row[0] for row in FLAGS])
def test_flag(flag, values, field, read, default):
    assert getattr(tyro.cli(Published, args=[flag, *values]), field) == read
    if default is not None or field in ("clip_grad", "data_path"):
        assert getattr(tyro.cli(Published, args=[]), field) == default


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "main.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--epochs", "3", "--mixup", "0"], 1, ["localvit train", "--epochs", "--mixup"]),
        (["--eval", "--data-path", "."], 1, ["--resume"]),
        (["--eval", "--resume", "nowhere.pth", "--data-path", "."], 1, ["nowhere.pth"]),
        (["--nonsense"], 2, ["--nonsense"]),
        (["--batch-size", "many"], 2, ["--batch-size"]),
        (["--data-set", "MNIST"], 2, ["--data-set"]),
    ],
)
def test_refused_by_name(arguments, status, says):
    done = run(*arguments)
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    for part in says:
        assert part in done.stdout + done.stderr


def test_debug_shows_where():
    done = run("--eval", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
