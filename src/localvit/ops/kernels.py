"""The locality module's depth-wise convolution with what stands around it, in one pass over the tokens.

Each is an operator of `torch.ops.localvit` with a Triton kernel for CUDA (`localvit.ops.operators`), and the same
in plain torch (`localvit.ops.reference`), which is what runs elsewhere, and everywhere until `use(True)` switches the
kernels on. Maps lie as tokens do, (B, H, W, E) with channels side by side; they may be views, such as the tokens behind
the prefix tokens, and are read where they are.

Shapes: B batch, H and W the grid, E channels.
"""

import torch
from torch import Tensor

from localvit.ops import reference as plain
from localvit.ops.switch import in_use, use

__all__ = ["depthwise_act_pool", "in_use", "norm_act_depthwise", "norm_act_depthwise_backward", "use"]


def depthwise_act_pool(x_BHWE: Tensor, weight_E33: Tensor, bias_E: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """Depth-wise 3x3 convolution, bias, activation, and the sums that a channel gate pools: for inference.

    Stride 1, zeros around the map. The bias, and the weight's scale, are where a batch norm is folded into.

    Args:
        x_BHWE: a map in any floating dtype.
        weight_E33: (E, 3, 3) or (E, 1, 3, 3). Where channels lie last (`stride(0) == 1`) no kernel copies it.
        bias_E: one for each channel.
        act: `hs` (h-swish) or `relu6`.

    Returns:
        The activated map in the dtype of `x_BHWE`, and its sums over places (B, E), in float32 (float64 for float64).
        Equal inputs give equal bits.

    Raises:
        ValueError: for an unknown `act`, or shapes that do not fit.
    """
    form = torch.ops.localvit.depthwise_act_pool if in_use() else plain.depthwise_act_pool
    return form(x_BHWE, weight_E33, bias_E, act)


def norm_act_depthwise(
    z_BHWE: Tensor, scale_E: Tensor, shift_E: Tensor, weight_E33: Tensor, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`act(z * scale + shift)`, then the depth-wise 3x3 convolution, and its batch statistics: for training.

    A batch norm's normalization is such a scale and shift. Stride 1; the zeros around the map are put around the
    activated map, which no kernel writes. The operator keeps its arguments alone for the backward pass.

    Args:
        z_BHWE: a map in any floating dtype, before its normalization.
        scale_E, shift_E: one for each channel, best in float32.
        weight_E33: (E, 3, 3) or (E, 1, 3, 3).
        act: `hs` (h-swish) or `relu6`.

    Returns:
        The convolution's map in the dtype of `z_BHWE`, and its mean and biased variance (`correction=0`) over the batch
        and all places, each (E,) in float32 (float64 for float64). No gradient flows through mean and variance: batch
        norm's backward formula accounts for them.

    Raises:
        ValueError: for an unknown `act`, or shapes that do not fit.
    """
    form = torch.ops.localvit.norm_act_depthwise if in_use() else plain.norm_act_depthwise
    return form(z_BHWE, scale_E, shift_E, weight_E33, act)


def norm_act_depthwise_backward(
    grad_out_BHWE: Tensor,
    z_BHWE: Tensor,
    scale_E: Tensor,
    shift_E: Tensor,
    weight_E33: Tensor,
    center_E: Tensor,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass of `norm_act_depthwise`, and what the backward pass of the batch norm before it needs.

    With u = z * scale + shift: batch norm over n places, whose mean is `center`, has the gradient of z
    scale * (grad_u - sums[0] / n - (z - center) * sums[1] / (n * (variance + eps))), and, for its weight,
    sums[1] / sqrt(variance + eps), for its bias sums[0].

    Args:
        grad_out_BHWE: the gradient of the convolution's map.
        z_BHWE, scale_E, shift_E, weight_E33, act: as they were.
        center_E: what is taken from z before the products are summed: its mean, so that no digits are lost.

    Returns:
        The gradient of u (B, H, W, E) in the dtype of `z_BHWE`; in float32 (float64 for float64) that of the weight, in
        its shape, and (2, E): the sums over the batch and all places of grad_u and of grad_u * (z - center).

    Raises:
        ValueError: for an unknown `act`, or shapes that do not fit.
    """
    form = torch.ops.localvit.norm_act_depthwise_backward if in_use() else plain.norm_act_depthwise_backward
    return form(grad_out_BHWE, z_BHWE, scale_E, shift_E, weight_E33, center_E, act)
