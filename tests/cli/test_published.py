"""The published command line: name, default and effect of every flag, training, evaluation, and errors."""

import json
import os
import runpy
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from localvit.checkpoints import read_checkpoint
from localvit.train.config import TrainConfig
from localvit_cli.published import Published, main, parse, to_config
from processes import start, status_of

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "train"))
from tiny import write_some_digits  # noqa: E402

DEFAULT = {
    "model": "localvit_tiny_mlp4_act3_r192",
    "input_size": (224,),
    "batch_size": 64,
    "device": "cuda",
    "workers": 10,
    "output_dir": Path("runs/localvit_tiny_mlp4_act3_r192"),
}
"""Where the defaults of the published command line differ from those of the settings."""

PUBLISHED_RECIPE = {
    "opt": "adamw",
    "opt_betas": (),  # the optimizer's own, (0.9, 0.999)
    "opt_eps": 1e-8,
    "weight_decay": 0.05,
    "lr": 5e-4,
    "sched": "cosine",
    "min_lr": 1e-5,
    "warmup_epochs": 5,
    "warmup_lr": 1e-6,
    "epochs": 300,
    "drop_rate": 0.0,
    "drop_path_rate": 0.1,
    "clip_grad": None,
    "ema_decay": 0.99996,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "color_jitter": 0.4,
    "interpolation": "bicubic",
    "hflip": 0.5,
    "random_erasing": 0.25,
    "random_erasing_mode": "pixel",
    "mixup": 0.8,
    "cutmix": 1.0,
    "mixup_prob": 1.0,
    "mixup_switch_prob": 0.5,
    "label_smoothing": 0.1,
    "repeated_aug": True,
    "distillation": "none",
    "dtype": None,  # mixed precision where the device has it
}
"""The published settings, from the paper (arXiv 2104.05707, section 4.1) and the published program."""

