"""What a run keeps: all that changes while it trains, and the files that it leaves.

Random generators are no part of it, since every draw follows from where it is made (`localvit.data.training`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn

from localvit.checkpoints import save_checkpoint
from localvit.files import written_whole

LAST = "last.safetensors"
BEST = "best.safetensors"
LOG = "log.txt"

Row = dict[str, float]


@dataclass(kw_only=True)
class TrainState:
    """All that changes from step to step and from epoch to epoch."""

    model: nn.Module
    """The model in training, on its device."""
    ema: ModelEmaV3 | None
    """Running average of its parameters and buffers."""
    optimizer: torch.optim.Optimizer
    """Its parameters' optimiser."""
    scheduler: Scheduler
    """Sets the learning rate of each epoch."""
    scaler: torch.amp.GradScaler
    """Scales the loss in float16; idle in other precisions."""
    rows: list[Row] = field(default_factory=list)
    """A row of the log for each finished epoch."""

    @property
    def epoch(self) -> int:
        """The epoch to train next, from 0."""
        return len(self.rows)


def save_epoch(
    state: TrainState,
    directory: Path,
    *,
    class_names: Sequence[str] | None,
    preprocessing: Mapping[str, Any],
    config: Mapping[str, Any],
) -> None:
    """Write the models and the log of the epoch just finished, each file whole or not at all.

    `last.safetensors` holds the epoch's weights, `best.safetensors` those of the first epoch with the highest accuracy;
    `log.txt` has a JSON object a line and epoch, under the published program's keys.
    """
    row = state.rows[-1]
    is_best = all(row["test_acc1"] > earlier["test_acc1"] for earlier in state.rows[:-1])
    for name in (LAST, BEST) if is_best else (LAST,):
        save_checkpoint(
            state.model,
            directory / name,
            ema=state.ema.module.state_dict() if state.ema else None,
            class_names=class_names,
            preprocessing=preprocessing,
            about={"epoch": row["epoch"], "metrics": row, "config": dict(config)},
        )
    with written_whole(directory / LOG) as log:
        log.write_text("".join(json.dumps(each) + "\n" for each in state.rows))


def read_log(path: Path) -> list[Row]:
    """The rows of a log. Raises FileNotFoundError, or ValueError when it is no log or has no row."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no training log: {error}") from error
    if not rows:
        raise ValueError(f"{path} has no finished epoch")
    return rows
