"""The Triton kernels of the squeeze-and-excitation gate: from sums over a map to a factor of each channel, and back.

One program computes one image, since the gate's layers are small: a launch takes longer than its arithmetic.

Roofline: 4 E Q operations for each image and as many bytes of weights, which the caches hold. With E = 768, Q = 4 and
256 images these are 3 million operations, below a microsecond: a launch is the limit.

Shapes: B batch, E channels, Q channels of the bottleneck, T summands of a gradient.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from localvit.ops.triton.launch import Launch, power_of_2

BLOCK = 4096
"""Weights of a layer that are multiplied at once."""


def squeeze_excite(
    sum_BE: Tensor, positions: int, weight_QE: Tensor, bias_Q: Tensor, weight_EQ: Tensor, bias_E: Tensor
) -> Tensor:
    """As `localvit.ops.reference.squeeze_excite`."""
    batch, channels = sum_BE.shape
    bottleneck = weight_QE.shape[0]
    gate_BE = weight_EQ.new_empty(batch, channels)
    launch = _forward_launch(batch, channels, bottleneck, sum_BE.stride(0), 1 / positions)
    launch(sum_BE, weight_QE.contiguous(), bias_Q, weight_EQ.contiguous(), bias_E, gate_BE)
    return gate_BE


def squeeze_excite_backward(
    grad_gate_TBE: Tensor, mean_BE: Tensor, weight_QE: Tensor, bias_Q: Tensor, weight_EQ: Tensor, bias_E: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients, in float32, of the means and of each of the layers' parameters.

    Args:
        grad_gate_TBE: summands of the gradient of the factors, in float32.
        mean_BE: the means over positions.
        weight_QE, bias_Q, weight_EQ, bias_E: of the two linear layers, to Q channels and back.
    """
    summands, batch, channels = grad_gate_TBE.shape
    bottleneck = weight_QE.shape[0]
    grad_mean_BE = torch.empty_like(grad_gate_TBE[0])
    squeezed_BQ = grad_mean_BE.new_empty(batch, bottleneck)
    # The gradients of both layers' outputs side by side: one sum over the batch gives those of both biases.
    grad_outputs = grad_mean_BE.new_empty(batch, channels + bottleneck)
    launch = _backward_launch(batch, channels, bottleneck, mean_BE.stride(0), summands)
    launch(
        *(grad_gate_TBE, mean_BE, weight_QE.contiguous(), bias_Q, weight_EQ.contiguous(), bias_E),
        *(grad_mean_BE, squeezed_BQ, grad_outputs),
    )
    grad_wide_BE, grad_narrow_BQ = grad_outputs.split((channels, bottleneck), 1)
    grad_bias_E, grad_bias_Q = grad_outputs.sum(0).split((channels, bottleneck))
    grad_weight_QE = grad_narrow_BQ.t() @ mean_BE.float()
    return grad_mean_BE, grad_weight_QE, grad_bias_Q, grad_wide_BE.t() @ squeezed_BQ, grad_bias_E


@cache
def _forward_launch(batch: int, channels: int, bottleneck: int, stride_b: int, share: float) -> Launch:
    return Launch(squeeze_excite_kernel, batch, (stride_b, share), _constants(channels, bottleneck))


@cache
def _backward_launch(batch: int, channels: int, bottleneck: int, stride_b: int, summands: int) -> Launch:
    numbers = stride_b, batch, summands
    return Launch(squeeze_excite_backward_kernel, batch, numbers, _constants(channels, bottleneck))


