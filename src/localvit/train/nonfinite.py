"""Explaining a loss that is not finite: the first module with a non-finite output, and the images that caused it."""

import math

import torch
from torch import Tensor, nn

from localvit.train.buffers import SavedBuffers
from localvit.train.builder import Training
from localvit.train.device_batches import to_device
from localvit.train.step import StepResult, prepare_batch
from localvit.utils.distributed import all_gather

_MAX_NAMES = 8


def nonfinite_parameter(model: nn.Module) -> str | None:
    """The name of the first parameter or buffer that is not finite, if any."""
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            return name
    return None


def explain(training: Training, result: StepResult) -> str:
    """Describe where the numbers of a step that was not applied stop being finite.

    For a loss this repeats the forward pass of the step and inspects each module's output. Call it on all processes.

    Args:
        training: the run, still at that step.
        result: of that step; `nonfinite` must not be None.
    """
    config, state = training.config, training.state
    place = f"{result.nonfinite} in epoch {state.epoch + 1}, step {state.step + 1}"
    if names := [name for name in all_gather(nonfinite_parameter(state.model)) if name]:
        return f"{place}: {names[0]} is not finite, because of an earlier step"
    if math.isfinite(result.loss):
        return f"{place}, although the loss is {result.loss:.4g}"
    buffers_before = SavedBuffers(state.model)
    findings = []
    for number in range(state.step * config.grad_accum, (state.step + 1) * config.grad_accum):
        images_BCHW, labels_B, names = training.batches.batch(state.epoch, number)
        batch = to_device((images_BCHW, labels_B), training.options)
        module, rows = _first_nonfinite(training, *prepare_batch(training, *batch, number))
        if module:
            affected = [names[row] for row in rows] or names
            more = f" and {len(affected) - _MAX_NAMES} more" if len(affected) > _MAX_NAMES else ""
            images = ", ".join(affected[:_MAX_NAMES])
            findings.append(f"{module} is the first whose output is not finite, on {images}{more}")
    buffers_before.restore()
    findings = [finding for of_rank in all_gather(findings) for finding in of_rank]
    return f"{place}: {'; '.join(findings) or 'repeating the forward pass gives finite numbers'}"


def _first_nonfinite(training: Training, images_BCHW: Tensor, targets: Tensor) -> tuple[str | None, list[int]]:
    """The first module, in order of execution, whose output is not finite, and the rows of the batch concerned."""
    found: list[tuple[str, list[int]]] = []

    def hook_for(name: str):
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            if found or not isinstance(output, Tensor) or output.isfinite().all():
                return
            rows = []
            if output.shape[:1] == images_BCHW.shape[:1]:
                rows = (~output.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
            found.append((name or type(module).__name__, rows))

        return hook

    if not images_BCHW.isfinite().all():
        return "the augmentation", (~images_BCHW.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    model = training.state.model
    handles = [module.register_forward_hook(hook_for(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad(), training.options.autocast():
            loss = training.criterion(images_BCHW, model.train()(images_BCHW), targets)
    finally:
        for handle in handles:
            handle.remove()
    if not found and not loss.isfinite():
        return "the loss", []
    return found[0] if found else (None, [])