FLAGS = [
    # flag, values, published field, value read, published default, what changes of the run
    ("--batch-size", ["128"], "batch_size", 128, 64, {"batch_size": 128}),
    ("--epochs", ["7"], "epochs", 7, 300, {"epochs": 7}),
    (
        "--model",
        ["pvt_tiny"],
        "model",
        "pvt_tiny",
        "localvit_tiny_mlp4_act3_r192",
        {"model": "pvt_tiny", "output_dir": Path("runs/pvt_tiny")},
    ),
    ("--input-size", ["32"], "input_size", 32, 224, {"input_size": (32,)}),
    ("--drop", ["0.1"], "drop", 0.1, 0.0, {"drop_rate": 0.1}),
    ("--drop-path", ["0.2"], "drop_path", 0.2, 0.1, {"drop_path_rate": 0.2}),
    ("--model-ema", [], "model_ema", True, True, {}),
    ("--no-model-ema", [], "model_ema", False, True, {"ema_decay": None}),
    ("--model-ema-decay", ["0.9"], "model_ema_decay", 0.9, 0.99996, {"ema_decay": 0.9}),
    ("--model-ema-force-cpu", [], "model_ema_force_cpu", True, False, {"ema_on_cpu": True}),
    ("--opt", ["sgd"], "opt", "sgd", "adamw", {"opt": "sgd"}),
    ("--opt-eps", ["1e-6"], "opt_eps", 1e-6, 1e-8, {"opt_eps": 1e-6}),
    ("--opt-betas", ["0.9", "0.99"], "opt_betas", (0.9, 0.99), (), {"opt_betas": (0.9, 0.99)}),
    ("--clip-grad", ["1.5"], "clip_grad", 1.5, None, {"clip_grad": 1.5}),
    ("--momentum", ["0.8"], "momentum", 0.8, 0.9, {"momentum": 0.8}),
    ("--weight-decay", ["0.1"], "weight_decay", 0.1, 0.05, {"weight_decay": 0.1}),
    ("--sched", ["step"], "sched", "step", "cosine", {"sched": "step"}),
    ("--lr", ["1e-3"], "lr", 1e-3, 5e-4, {"lr": 1e-3}),
    ("--lr-noise", ["0.4", "0.9"], "lr_noise", (0.4, 0.9), (), {"lr_noise": (0.4, 0.9)}),
    ("--lr-noise-pct", ["0.5"], "lr_noise_pct", 0.5, 0.67, {"lr_noise_pct": 0.5}),
    ("--lr-noise-std", ["0.5"], "lr_noise_std", 0.5, 1.0, {"lr_noise_std": 0.5}),
    ("--warmup-lr", ["1e-5"], "warmup_lr", 1e-5, 1e-6, {"warmup_lr": 1e-5}),
    ("--min-lr", ["1e-6"], "min_lr", 1e-6, 1e-5, {"min_lr": 1e-6}),
    ("--decay-epochs", ["20"], "decay_epochs", 20, 30, {"decay_epochs": 20}),
    ("--warmup-epochs", ["3"], "warmup_epochs", 3, 5, {"warmup_epochs": 3}),
    ("--cooldown-epochs", ["3"], "cooldown_epochs", 3, 10, {}),
    ("--patience-epochs", ["3"], "patience_epochs", 3, 10, {"patience_epochs": 3}),
    ("--decay-rate", ["0.2"], "decay_rate", 0.2, 0.1, {"decay_rate": 0.2}),
    ("--dr", ["0.2"], "decay_rate", 0.2, 0.1, {"decay_rate": 0.2}),
    ("--color-jitter", ["0.3"], "color_jitter", 0.3, 0.4, {"color_jitter": 0.3}),
    ("--aa", ["original"], "aa", "original", "rand-m9-mstd0.5-inc1", {"auto_augment": "original"}),
    ("--aa", ["none"], "aa", "none", "rand-m9-mstd0.5-inc1", {"auto_augment": None}),
    ("--aa", [""], "aa", "", "rand-m9-mstd0.5-inc1", {"auto_augment": None}),
    ("--smoothing", ["0"], "smoothing", 0.0, 0.1, {"label_smoothing": 0.0}),
    ("--train-interpolation", ["random"], "train_interpolation", "random", "bicubic", {"interpolation": "random"}),
    ("--repeated-aug", [], "repeated_aug", True, True, {}),
    ("--no-repeated-aug", [], "repeated_aug", False, True, {"repeated_aug": False}),
    ("--reprob", ["0"], "reprob", 0.0, 0.25, {"random_erasing": 0.0}),
    ("--remode", ["const"], "remode", "const", "pixel", {"random_erasing_mode": "const"}),
    ("--recount", ["2"], "recount", 2, 1, {"random_erasing_count": 2}),
    ("--resplit", [], "resplit", True, False, {"resplit": True}),
    ("--mixup", ["0"], "mixup", 0.0, 0.8, {"mixup": 0.0}),
    ("--cutmix", ["0"], "cutmix", 0.0, 1.0, {"cutmix": 0.0}),
    ("--cutmix-minmax", ["0.2", "0.8"], "cutmix_minmax", (0.2, 0.8), (), {"cutmix_minmax": (0.2, 0.8)}),
    ("--mixup-prob", ["0.5"], "mixup_prob", 0.5, 1.0, {"mixup_prob": 0.5}),
    ("--mixup-switch-prob", ["0.1"], "mixup_switch_prob", 0.1, 0.5, {"mixup_switch_prob": 0.1}),
    ("--mixup-mode", ["elem"], "mixup_mode", "elem", "batch", {"mixup_mode": "elem"}),
    ("--teacher-model", ["pvt_tiny"], "teacher_model", "pvt_tiny", "regnety_160", {"teacher": "pvt_tiny"}),
    ("--teacher-path", ["t.pth"], "teacher_path", "t.pth", "", {"teacher_checkpoint": Path("t.pth")}),
    ("--distillation-type", ["hard"], "distillation_type", "hard", "none", {"distillation": "hard"}),
    ("--distillation-alpha", ["0.1"], "distillation_alpha", 0.1, 0.5, {"distillation_alpha": 0.1}),
    ("--distillation-tau", ["3"], "distillation_tau", 3.0, 1.0, {"distillation_tau": 3.0}),
    ("--finetune", ["f.pth"], "finetune", "f.pth", None, {"finetune": "f.pth"}),
    ("--data-path", ["d"], "data_path", Path("d"), None, {"data_path": Path("d")}),
    ("--data-set", ["CIFAR"], "data_set", "CIFAR", "IMNET", {"data_set": "CIFAR"}),
    ("--inat-category", ["order"], "inat_category", "order", "name", {"inat_category": "order"}),
    ("--output_dir", ["o"], "output_dir", "o", "", {"output_dir": Path("o")}),
    ("--output-dir", ["o"], "output_dir", "o", "", {"output_dir": Path("o")}),
    ("--device", ["cpu"], "device", "cpu", "cuda", {"device": "cpu"}),
    ("--seed", ["3"], "seed", 3, 0, {"seed": 3}),
    ("--num_workers", ["3"], "num_workers", 3, 10, {"workers": 3}),
    # Flags that are not settings.
    ("--resume", ["r.pth"], "resume", "r.pth", "", {}),
    ("--start_epoch", ["3"], "start_epoch", 3, 0, {}),
    ("--eval", [], "eval", True, False, {}),
    ("--dist-eval", [], "dist_eval", True, False, {}),
    ("--pin-mem", [], "pin_mem", True, True, {}),
    ("--no-pin-mem", [], "pin_mem", False, True, {}),
    ("--world_size", ["2"], "world_size", 2, 1, {}),
    ("--dist_url", ["env://x"], "dist_url", "env://x", "env://", {}),
    ("--local_rank", ["1"], "local_rank", 1, None, {}),
    ("--local-rank=1", [], "local_rank", 1, None, {}),
]


