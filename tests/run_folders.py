"""Output folders of runs, written by hand."""

import csv
import json
from pathlib import Path

import yaml

from localvit.train.config import TrainConfig

SETTINGS = {"model": "localvit_nano_patch4_32", "data_set": "DIGITS", "warmup_epochs": 1, "epochs": 3}


def log_row(epoch: int, acc1: float, loss: float = 1.25) -> dict:
    """A row of the log, with the published keys."""
    values = {"train_lr": 1e-3, "train_loss": loss + 0.5, "test_loss": loss, "test_acc1": acc1, "test_acc5": 97.0}
    return values | {"epoch": epoch, "n_parameters": 731_074}


def write_run(folder: Path, accuracies: list[float], *, metrics: dict | None = None, **settings) -> Path:
    """Write the folder of a run with one epoch per accuracy; `metrics` are the measurements of every epoch."""
    folder.mkdir(parents=True, exist_ok=True)
    config = TrainConfig(**(SETTINGS | {"output_dir": str(folder)} | settings))
    (folder / "config.yaml").write_text("# torch: 2\n" + yaml.safe_dump(config.to_dict()))
    rows = [log_row(epoch, acc1, loss=2.0 - acc1 / 100) for epoch, acc1 in enumerate(accuracies)]
    if rows:
        (folder / "log.txt").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if metrics:
        with (folder / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *metrics])
            writer.writeheader()
            writer.writerows(row | metrics for row in rows)
    return folder
