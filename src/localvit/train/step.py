"""One training step: forward and backward for some batches, then the update, unless a number is not finite.

A step changes weights, optimizer, buffers and moving average, or none of them.

Shapes: B images of a batch, C channels, H and W pixels, M classes.
"""

import contextlib
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from localvit.data.training_batches import RandomPurpose, seed_random
from localvit.train.builder import Training
from localvit.train.cuda_graph import GraphedModel
from localvit.train.device_batches import DeviceBatches
from localvit.utils.distributed import rank, world_size


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The outcome of a step; the same on all processes."""

    loss: float
    """Mean over the batches of the step and all processes."""
    stop: bool
    """Whether a process was asked to stop before the end of the step."""
    nonfinite: str | None = None
    """What was not finite, so that the step changed nothing: the loss, or the gradient of a parameter."""


def train_step(training: Training, batches: DeviceBatches, *, stop: bool) -> StepResult:
    """Take the next step of the current epoch. If it raises, or the loss or a gradient is not finite, nothing changes.

    In float16, gradients may overflow because of the scaled loss. Such a step changes nothing but the scale, and is not
    reported as nonfinite unless the loss is no longer scaled up.

    Args:
        training: the run; its state is updated in place.
        batches: the remaining batches of the epoch, of which this takes `grad_accum`.
        stop: whether this process was asked to stop; shared with all processes.
    """
    state, scaler = training.state, training.state.scaler
    training.saved_buffers.save()
    state.optimizer.zero_grad()
    try:
        loss, stops = _forward_backward(training, batches, stop=stop)
    except BaseException:
        training.saved_buffers.restore()
        state.optimizer.zero_grad()
        raise
    nonfinite = None if math.isfinite(loss) else f"the loss is {loss}"
    is_applied = nonfinite is None
    if is_applied:
        scaler.unscale_(state.optimizer)
        gradients = [each.grad for each in state.model.parameters() if each.grad is not None]
        norm = get_total_norm(gradients)
        if is_applied := bool(norm.isfinite()):
            if training.config.clip_grad is not None:
                clip_grads_with_norm_(state.model.parameters(), training.config.clip_grad, norm)
            scaler.step(state.optimizer)
            if state.ema:
                state.ema.update(state.model)
        elif scaler.get_scale() <= 1:
            nonfinite = _describe_gradient(state.model, norm)
        scaler.update()
    if not is_applied:
        training.saved_buffers.restore()
        state.optimizer.zero_grad()
    return StepResult(loss=loss, stop=stops > 0, nonfinite=nonfinite)


def _forward_backward(training: Training, batches: DeviceBatches, *, stop: bool) -> tuple[float, float]:
    """Accumulate the gradients of a step. Returns its loss, and the number of processes that were asked to stop."""
    config, state, device = training.config, training.state, training.options.device
    state.model.train()
    total = torch.zeros((), device=device)
    for number in range(config.grad_accum):
        is_last = number == config.grad_accum - 1
        images_BCHW, targets = prepare_batch(training, *next(batches), state.step * config.grad_accum + number)
        with contextlib.nullcontext() if is_last else _no_gradient_exchange(training.wrapped_model):
            with training.options.autocast():
                outputs = training.wrapped_model(images_BCHW)
                loss = training.criterion(images_BCHW, outputs, targets) / config.grad_accum
            total = total + loss.detach()
            if is_last:
                sums = _AsyncSum(torch.stack((total, torch.full_like(total, float(stop)))))
            state.scaler.scale(loss).backward()
        if number == 0 and not is_last and isinstance(training.wrapped_model, GraphedModel):
            training.wrapped_model.keep_gradients()
        batches.fetch()
    loss_sum, stops = sums.read()
    return loss_sum / world_size(), stops


def _describe_gradient(model: nn.Module, norm: Tensor) -> str:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"the gradient of {name} is not finite"
    return f"the norm of the gradient is {norm.item()}, although each of its elements is finite"


def prepare_batch(training: Training, images_BCHW: Tensor, labels_B: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Mix batch `number` of the current epoch, which is on the device.

    With mixing, labels (B) become probabilities (B, M). Also seeds the random numbers of the forward pass.
    """
    seed_random(training.config.seed, RandomPurpose.STEP, training.state.epoch, number, rank())
    return training.mixup(images_BCHW, labels_B) if training.mixup else (images_BCHW, labels_B)


def _no_gradient_exchange(wrapped_model: nn.Module) -> contextlib.AbstractContextManager:
    """Gradients are averaged over processes only in the last batch of a step."""
    inner = getattr(wrapped_model, "_orig_mod", wrapped_model)
    return inner.no_sync() if isinstance(inner, DistributedDataParallel) else contextlib.nullcontext()


class _AsyncSum:
    """Sums numbers over all processes and copies them to the CPU, while the device runs the backward pass."""

    def __init__(self, values: Tensor) -> None:
        if world_size() > 1:
            dist.all_reduce(values)
        self._values = values.to("cpu", non_blocking=values.is_cuda)
        self._copied = torch.cuda.Event() if values.is_cuda else None
        if self._copied:
            self._copied.record()

    def read(self) -> list[float]:
        """The sums; waits until they are copied."""
        if self._copied:
            self._copied.synchronize()
        return self._values.tolist()