@pytest.mark.parametrize(
    ("flag", "values", "field", "read", "default", "changes"), FLAGS, ids=[" ".join([row[0], *row[1]]) for row in FLAGS]
)
def test_flag(flag, values, field, read, default, changes):
    published = parse([flag, *values])
    assert getattr(published, field) == read
    assert getattr(Published(), field) == default
    assert to_config(published) == TrainConfig(**(DEFAULT | changes))


def test_every_flag_is_tested():
    assert {row[2] for row in FLAGS} == set(Published.model_fields)


def test_defaults_are_the_published_recipe():
    settings = to_config(Published()).model_dump()
    assert {name: settings[name] for name in PUBLISHED_RECIPE} == PUBLISHED_RECIPE


@pytest.mark.parametrize(
    ("arguments", "status", "parts"),
    [
        (["--drop-path", "1"], 2, ["--drop-path", "less than 1"]),
        (["--recount", "0"], 2, ["--recount", "greater than or equal to 1"]),
        (["--sched", "linear"], 2, ["--sched", "cosine"]),
        (["--batch-size", "7"], 2, ["--batch-size", "even"]),
        (["--start_epoch", "3"], 2, ["--start_epoch 3", "--resume"]),
        (["--eval", "--data-path", "."], 2, ["--resume"]),
        (["--eval", "--resume", "nowhere.pth", "--data-path", "."], 1, ["nowhere.pth"]),
        (["--data-path", "nowhere", "--device", "cpu"], 1, ["nowhere"]),
        (["--nonsense"], 2, ["--nonsense"]),
        (["--batch-size", "many"], 2, ["--batch-size"]),
        (["--data-set", "MNIST"], 2, ["--data-set"]),
    ],
)
def test_errors_name_the_flag(arguments, status, parts, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        returned = main(arguments)
    except SystemExit as stop:  # values that cannot be read
        returned = stop.code
    assert returned == status
    printed = "".join(capsys.readouterr())
    for part in parts:
        assert part in printed
    assert list(tmp_path.iterdir()) == []


def test_debug_raises_the_error():
    with pytest.raises(ValueError, match="--resume"):
        main(["--eval", "--debug"])


TRAIN = [
    *("--model", "localvit_nano_patch4_32", "--input-size", "32", "--data-set", "DIGITS", "--num_workers", "0"),
    *("--epochs", "3", "--warmup-epochs", "1", "--warmup-lr", "1e-3", "--lr", "0.02", "--min-lr", "0"),
]
LAUNCH = ["-m", "torch.distributed.launch", "--standalone", "--nproc_per_node=2", "--use_env"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    # 3 x 13 = 39 images: three steps of 12, or of 2 x 6, and a rest.
    return write_some_digits(tmp_path_factory.mktemp("digits"), classes=3, train=13, val=3)


def run_main(*arguments: object) -> None:
    """As `python main.py` does."""
    sys.argv = ["main.py", *map(str, arguments)]
    runpy.run_path(str(ROOT / "main.py"), run_name="__main__")


@pytest.fixture(scope="module", params=["one process", "two processes"])
def trained(request, digits, tmp_path_factory):
    """A run by the published command, by itself or as its launcher starts it: output, errors, folder, batch size."""
    folder = tmp_path_factory.mktemp("run")
    out, err, output_dir = folder / "out", folder / "err", folder / "run"
    flags = ["--data-path", digits, "--output_dir", output_dir, *TRAIN]
    if request.param == "one process":
        batch_size = 12
        status = status_of(
            start(run_main, *flags, "--batch-size", batch_size, out=out, err=err, environment=ENVIRONMENT)
        )
    else:
        batch_size = 6
        command = [sys.executable, *LAUNCH, "main.py", *flags, "--batch-size", str(batch_size)]
        with out.open("w") as out_file, err.open("w") as err_file:
            status = subprocess.run(
                command, cwd=ROOT, env=ENVIRONMENT, stdout=out_file, stderr=err_file, timeout=120
            ).returncode
    assert status == 0, err.read_text()
    return out.read_text(), err.read_text(), output_dir, batch_size


def rows_of(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "log.txt").read_text().splitlines()]


def test_training(trained, digits):
    out, err, output_dir, batch_size = trained
    assert out.startswith("Acc@1 ")
    assert out.count("\n") == 1, "only the first process prints the result"
    assert "no CUDA device on this machine; running on" in err

    rows = rows_of(output_dir)
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    # Two epochs at the first rate of the warm-up, then epoch 1 of 3 of the cosine, for 12 images per step.
    assert [row["train_lr"] for row in rows] == [1e-3, 1e-3, pytest.approx(0.75 * 0.02 * 12 / 512, rel=1e-12)]
    checkpoint = read_checkpoint(output_dir / "last.safetensors")
    assert checkpoint.class_names == ["0", "1", "2"]
    assert checkpoint.ema is not None
    config = to_config(parse([*TRAIN, "--batch-size", str(batch_size)]))
    expected = config.model_copy(update={"data_path": digits, "output_dir": output_dir})
    assert TrainConfig(**checkpoint.about["config"]) == expected


@pytest.fixture
def address(trained, monkeypatch, tmp_path):
    """The address of a local server with the run's folder; downloads go to a separate cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *arguments: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=trained[2]))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("trained", ["one process"], indirect=True)
def test_resuming_from_an_address_uses_the_epoch_of_the_checkpoint(trained, digits, address, tmp_path, capsys):
    output_dir = tmp_path / "further"
    flags = [*TRAIN, "--batch-size", "12", "--data-path", str(digits), "--device", "cpu", "--epochs", "4"]
    flags += ["--output_dir", str(output_dir), "--start_epoch", "1", "--resume"]
    assert main([*flags, f"{address}/none.pth"]) == 1
    assert f"could not download {address}/none.pth" in capsys.readouterr().err
    assert main([*flags, f"{address}/checkpoint.pth"]) == 0
    assert "--start_epoch 1 has no effect" in capsys.readouterr().err
    before, after = rows_of(trained[2]), rows_of(output_dir)
    assert [row["epoch"] for row in after] == [0, 1, 2, 3]
    assert after[:3] == before


@pytest.mark.parametrize(("environment", "rank"), [(None, "1"), ("3", "3")])
def test_the_rank_flag_is_used_without_the_environment_variable(environment, rank, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", environment or "")  # so that what the program sets is undone
    if environment is None:
        monkeypatch.delenv("LOCAL_RANK")
    assert main(["--local-rank=1", "--eval"]) == 2
    assert os.environ["LOCAL_RANK"] == rank


def test_the_default_number_of_workers_is_limited_to_the_cores(monkeypatch):
    """The published 10 workers on 2 cores open with a warning of torch, and are no faster."""
    monkeypatch.setattr("localvit_cli.published.cpu_cores", lambda: 3)
    asked = {}
    monkeypatch.setattr("localvit_cli.published.run_training", lambda config, resume: asked.update(config=config) or 0)
    for flags, workers in (([], 3), (["--num_workers", "10"], 3), (["--num_workers", "7"], 7)):
        assert main(flags) == 0
        assert asked["config"].workers == workers
