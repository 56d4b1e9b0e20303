"""The result of a run, and the report `summary.md` in its folder."""

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
from localvit.train.run_folder import BEST, saved_epoch
from localvit.train.state import Row, may_be_best
from localvit.train.trackers import CURVES
from localvit.utils.distributed import world_size
from localvit.utils.files import atomic_write
from localvit.utils.intervals import interval_text
from localvit.utils.tables import format_table

SUMMARY = "summary.md"


@dataclass(frozen=True, kw_only=True, repr=False)
class RunResult:
    """The result of the finished epochs of a run. It prints as a table. None means not measured in every epoch.

    Rows have the keys of the log: train_lr, train_loss, test_loss, test_acc1 and test_acc5 (percent), epoch (from 0),
    n_parameters; and, if measured, test_images, the number of validation images.
    """

    num_epochs: int
    """Number of finished epochs."""
    best: Row
    """Row of the first epoch with the highest Acc@1, of those whose loss is not NaN if there are any."""
    last: Row
    """Row of the last epoch."""
    seconds: float | None
    """Duration of all training steps, without evaluation."""
    images_per_second: float | None
    """Training speed over all processes: median over the epochs."""
    peak_memory_mb: float | None
    """Peak memory in MB."""
    skipped_steps: float | None
    """Number of steps skipped because a loss or gradient was not finite."""

    @classmethod
    def of(cls, metrics: Sequence[Row]) -> "RunResult":
        """The result from at least one row, with the keys of the log and, if measured, those of metrics.csv."""

        def over_epochs(reduce: Any, key: str) -> float | None:
            return reduce(row[key] for row in metrics) if all(key in row for row in metrics) else None

        return cls(
            num_epochs=len(metrics),
            best=max(metrics, key=lambda row: (may_be_best(row), row["test_acc1"])),
            last=metrics[-1],
            seconds=over_epochs(sum, "seconds"),
            images_per_second=over_epochs(median, "images_per_second"),
            peak_memory_mb=over_epochs(max, "peak_memory_mb"),
            skipped_steps=metrics[-1].get("skipped_steps"),
        )

    def to_rows(self) -> list[tuple[str, str]]:
        """Names and texts with units, for a table. Epochs count from 1."""
        measured = (
            (
                "time",
                self.seconds,
                lambda seconds: f"{timedelta(seconds=round(seconds))} (h:mm:ss), without evaluation",
            ),
            ("speed", self.images_per_second, lambda rate: f"{rate:,.1f} images/s"),
            ("peak memory", self.peak_memory_mb, lambda memory: f"{memory:,.0f} MB"),
            ("skipped steps", self.skipped_steps, lambda steps: f"{steps:,.0f}"),
        )
        return [
            ("best epoch", _epoch_text(self.best)),
            ("last epoch", _epoch_text(self.last)),
            *((name, text(value)) for name, value, text in measured if value is not None),
        ]

    def __repr__(self) -> str:
        return format_table(self.to_rows())


def summary_rows(config: TrainConfig, result: RunResult, device: torch.device) -> list[tuple[str, str]]:
    """The run and its result, as names and texts with units."""
    return [
        ("model", f"{config.model}, {result.last['n_parameters']:,.0f} parameters trained"),
        ("data", config.data_set + (f", {config.data_path}" if config.data_path else "")),
        ("epochs", f"{result.num_epochs} of {config.epochs}"),
        *result.to_rows(),
        ("device", _device_text(device)),
    ]


def write_summary(config: TrainConfig, result: RunResult, device: torch.device) -> Path:
    """Write the report of a run to its folder as Markdown, and return the path.

    Args:
        config: the settings of the run.
        result: of the finished epochs.
        device: the device of the run.
    """
    defaults = TrainConfig().to_dict()
    settings = [
        (name, setting_text(value), setting_text(defaults[name]))
        for name, value in config.to_dict().items()
        if value != defaults[name] and name != "output_dir"
    ]
    parts = [
        f"# {config.model} on {config.data_set}",
        _table(("", ""), summary_rows(config, result, device)),
        "Epochs count from 1 here, and from 0 in log.txt and metrics.csv. Losses are in nats.",
    ]
    if (config.output_dir / CURVES).exists():
        parts.append(f"![Loss and accuracy by epoch]({CURVES})")
    parts += ["## Next steps", *_commands(config, result)]
    parts.append("## Settings that differ from the defaults")
    parts.append(_table(("setting", "value", "default"), settings) if settings else "None.")
    parts += ["## Versions", _table(("", ""), list(versions().items()))]
    with atomic_write(config.output_dir / SUMMARY) as file:
        # Paths that are not valid UTF-8 contain lone surrogates, which UTF-8 cannot encode.
        file.write_text("\n\n".join(parts) + "\n", encoding="utf-8", errors="backslashreplace")
    return config.output_dir / SUMMARY


def setting_text(value: Any) -> str:
    """The value of a setting, written so that YAML can read it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _epoch_text(row: Row) -> str:
    acc1 = f"{row['test_acc1']:.3f} %"
    if "test_images" in row:
        acc1 += f" (95 % interval {interval_text(row['test_acc1'], int(row['test_images']))})"
    return (
        f"{row['epoch'] + 1:.0f}: Acc@1 {acc1}, Acc@5 {row['test_acc5']:.3f} %, "
        f"validation loss {row['test_loss']:.4f}, training loss {row['train_loss']:.4f}"
    )


def _device_text(device: torch.device) -> str:
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
    )
    return name if world_size() == 1 else f"{world_size()} x {name}"


def _commands(config: TrainConfig, result: RunResult) -> list[str]:
    evaluation = ["localvit", "eval", str(config.output_dir / BEST), "--data-set", config.data_set]
    saved = saved_epoch(config.output_dir / BEST) or result.best
    if saved["epoch"] == result.best["epoch"]:
        epoch = "the best epoch"
    else:
        epoch = f"epoch {saved['epoch'] + 1:.0f}, the best whose weights are known"
    introduction = f"Evaluate {epoch}:"
    if config.data_set.upper() == "FOLDER" and config.data_path and not (config.data_path / "val").is_dir():
        introduction = (
            f"Evaluate {epoch} on other images. Most images in this folder were used for training, because it has no "
            "val/."
        )
        evaluation += ["--data-path", "OTHER_IMAGES"]
    elif config.data_path:
        evaluation += ["--data-path", str(config.data_path)]
    if config.data_set.upper() in ("INAT", "INAT19"):
        evaluation += ["--inat-category", config.inat_category]
    texts = [introduction, _code(evaluation)]
    if result.num_epochs != config.epochs:
        resuming = ["localvit", "train", "--resume", "auto", "--output-dir", str(config.output_dir)]
        texts += ["Resume the run:", _code(resuming)]
    return texts


def _code(command: Sequence[str]) -> str:
    return f"```bash\n{shlex.join(command)}\n```"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = (headings, ["---"] * len(headings), *([cell.replace("|", "\\|") for cell in row] for row in rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