def _constants(channels: int, bottleneck: int) -> tuple[int, int, int, int]:
    block_q = power_of_2(bottleneck)
    return channels, bottleneck, min(power_of_2(channels), max(BLOCK // block_q, 16)), block_q


@triton.jit
def _squeezed(means, weight, bias, q, share, E: tl.constexpr, Q: tl.constexpr, BLOCK_E: tl.constexpr):
    """The first layer's output for one image, whose means are `share` times what is read."""
    squeezed = tl.load(bias + q, q < Q, 0.0).to(tl.float32)
    for start in range(0, E, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        mean = tl.load(means + e, e < E, 0.0).to(tl.float32) * share
        squeezed += tl.sum(_weight_in(weight, q, e, E, Q) * mean[None, :], 1)
    return squeezed


@triton.jit
def _weight_in(weight, q, e, E: tl.constexpr, Q: tl.constexpr):
    """A block (q, e) of the first layer's weight."""
    return tl.load(weight + q[:, None] * E + e[None, :], (q < Q)[:, None] & (e < E)[None, :], 0.0).to(tl.float32)


@triton.jit
def _weight_out(weight, e, q, E: tl.constexpr, Q: tl.constexpr):
    """A block (e, q) of the second layer's weight."""
    return tl.load(weight + e[:, None] * Q + q[None, :], (e < E)[:, None] & (q < Q)[None, :], 0.0).to(tl.float32)


@triton.jit
def _excited(weight, squeezed, bias, e, E: tl.constexpr):
    """The second layer's output for one image, from a block (e, q) of its weight."""
    return tl.sum(weight * squeezed[None, :], 1) + tl.load(bias + e, e < E, 0.0).to(tl.float32)


@triton.jit
def squeeze_excite_kernel(
    sums,
    weight_in,
    bias_in,
    weight_out,
    bias_out,
    gate,
    stride_b,
    share,
    E: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """One image's factors."""
    image = tl.program_id(0).to(tl.int64)
    q = tl.arange(0, BLOCK_Q)
    squeezed = _squeezed(sums + image * stride_b, weight_in, bias_in, q, share, E, Q, BLOCK_E)
    squeezed = tl.maximum(squeezed, 0.0, tl.PropagateNan.ALL)
    for start in range(0, E, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        excited = _excited(_weight_out(weight_out, e, q, E, Q), squeezed, bias_out, e, E)
        tl.store(gate + image * E + e, tl.clamp(excited * (1 / 6) + 0.5, 0.0, 1.0, tl.PropagateNan.ALL), e < E)


@triton.jit
def squeeze_excite_backward_kernel(
    grad_gate,
    means,
    weight_in,
    bias_in,
    weight_out,
    bias_out,
    grad_means,
    squeezed_out,
    grad_outputs,
    stride_b,
    batch,
    summands,
    E: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """One image's gradients of the means and of both layers' outputs, and what the second layer reads."""
    image = tl.program_id(0).to(tl.int64)
    q = tl.arange(0, BLOCK_Q)
    before = _squeezed(means + image * stride_b, weight_in, bias_in, q, 1.0, E, Q, BLOCK_E)
    squeezed = tl.maximum(before, 0.0, tl.PropagateNan.ALL)
    tl.store(squeezed_out + image * Q + q, squeezed, q < Q)
    grad_outputs += image * (E + Q)
    grad_squeezed = tl.zeros((BLOCK_Q,), tl.float32)
    for start in range(0, E, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        weight = _weight_out(weight_out, e, q, E, Q)
        excited = _excited(weight, squeezed, bias_out, e, E)
        grad = tl.zeros((BLOCK_E,), tl.float32)
        for number in range(summands):
            grad += tl.load(grad_gate + (number * batch + image) * E + e, e < E, 0.0)
        grad = tl.where((excited > -3.0) & (excited < 3.0), grad * (1 / 6), 0.0)
        tl.store(grad_outputs + e, grad, e < E)
        grad_squeezed += tl.sum(weight * grad[:, None], 0)
    grad_squeezed = tl.where(before > 0.0, grad_squeezed, 0.0)
    tl.store(grad_outputs + E + q, grad_squeezed, q < Q)
    for start in range(0, E, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        tl.store(
            grad_means + image * E + e, tl.sum(_weight_in(weight_in, q, e, E, Q) * grad_squeezed[:, None], 0), e < E
        )
