"""What to tell of a loss that is not finite: where it first showed, and on which images."""

import torch
from torch import Tensor, nn

from localvit.train.build import Training
from localvit.train.model import restore
from localvit.train.step import prepare_batch
from localvit.utils.distributed import gather

_NAMED = 8  # how many images a message names


def nonfinite_parameter(model: nn.Module) -> str | None:
    """The name of the first parameter or buffer that is not finite, if there is one."""
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            return name
    return None


def explain(training: Training, loss: float) -> str:
    """Say where the loss of the state's next step stops being finite: take the step's forward again, and look.

    All processes call it together; those with nothing to report say nothing.
    """
    config, state = training.config, training.state
    where = f"the loss is {loss} in epoch {state.epoch}, step {state.step} (both from 0)"
    if name := nonfinite_parameter(state.model):
        return f"{where}: {name} is not finite, from a gradient of an earlier step"
    buffers_before = [buffer.clone() for buffer in state.model.buffers()]
    findings = []
    for number in range(state.step * config.grad_accum, (state.step + 1) * config.grad_accum):
        images_BCHW, labels_B, names = training.batches.batch(state.epoch, number)
        module, rows = _first_nonfinite(training, *prepare_batch(training, images_BCHW, labels_B, number))
        if module:
            named = [names[row] for row in rows] or names
            more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
            findings.append(f"{module} is the first whose output is not finite, on {', '.join(named[:_NAMED])}{more}")
    restore(state.model.buffers(), buffers_before)
    told = [finding for part in gather(findings) for finding in part]
    return f"{where}: {'; '.join(told) or 'every module gives finite numbers, and the loss of them is not finite'}"


def _first_nonfinite(training: Training, images_BCHW: Tensor, targets: Tensor) -> tuple[str | None, list[int]]:
    """The first module, in the order that they finish, with an output that is not finite, and for which images."""
    found: list[tuple[str, list[int]]] = []

    def looking_at(name: str):
        def look(module: nn.Module, inputs: tuple, output: object) -> None:
            if found or not isinstance(output, Tensor) or output.isfinite().all():
                return
            rows = []
            if output.shape[:1] == images_BCHW.shape[:1]:
                rows = (~output.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
            found.append((name or type(module).__name__, rows))

        return look

    if not images_BCHW.isfinite().all():
        return "the augmentation", (~images_BCHW.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    model = training.state.model
    handles = [module.register_forward_hook(looking_at(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad(), training.options.autocast():
            loss = training.criterion(images_BCHW, model.train()(images_BCHW), targets)
    finally:
        for handle in handles:
            handle.remove()
    if not found and not loss.isfinite():
        return "the loss", []
    return found[0] if found else (None, [])
