"""What a run keeps: all that changes while it trains, and the entries of a file from which it goes on.

Random generators are no part of it, since every draw follows from where it is made (`localvit.data.training_batches`).
"""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from localvit.checkpoints import HEADER
from localvit.models.published_names import published_key, to_own_names, to_published_names
from localvit.train.optimization import set_learning_rate
from localvit.utils.weight_files import CheckpointError

Row = dict[str, float]


@dataclass(kw_only=True)
class TrainState:
    """All that changes from step to step and from epoch to epoch."""

    model: nn.Module
    """The model in training, on its device."""
    ema: ModelEmaV3 | None
    """Running average of its parameters and buffers."""
    optimizer: torch.optim.Optimizer
    """Its parameters' optimizer."""
    scheduler: Scheduler
    """Sets the learning rate."""
    scaler: torch.amp.GradScaler
    """Scales the loss in float16; idle in other precisions."""

    epoch: int = 0
    """The epoch in training, from 0."""
    step: int = 0
    """Steps of that epoch that are done."""
    losses: list[float] = field(default_factory=list)
    """The loss of each of them that was not skipped, over all processes."""
    seconds: float = 0.0
    """Time spent on them."""
    skipped: int = 0
    """Steps of the run that were skipped because their loss was not finite."""
    skipped_in_row: int = 0
    """Those of them that came last."""
    rows: list[Row] = field(default_factory=list)
    """For each finished epoch, its row of the log."""
    metrics: list[Row] = field(default_factory=list)
    """For each finished epoch, what was measured beside: it may differ between two runs of one seed."""

    def finish_epoch(self, row: Row, measured: Row) -> None:
        """Note the row of the epoch, and go to the next one."""
        self.rows.append(row)
        self.metrics.append(row | measured)
        self.epoch += 1
        self.step = 0
        self.losses = []
        self.seconds = 0.0

    def begin_epoch(self) -> None:
        """Put the learning rate of the epoch in force. Call it once an epoch."""
        self._set_learning_rate(self.epoch)

    def _set_learning_rate(self, epoch: int) -> None:
        acc1 = {row["epoch"]: row["test_acc1"] for row in self.rows}
        set_learning_rate(self.scheduler, epoch, acc1.get(epoch - 1))

    @property
    def best(self) -> Row | None:
        """The row of the first epoch with the highest accuracy."""
        return max(self.rows, key=lambda row: row["test_acc1"], default=None)

    def to_entries(self, description: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of the published program's checkpoints, and under `localvit` ours.

        `epoch` is the last finished one, as there. Weights go by their published names; the optimizer's state is in the
        order of `parameter_names`.

        Args:
            description: what `checkpoints.make_header` says of the model; its `about` holds the config.
        """
        config = description["about"]["config"]
        return {
            "model": to_published_names(self.model, self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "epoch": self.epoch - 1,
            "model_ema": to_published_names(self.model, self.ema.module.state_dict()) if self.ema else None,
            "scaler": self.scaler.state_dict(),
            "args": Namespace(**config),
            HEADER: {
                **description,
                "parameter_names": _parameter_names(self.model, self.optimizer),
                "progress": {name: getattr(self, name) for name in _PROGRESS},
            },
        }

    def load_entries(self, entries: Mapping[str, Any]) -> None:
        """Go on from the entries of `to_entries`, or from those of the published program's, after its last epoch.

        Raises CheckpointError when they are of another model or optimizer, or have no optimizer at all.
        """
        if not isinstance(entries.get("optimizer"), Mapping):
            raise CheckpointError("it holds weights but no optimizer: begin a new run from it with --finetune")
        _load_weights(self.model, entries["model"])
        if self.ema:
            _load_weights(self.ema.module, entries.get("model_ema") or entries["model"])
        if entries.get("scaler"):
            self.scaler.load_state_dict(entries["scaler"])
        ours = entries.get(HEADER)
        progress = ours["progress"] if ours else {"epoch": entries["epoch"] + 1}
        for name, value in progress.items():
            setattr(self, name, value)
        # A schedule follows from the epochs gone by, and timm's plateau does not save all that it counts.
        for epoch in range(self.epoch + (self.step > 0)):
            self._set_learning_rate(epoch)
        names = ours["parameter_names"] if ours else _published_parameter_names(self, entries["model"])
        _load_optimizer(self, entries["optimizer"], names)


_PROGRESS = ("epoch", "step", "losses", "seconds", "skipped", "skipped_in_row", "rows", "metrics")


def _load_weights(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    own = to_own_names(state_dict, model)
    try:
        model.load_state_dict(own)
    except RuntimeError as error:
        raise CheckpointError(f"its weights are of another model or image size: {error}") from error


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The published names of the optimizer's parameters, in its order."""
    name_of = {parameter: published_key(model, name) for name, parameter in model.named_parameters()}
    return [name_of[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _published_parameter_names(state: TrainState, published: Mapping[str, Tensor]) -> list[str]:
    """The names of a published optimizer's parameters: the same two groups as ours, each in the published order."""
    names = iter(_parameter_names(state.model, state.optimizer))
    groups = [{next(names) for _ in group["params"]} for group in state.optimizer.param_groups]
    return [name for group in groups for name in published if name in group]


def _load_optimizer(state: TrainState, saved: Mapping[str, Any], names: list[str]) -> None:
    """Load an optimizer's state dict whose parameters are called `names`, in its order."""
    own = state.optimizer.state_dict()
    own_order = _parameter_names(state.model, state.optimizer)
    counts = [len(group["params"]) for group in saved["param_groups"]]
    if set(own_order) != set(names) or counts != [len(group["params"]) for group in own["param_groups"]]:
        raise CheckpointError(
            "its optimizer is of other parameters or groups: resume with the same model, freeze, weight_decay and "
            "layer_decay"
        )
    number_of = {name: number for number, name in enumerate(names)}
    moments = {
        number: saved["state"][number_of[name]]
        for number, name in enumerate(own_order)
        if number_of[name] in saved["state"]
    }
    groups = [
        ours | theirs | {"params": ours["params"]}
        for ours, theirs in zip(own["param_groups"], saved["param_groups"], strict=True)
    ]
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
