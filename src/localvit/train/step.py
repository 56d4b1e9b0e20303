"""One step of training: some batches forward and backward, and the optimizer, unless the loss is not finite.

Shapes: B images of a batch, C channels, H and W pixels, M classes.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from localvit.data.training_batches import RandomPurpose, seed_random
from localvit.train.build import Training
from localvit.train.model import restore
from localvit.utils.distributed import rank, world_size


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """How a step went."""

    loss: float
    """Mean over its batches and all processes; the same number on each of them."""
    stop: bool
    """Whether some process was asked to stop before the step ended."""


def train_step(training: Training, batches: Iterator[tuple[Tensor, Tensor]], *, stop: bool) -> StepResult:
    """Take the next step of the state's epoch, which changes nothing at all when the loss is not finite.

    The loss is read while the backward pass runs, so that an accelerator never waits for this process.

    Args:
        batches: the rest of the epoch's, of which this takes `grad_accum`.
        stop: whether this process was asked to stop; told to all of them in passing.
    """
    config, state, device = training.config, training.state, training.options.device
    buffers_before = [buffer.clone() for buffer in state.model.buffers()]
    state.model.train()
    state.optimizer.zero_grad()
    total = torch.zeros((), device=device)
    for number in range(config.grad_accum):
        is_last = number == config.grad_accum - 1
        images_BCHW, targets = prepare_batch(training, *next(batches), state.step * config.grad_accum + number)
        with contextlib.nullcontext() if is_last else _gradients_kept_here(training.trained):
            with training.options.autocast():
                loss = training.criterion(images_BCHW, training.trained(images_BCHW), targets) / config.grad_accum
            total = total + loss.detach()
            if is_last:
                told = _OnItsWay(torch.stack((total, torch.full_like(total, float(stop)))))
            state.scaler.scale(loss).backward()
    loss_sum, stops = told.read()
    result = StepResult(loss=loss_sum / world_size(), stop=stops > 0)
    if not math.isfinite(result.loss):
        restore(state.model.buffers(), buffers_before)
        state.optimizer.zero_grad()
        return result
    if config.clip_grad is not None:
        state.scaler.unscale_(state.optimizer)
        clip_grad_norm_(state.model.parameters(), config.clip_grad)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if state.ema:
        state.ema.update(state.model)
    return result


def prepare_batch(training: Training, images_BCHW: Tensor, labels_B: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Batch `number` of the state's epoch as the model is shown it: on its device, and mixed.

    Labels (B) become probabilities (B, M) where images are mixed. What the model itself draws follows from here too.
    """
    seed_random(training.config.seed, RandomPurpose.STEP, training.state.epoch, number, rank())
    options = training.options
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    images_BCHW = images_BCHW.to(options.device, non_blocking=True, memory_format=layout)
    labels_B = labels_B.to(options.device, non_blocking=True)
    return training.mixup(images_BCHW, labels_B) if training.mixup else (images_BCHW, labels_B)


def _gradients_kept_here(trained: nn.Module) -> contextlib.AbstractContextManager:
    """Processes exchange gradients at the last batch of a step alone."""
    inner = getattr(trained, "_orig_mod", trained)
    return inner.no_sync() if isinstance(inner, DistributedDataParallel) else contextlib.nullcontext()


class _OnItsWay:
    """Numbers summed over all processes, on their way to this one's memory while the device works on."""

    def __init__(self, values: Tensor) -> None:
        if world_size() > 1:
            dist.all_reduce(values)
        self._values = values.to("cpu", non_blocking=values.is_cuda)
        self._arrival = torch.cuda.Event() if values.is_cuda else None
        if self._arrival:
            self._arrival.record()

    def read(self) -> list[float]:
        """The numbers, once they are there."""
        if self._arrival:
            self._arrival.synchronize()
        return self._values.tolist()
