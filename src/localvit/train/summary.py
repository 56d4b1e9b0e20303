"""What a run came to: its numbers in short, and the report for a person that lies beside its log."""

import json
import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch

from localvit.checkpoints import versions
from localvit.train.config import TrainConfig
from localvit.train.run_folder import BEST
from localvit.train.state import Row
from localvit.train.trackers import CURVES
from localvit.utils.distributed import world_size
from localvit.utils.files import atomic_write

SUMMARY = "summary.md"


@dataclass(frozen=True, kw_only=True)
class RunNumbers:
    """A run's finished epochs in short; None for what was not measured in each of them."""

    best: Row
    """The row of the first epoch with the highest accuracy."""
    last: Row
    """The row of the last epoch."""
    seconds: float | None
    """Time of all training steps, without evaluation."""
    images_per_second: float | None
    """Images trained on a second, over all processes: the median of the epochs."""
    peak_memory_mb: float | None
    """Most memory in use, in MB."""
    skipped_steps: float | None
    """Steps of the run that were skipped because their loss was not finite, which each row counts from the start."""

    @classmethod
    def of(cls, metrics: Sequence[Row]) -> "RunNumbers":
        """Of at least one row, each of the log's keys and, where measured, those that metrics.csv has beside them."""

        def over_epochs(fold: Any, key: str) -> float | None:
            return fold(row[key] for row in metrics) if all(key in row for row in metrics) else None

        return cls(
            best=max(metrics, key=lambda row: row["test_acc1"]),
            last=metrics[-1],
            seconds=over_epochs(sum, "seconds"),
            images_per_second=over_epochs(median, "images_per_second"),
            peak_memory_mb=over_epochs(max, "peak_memory_mb"),
            skipped_steps=metrics[-1].get("skipped_steps"),
        )


def summary_rows(config: TrainConfig, metrics: Sequence[Row], device: torch.device) -> list[tuple[str, str]]:
    """What a run came to, as pairs of a name and a text with units; `metrics` has a row for each finished epoch."""
    numbers = RunNumbers.of(metrics)
    measured = (
        ("time", numbers.seconds, lambda seconds: f"{timedelta(seconds=round(seconds))} (h:mm:ss), without evaluation"),
        ("speed", numbers.images_per_second, lambda rate: f"{rate:,.1f} images/s"),
        ("peak memory", numbers.peak_memory_mb, lambda memory: f"{memory:,.0f} MB"),
        ("skipped steps", numbers.skipped_steps, lambda steps: f"{steps:,.0f}"),
    )
    return [
        ("model", f"{config.model}, {numbers.last['n_parameters']:,.0f} parameters trained"),
        ("data", config.data_set + (f", {config.data_path}" if config.data_path else "")),
        ("epochs", f"{len(metrics)} of {config.epochs}"),
        ("best epoch", _epoch_text(numbers.best)),
        ("last epoch", _epoch_text(numbers.last)),
        *((name, text(value)) for name, value, text in measured if value is not None),
        ("device", _device_text(device)),
    ]


def write_summary(config: TrainConfig, metrics: Sequence[Row], device: torch.device) -> Path:
    """Write the report of a run into its folder, as Markdown, and return its path.

    Args:
        config: what the run was told.
        metrics: a row for each finished epoch, at least one.
        device: where the run ran.
    """
    defaults = TrainConfig().to_dict()
    settings = [
        (name, setting_text(value), setting_text(defaults[name]))
        for name, value in config.to_dict().items()
        if value != defaults[name] and name != "output_dir"
    ]
    parts = [
        f"# {config.model} on {config.data_set}",
        _table(("", ""), summary_rows(config, metrics, device)),
        "Epochs are counted from 0, as in log.txt; losses are in nats.",
    ]
    if (config.output_dir / CURVES).exists():
        parts.append(f"![Loss and accuracy by epoch]({CURVES})")
    parts += ["## What to do with it", *_commands(config, finished=len(metrics) == config.epochs)]
    parts.append("## Settings that differ from the defaults")
    parts.append(_table(("setting", "value", "default"), settings) if settings else "None.")
    parts += ["## Versions", _table(("", ""), list(versions().items()))]
    with atomic_write(config.output_dir / SUMMARY) as file:
        file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return config.output_dir / SUMMARY


def setting_text(value: Any) -> str:
    """The value of a setting in words, spelled as YAML reads it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _epoch_text(row: Row) -> str:
    return (
        f"{row['epoch']:.0f}: Acc@1 {row['test_acc1']:.3f} %, Acc@5 {row['test_acc5']:.3f} %, "
        f"validation loss {row['test_loss']:.4f}, training loss {row['train_loss']:.4f}"
    )


def _device_text(device: torch.device) -> str:
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
    )
    return name if world_size() == 1 else f"{world_size()} x {name}"


def _commands(config: TrainConfig, *, finished: bool) -> list[str]:
    evaluation = ["localvit", "eval", str(config.output_dir / BEST), "--data-set", config.data_set]
    before = "Evaluate the best epoch:"
    if config.data_set.upper() == "FOLDER" and config.data_path and not (config.data_path / "val").is_dir():
        before = (
            "Evaluate the best epoch, on other images: the seed split those of this folder, and most of them were "
            "trained on."
        )
        evaluation += ["--data-path", "OTHER_IMAGES"]
    elif config.data_path:
        evaluation += ["--data-path", str(config.data_path)]
    if config.data_set.upper() in ("INAT", "INAT19"):
        evaluation += ["--inat-category", config.inat_category]
    texts = [before, _code(evaluation)]
    if not finished:
        resuming = ["localvit", "train", "--resume", "auto", "--output-dir", str(config.output_dir)]
        texts += ["Go on to the last epoch:", _code(resuming)]
    return texts


def _code(command: Sequence[str]) -> str:
    return f"```bash\n{shlex.join(command)}\n```"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = (headings, ["---"] * len(headings), *([cell.replace("|", "\\|") for cell in row] for row in rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
