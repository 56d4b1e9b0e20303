"""The training step by the Triton kernels as torch.compile sees it: one operator for each pass.

The operators change none of their arguments, so that the compiler may move them: the forward pass returns the batch's
statistics, and plain torch updates the running ones. Without a compiler, `localvit.ops.kernel_training` is this step.

Shapes: B batch, C channels outside, E hidden channels, H and W the grid.
"""

from typing import Any

import torch
from torch import Tensor

from localvit.ops import kernel_step
from localvit.ops.batch_norms import Running
from localvit.ops.kernel_gates import KNOWN, known_gate
from localvit.ops.kernel_step import Kept, Norm, Parameters, split
from localvit.ops.operators import LIBRARY, register
from localvit.ops.stages import Stages


def feed_forward(stages: Stages, map_BCHW: Tensor, dtype: torch.dtype) -> Tensor:
    """As `localvit.ops.kernel_training.feed_forward`, for modules without a gate or with a known one."""
    (norm1, act1, _, _), (norm2, act2, gate, _) = stages.stages
    known = (None, ()) if gate is None else known_gate(gate)
    assert known is not None  # `localvit.ops.dispatch.fits_kernels` checks it.
    name, gate_parameters = known
    x_BHWC = map_BCHW.permute(0, 2, 3, 1).to(dtype).contiguous()
    parameters = [*Parameters.of(stages), *gate_parameters]
    out_BHWC, batch_22E, *_ = _forward_operator(x_BHWC, parameters, act1, act2, name, norm1.eps, norm2.eps)
    with torch.no_grad():
        _update(norm1, batch_22E[0])
        _update(norm2, batch_22E[1])
    return out_BHWC.permute(0, 3, 1, 2)


def _update(norm: Any, batch_2E: Tensor) -> None:
    """The running statistics of a batch norm, from mean and unbiased variance of the batch."""
    for running_E, batch_E in zip((norm.running_mean, norm.running_var), batch_2E, strict=True):
        running_E.copy_(torch.lerp(running_E.float(), batch_E, norm.momentum))
    norm.num_batches_tracked.add_(1)


def training_forward(
    x_BHWC: Tensor, parameters: list[Tensor], act1: str, act2: str, gate: str | None, eps1: float, eps2: float
) -> list[Tensor]:
    """`kernel_step.forward`: the output, mean and unbiased variance of both batch norms (2, 2, E), and `Kept`.

    Args:
        x_BHWC: the input, contiguous, in the dtype of the computation.
        parameters: of `kernel_step.Parameters`, and those of the gate, if there is one.
        gate: its name, of `kernel_gates.KNOWN`.
    """
    own, gate_parameters = split(parameters, x_BHWC.get_device())
    batch_22E = x_BHWC.new_zeros(2, 2, len(own.bias1_E), dtype=torch.float32)
    counts_2 = torch.zeros(2, dtype=torch.int64, device=x_BHWC.device)
    # With a momentum of 1, a batch norm's running statistics are those of the batch.
    running1, running2 = (Running(batch_22E[i, 0], batch_22E[i, 1], counts_2[i]) for i in range(2))
    out_BHWC, kept = kernel_step.forward(
        x_BHWC,
        own.convolutions(x_BHWC.dtype),
        (Norm(own.weight1_E, own.bias1_E, running1, 1.0, eps1), Norm(own.weight2_E, own.bias2_E, running2, 1.0, eps2)),
        (act1, act2),
        None if gate is None else KNOWN[gate],
        gate_parameters,
    )
    return [out_BHWC, batch_22E, *(each for each in kept if each is not None)]


def _empty_forward(
    x_BHWC: Tensor, parameters: list[Tensor], act1: str, act2: str, gate: str | None, eps1: float, eps2: float
) -> list[Tensor]:
    batch, height, width, _ = x_BHWC.shape
    own, gate_parameters = split(parameters, x_BHWC.get_device())
    hidden, channels = len(own.bias1_E), len(own.projection)
    vectors = x_BHWC.new_empty(2, 4, hidden, dtype=torch.float32)
    results = [
        *(x_BHWC.new_empty(batch, height, width, channels), vectors.new_empty(2, 2, hidden)),
        *(x_BHWC.new_empty(batch, height, width, hidden) for _ in range(2)),
        *(vectors.new_empty(4, hidden) for _ in range(2)),
    ]
    if gate_parameters:
        results += [vectors.new_empty(batch, hidden), gate_parameters[-1].new_empty(batch, hidden)]
    return results


def training_backward(
    grad_out_BHWC: Tensor,
    x_BHWC: Tensor,
    parameters: list[Tensor],
    kept: list[Tensor],
    act1: str,
    act2: str,
    gate: str | None,
) -> list[Tensor]:
    """`kernel_step.backward`: the gradients of the input and of the parameters."""
    own, gate_parameters = split(parameters, x_BHWC.get_device())
    grad_x_BHWC, gradients = kernel_step.backward(
        grad_out_BHWC,
        x_BHWC,
        own.convolutions(x_BHWC.dtype),
        (act1, act2),
        None if gate is None else KNOWN[gate],
        gate_parameters,
        Kept(*kept),
        x_BHWC.dtype,
    )
    return [grad_x_BHWC, *map(_as_result, gradients, parameters)]


def _as_result(grad: Tensor | None, parameter: Tensor) -> Tensor:
    """A gradient in the form of its parameter, and not a part of another tensor: the compiler expects that."""
    assert grad is not None  # The kernels compute each.
    grad = grad.view_as(parameter).to(parameter.dtype).contiguous()
    return grad.clone() if grad.storage_offset() else grad


def _empty_backward(
    grad_out_BHWC: Tensor,
    x_BHWC: Tensor,
    parameters: list[Tensor],
    kept: list[Tensor],
    act1: str,
    act2: str,
    gate: str | None,
) -> list[Tensor]:
    return [torch.empty_like(x_BHWC), *(each.new_empty(each.shape) for each in parameters)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x_BHWC, parameters, *ctx.names, _, _ = inputs
    ctx.number = len(parameters)
    ctx.save_for_backward(x_BHWC, *parameters, *output[2:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    x_BHWC, *saved = ctx.saved_tensors
    parameters, kept = saved[: ctx.number], saved[ctx.number :]
    grad_x_BHWC, *gradients = _backward_operator(grads[0], x_BHWC, parameters, kept, *ctx.names)
    return grad_x_BHWC, gradients, None, None, None, None, None


_forward_operator = register(training_forward, _empty_forward)
_backward_operator = register(training_backward, _empty_backward)
torch.library.register_autograd("localvit::training_forward", _gradients, setup_context=_keep, lib=LIBRARY)
