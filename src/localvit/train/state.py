"""The state of a run: all that changes during training, and the checkpoint entries that restore it.

The state of random generators is not part of it: they are seeded for each image and step
(`localvit.data.training_batches`).
"""

import math
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


def may_be_best(row: Row) -> bool:
    """Whether an epoch has a finite loss. A model whose output is not finite is never the best."""
    return not math.isnan(row.get("test_loss", 0.0))


@dataclass(kw_only=True)
class TrainState:
    """All that changes during training."""

    model: nn.Module
    """The model, on its device."""
    ema: ModelEmaV3 | None
    """Moving average of parameters and buffers."""
    optimizer: torch.optim.Optimizer
    """The optimizer."""
    scheduler: Scheduler
    """The learning rate schedule."""
    scaler: torch.amp.GradScaler
    """Scales the loss in float16; disabled in other precisions."""

    epoch: int = 0
    """The current epoch, from 0."""
    step: int = 0
    """Number of steps finished in the current epoch."""
    losses: list[float] = field(default_factory=list)
    """The loss of each finished step that was not skipped, averaged over all processes."""
    seconds: float = 0.0
    """Duration of these steps."""
    skipped: int = 0
    """Number of steps of the run skipped because a loss or gradient was not finite."""
    skipped_in_row: int = 0
    """Number of the most recent steps that were skipped in a row."""
    rows: list[Row] = field(default_factory=list)
    """Row of the log for each finished epoch."""
    metrics: list[Row] = field(default_factory=list)
    """The same rows with measurements, which may differ between two runs with the same seed."""

    @property
    def num_trained_parameters(self) -> int:
        """Number of parameters that are not frozen."""
        return sum(each.numel() for each in self.model.parameters() if each.requires_grad)

    def finish_epoch(self, row: Row, measured: Row) -> None:
        """Record the epoch's row, and advance to the next epoch."""
        self.rows.append(row)
        self.metrics.append(row | measured)
        self.epoch += 1
        self.step = 0
        self.losses = []
        self.seconds = 0.0

    def begin_epoch(self) -> None:
        """Set the learning rate of the epoch. Call it once per epoch."""
        self._set_learning_rate(self.epoch)

    def _set_learning_rate(self, epoch: int) -> None:
        acc1 = {row["epoch"]: row["test_acc1"] for row in self.rows}
        set_learning_rate(self.scheduler, epoch, acc1.get(epoch - 1))

    @property
    def best(self) -> Row | None:
        """The row of the first epoch with the highest accuracy. An epoch whose loss is NaN is never the best."""
        return max(filter(may_be_best, self.rows), key=lambda row: row["test_acc1"], default=None)

    def to_entries(self, description: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of a training checkpoint: those of the published program, and ours under `localvit`.

        As published, `epoch` is the last finished epoch, from 0, and weights have their published names. The state of
        the optimizer is in the order of `parameter_names`.

        Args:
            description: from `checkpoints.make_header`; its `about` contains the settings.
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
        """Restore the state from the entries of `to_entries`, or of the published program after its last epoch.

        Raises CheckpointError if they are for another model or optimizer, or contain no optimizer.
        """
        if not isinstance(entries.get("optimizer"), Mapping):
            raise CheckpointError(
                "the checkpoint contains weights but no optimizer: start a new run from it with --finetune"
            )
        _load_weights(self.model, entries["model"])
        if self.ema:
            _load_weights(self.ema.module, entries.get("model_ema") or entries["model"])
        if entries.get("scaler"):
            self.scaler.load_state_dict(entries["scaler"])
        ours = entries.get(HEADER)
        progress = ours["progress"] if ours else {"epoch": entries["epoch"] + 1}
        for name, value in progress.items():
            setattr(self, name, value)
        # The schedule is replayed, because timm's plateau schedule does not save all of its state.
        for epoch in range(self.epoch + (self.step > 0)):
            self._set_learning_rate(epoch)
        names = (
            ours["parameter_names"]
            if ours
            else _published_parameter_names(self, entries["model"], entries["optimizer"])
        )
        _load_optimizer(self, entries["optimizer"], names)


_COUNTERS = ("step", "lookahead_step")
"""What some of timm's optimizers count in their groups, beside the settings."""
_PROGRESS = ("epoch", "step", "losses", "seconds", "skipped", "skipped_in_row", "rows", "metrics")


def _load_weights(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    own = to_own_names(state_dict, model)
    try:
        model.load_state_dict(own)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint's weights are for another model or image size: {error}") from error


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The published names of the optimizer's parameters, in its order."""
    name_of = {parameter: published_key(model, name) for name, parameter in model.named_parameters()}
    return [name_of[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _unused_names(model: nn.Module) -> set[str]:
    """Published names of norms that are buffers here, because nothing uses them, and were parameters in other files.

    The published program has them in its optimizer without weight decay, and so had earlier versions of this package.
    """
    return {published_key(model, name) for name, _ in model.named_buffers() if name.endswith((".weight", ".bias"))}


def _published_parameter_names(
    state: TrainState, published: Mapping[str, Tensor], saved: Mapping[str, Any]
) -> list[str]:
    """Parameter names in the order of a published optimizer: the same two groups as ours, in published order."""
    names = iter(_parameter_names(state.model, state.optimizer))
    groups = [{next(names) for _ in group["params"]} for group in state.optimizer.param_groups]
    groups[0] |= _unused_names(state.model) & published.keys()
    if [len(group["params"]) for group in saved["param_groups"]] != [len(group) for group in groups]:
        raise CheckpointError(
            "the optimizer of the published program has other groups of parameters: resume with the same model, and "
            "without --freeze, --layer-decay and --locality-lr-scale"
        )
    return [name for group in groups for name in published if name in group]


def _load_optimizer(state: TrainState, saved: Mapping[str, Any], names: list[str]) -> None:
    """Load the state dict of an optimizer whose parameters have these `names`, in its order.

    The settings remain those of the present optimizer, and so may the groups. From the saved one are what it has
    computed for each parameter, its counters, its random generator, and the learning rate of a schedule that changes it
    every step, because it is already that of the last step.
    """
    own = state.optimizer.state_dict()
    own_order = _parameter_names(state.model, state.optimizer)
    count = sum(len(group["params"]) for group in saved["param_groups"])
    if set(own_order) != set(names) - _unused_names(state.model) or count != len(names):
        raise CheckpointError(
            "the checkpoint's optimizer has other parameters: resume with the same model and the same frozen parameters"
        )
    number_of = {name: number for number, name in enumerate(names)}
    group_of = {number: group for group in saved["param_groups"] for number in group["params"]}
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: _in_layout_of(parameters[number], saved["state"][number_of[name]])
        for number, name in enumerate(own_order)
        if number_of[name] in saved["state"]
    }
    kept = _COUNTERS if state.scheduler.t_in_epochs else (*_COUNTERS, "lr")
    groups = []
    for group in own["param_groups"]:
        theirs = group_of[number_of[own_order[group["params"][0]]]]
        groups.append(group | {key: theirs[key] for key in kept if key in theirs})
    state.optimizer.load_state_dict({**saved, "state": moments, "param_groups": groups})


def _in_layout_of(parameter: Tensor, moments: Mapping[str, Any]) -> dict[str, Any]:
    """What an optimizer has computed for a parameter, in the memory format of the parameter.

    Fused optimizers read all tensors in the order of memory, so moments of another format (channels_last) would be
    those of other elements.
    """
    return {
        name: torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride()
        else value
        for name, value in moments.items()
    }
