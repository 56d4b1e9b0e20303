"""The Triton kernel of the squeeze-and-excitation gate: from the sums over a map to a factor of each channel.

One program computes one image, since the gate's layers are small: a launch takes longer than its arithmetic.

Shapes: B batch, E channels, Q channels of the bottleneck.
"""

import triton
import triton.language as tl
from torch import Tensor

from localvit.ops.triton.launch import launch, power_of_2

BLOCK = 4096
"""Weights of a layer that are multiplied at once."""


def squeeze_excite(
    sum_BE: Tensor, positions: int, weight_QE: Tensor, bias_Q: Tensor, weight_EQ: Tensor, bias_E: Tensor
) -> Tensor:
    """As `localvit.ops.operators.squeeze_excite`."""
    batch, channels = sum_BE.shape
    bottleneck = weight_QE.shape[0]
    gate_BE = weight_EQ.new_empty(batch, channels)
    block_q = power_of_2(bottleneck)
    block_e = min(power_of_2(channels), max(BLOCK // block_q, 16))
    launch(
        squeeze_excite_kernel,
        batch,
        (
            *(sum_BE, weight_QE.contiguous(), bias_Q, weight_EQ.contiguous(), bias_E, gate_BE),
            *(sum_BE.stride(0), 1 / positions),
        ),
        (channels, bottleneck, block_e, block_q),
    )
    return gate_BE


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
    squeezed = tl.load(bias_in + q, q < Q, 0.0).to(tl.float32)
    for start in range(0, E, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        mean = tl.load(sums + image * stride_b + e, e < E, 0.0).to(tl.float32) * share
        weight = tl.load(weight_in + q[:, None] * E + e[None, :], (q < Q)[:, None] & (e < E)[None, :], 0.0)
        squeezed += tl.sum(weight.to(tl.float32) * mean[None, :], 1)
    squeezed = tl.maximum(squeezed, 0.0, tl.PropagateNan.ALL)
    for start in range(0, E, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        weight = tl.load(weight_out + e[:, None] * Q + q[None, :], (e < E)[:, None] & (q < Q)[None, :], 0.0)
        excited = tl.sum(weight.to(tl.float32) * squeezed[None, :], 1) + tl.load(bias_out + e, e < E, 0.0).to(
            tl.float32
        )
        tl.store(gate + image * E + e, tl.clamp(excited * (1 / 6) + 0.5, 0.0, 1.0, tl.PropagateNan.ALL), e < E)
