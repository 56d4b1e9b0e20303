"""Several processes (gloo) against one, and what happens if one of them dies or has other settings."""

import json
import os
import signal
import subprocess
import time

import pytest
import torch
import yaml
from tiny import tiny_config, train
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import localvit_cli
from localvit.data.datasets import open_images
from localvit.evaluation.evaluate import evaluate
from localvit.inference.runner import InferenceOptions, load_model
from processes import free_port, run_localvit, start, start_group, status_of

STILL = {"mixup": 0.0, "cutmix": 0.0, "drop_path_rate": 0.0}
"""Without random numbers per batch, which differ if the batch is split over processes."""


def launched(processes, config_file, restarts):
    """The command in processes that torchrun's agent starts; it forks them, which have imported what they need."""
    options = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{free_port()}",
        rdzv_configs={"rank": 0},
        max_restarts=restarts,
        start_method="fork",
    )
    elastic_launch(options, trained)(config_file)


def trained(config_file):
    assert localvit_cli.main(["train", "--config", str(config_file)]) == 0


def written(path, config):
    path.write_text(yaml.safe_dump(config.to_dict()))
    return path


def log_of(processes, data, folder, **changes):
    config = tiny_config(data, folder / f"run{processes}", batch_size=12 // processes, **changes)
    if processes == 1:
        train(config)
    else:
        file, err = written(folder / f"c{processes}.yaml", config), folder / f"err{processes}"
        group = start_group(processes, run_localvit, "train", "--config", file, out=folder / "out", err=err)
        assert [status_of(each) for each in group] == [0] * processes, err.read_text()
    return [json.loads(line) for line in (config.output_dir / "log.txt").read_text().splitlines()]


def test_processes_compute_the_same_as_one_process(tiny_digits, tmp_path):
    """The same global batch, BatchNorm over all of it: equal to rounding."""
    changes = dict(STILL, sync_bn=True, opt="momentum", lr=0.5)
    one = log_of(1, tiny_digits, tmp_path, **changes)
    rows = log_of(4, tiny_digits, tmp_path, **changes)
    for row, expected in zip(rows, one, strict=True):
        assert row["train_lr"] == expected["train_lr"]
        # float32 sums in another order, through six BatchNorm networks and six steps
        assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-3)
        assert row["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-2)


def test_without_sync_bn_all_processes_use_the_statistics_of_rank_0(tiny_digits, tmp_path):
    """Each process evaluates a part of the images; the result is that of the saved model only if all agree."""
    (_, row) = log_of(2, tiny_digits, tmp_path, **STILL, lr=0.5)
    ready = load_model(str(tmp_path / "run2" / "last.safetensors"))
    options = InferenceOptions(batch_size=3, workers=0, device=torch.device("cpu"))
    images = open_images("DIGITS", tiny_digits)
    result = evaluate(ready.model, images, ready.preprocessing, options, class_names=ready.class_names)
    # Another batch size sums float32 products in another order.
    assert row["test_loss"] == pytest.approx(result.loss, rel=1e-4)


def test_a_killed_process_resumes_automatically(tiny_digits, tmp_path):
    """torchrun's agent restarts both processes; their log is that of an uninterrupted run."""
    changes = {"epochs": 3, "checkpoint_steps": 1}
    expected = log_of(2, tiny_digits, tmp_path, **changes)
    config = tiny_config(tiny_digits, tmp_path / "killed", batch_size=6, **changes)
    out = tmp_path / "output"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    run = start(launched, 2, written(tmp_path / "killed.yaml", config), 2, out=out, err=out, environment=environment)
    log = tmp_path / "killed" / "log.txt"
    while not log.exists() and run.is_alive():
        time.sleep(0.05)
    trainers = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(trainers[0]), signal.SIGKILL)
    assert status_of(run, timeout=180) == 0, out.read_text()
    assert "resuming from" in out.read_text()
    assert [json.loads(line) for line in log.read_text().splitlines()] == expected


def run_with_own_settings(folder):
    run_localvit("train", "--config", folder / f"settings{os.environ['RANK']}.yaml")


def test_processes_with_different_settings_stop_and_name_them(tiny_digits, tmp_path):
    """Each process reads another settings file."""
    for rank, lr in enumerate((0.1, 0.2)):
        written(tmp_path / f"settings{rank}.yaml", tiny_config(tiny_digits, tmp_path / "run", lr=lr))
    err = tmp_path / "err"
    group = start_group(2, run_with_own_settings, tmp_path, out=tmp_path / "out", err=err)
    assert [status_of(each) for each in group] == [1, 1]
    lines = [line for line in err.read_text().splitlines() if "the processes differ in the setting lr" in line]
    assert len(lines) == 2
    for line in lines:
        assert "0.1" in line
        assert "0.2" in line
    assert not (tmp_path / "run").exists()
