"""The operators of `localvit.ops.operators` in plain torch, for every device and dtype.

Shapes: B batch, H and W the grid, E channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from localvit.ops.activations import ACTIVATIONS, activate, activation_backward


def check(map_BHWE: Tensor, weight_E33: Tensor, act: str, **values: Tensor) -> None:
    """Raise ValueError unless weight and `values` have the map's channels, and the activation is known."""
    if act not in ACTIVATIONS:
        raise ValueError(f"act={act!r} is not known; choose one of {', '.join(ACTIVATIONS)}")
    if map_BHWE.dim() != 4:
        raise ValueError(f"a map has shape (batch, height, width, channels), not {tuple(map_BHWE.shape)}")
    channels = map_BHWE.shape[3]
    if tuple(weight_E33.shape) not in ((channels, 3, 3), (channels, 1, 3, 3)):
        raise ValueError(
            f"the depth-wise weight of a map of {channels} channels has shape ({channels}, 3, 3) or "
            f"({channels}, 1, 3, 3), not {tuple(weight_E33.shape)}"
        )
    for name, value_E in values.items():
        if tuple(value_E.shape) != (channels,):
            raise ValueError(
                f"{name} has shape {tuple(value_E.shape)}; with {channels} channels it must be ({channels},)"
            )


def check_gradient(grad_BHWE: Tensor, map_BHWE: Tensor) -> None:
    """Raise ValueError unless the gradient has the map's shape."""
    if grad_BHWE.shape != map_BHWE.shape:
        raise ValueError(f"the gradient has shape {tuple(grad_BHWE.shape)}, and its map {tuple(map_BHWE.shape)}")


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a map is summed: float32, or float64 for a float64 map."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def depthwise_act_pool(x_BHWE: Tensor, weight_E33: Tensor, bias_E: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """As `localvit.ops.operators.depthwise_act_pool`."""
    check(x_BHWE, weight_E33, act, bias=bias_E)
    y_BHWE = activate(_depthwise(x_BHWE, weight_E33, bias_E), act, inplace=True)
    return y_BHWE, y_BHWE.sum((1, 2), dtype=accumulate_dtype(x_BHWE))


def depthwise_act_pool_backward(
    grad_y_BHWE: Tensor, grad_sum_BE: Tensor, x_BHWE: Tensor, weight_E33: Tensor, bias_E: Tensor, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the three tensors of `depthwise_act_pool`, given those of its two results."""
    u_BHWE = _depthwise(x_BHWE, weight_E33, bias_E)
    grad_BHWE = (grad_y_BHWE + grad_sum_BE[:, None, None]).to(u_BHWE.dtype)
    grad_BHWE = activation_backward(grad_BHWE, u_BHWE, act)
    grad_x_BHWE, grad_weight_E33 = _depthwise_backward(grad_BHWE, x_BHWE, weight_E33)
    grad_bias_E = grad_BHWE.sum((0, 1, 2), dtype=accumulate_dtype(x_BHWE))
    return grad_x_BHWE, grad_weight_E33.to(weight_E33.dtype), grad_bias_E.to(bias_E.dtype)


def norm_act_depthwise(
    z_BHWE: Tensor, scale_E: Tensor, shift_E: Tensor, weight_E33: Tensor, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """As `localvit.ops.operators.norm_act_depthwise`."""
    check(z_BHWE, weight_E33, act, scale=scale_E, shift=shift_E)
    a_BHWE = activate(_normalize(z_BHWE, scale_E, shift_E), act, inplace=True)
    out_BHWE = _depthwise(a_BHWE.to(z_BHWE.dtype), weight_E33)
    out = out_BHWE.detach().to(accumulate_dtype(z_BHWE))
    variance_E, mean_E = torch.var_mean(out, (0, 1, 2), correction=0)
    return out_BHWE, mean_E, variance_E


def norm_act_depthwise_backward(
    grad_out_BHWE: Tensor,
    z_BHWE: Tensor,
    scale_E: Tensor,
    shift_E: Tensor,
    weight_E33: Tensor,
    center_E: Tensor,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `localvit.ops.operators.norm_act_depthwise_backward`."""
    check(z_BHWE, weight_E33, act, scale=scale_E, shift=shift_E, center=center_E)
    check_gradient(grad_out_BHWE, z_BHWE)
    u_BHWE = _normalize(z_BHWE, scale_E, shift_E)
    a_BHWE = activate(u_BHWE, act).to(z_BHWE.dtype)
    grad_a_BHWE, grad_weight_E33 = _depthwise_backward(grad_out_BHWE, a_BHWE, weight_E33)
    grad_u_BHWE = activation_backward(grad_a_BHWE.to(u_BHWE.dtype), u_BHWE, act)
    by_z = grad_u_BHWE * (z_BHWE - center_E.to(u_BHWE.dtype))
    sums_2E = torch.stack([grad_u_BHWE.sum((0, 1, 2)), by_z.sum((0, 1, 2))])
    return grad_u_BHWE.to(z_BHWE.dtype), grad_weight_E33, sums_2E


def _normalize(z_BHWE: Tensor, scale_E: Tensor, shift_E: Tensor) -> Tensor:
    dtype = accumulate_dtype(z_BHWE)
    return z_BHWE * scale_E.to(dtype) + shift_E.to(dtype)


def _depthwise(x_BHWE: Tensor, weight_E33: Tensor, bias_E: Tensor | None = None) -> Tensor:
    dtype, channels = x_BHWE.dtype, x_BHWE.shape[3]
    weight_E133 = weight_E33.reshape(channels, 1, 3, 3).to(dtype)
    bias_E = None if bias_E is None else bias_E.to(dtype)
    out_BEHW = F.conv2d(x_BHWE.permute(0, 3, 1, 2), weight_E133, bias_E, padding=1, groups=channels)
    return out_BEHW.permute(0, 2, 3, 1).to(dtype)  # autocast may have chosen another


def _depthwise_backward(grad_BHWE: Tensor, x_BHWE: Tensor, weight_E33: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the map and of the weight, the latter in `accumulate_dtype`."""
    dtype, channels = x_BHWE.dtype, x_BHWE.shape[3]
    grad_x_BEHW, grad_weight_E133, _ = torch.ops.aten.convolution_backward(
        grad_BHWE.to(dtype).permute(0, 3, 1, 2),
        x_BHWE.permute(0, 3, 1, 2),
        weight_E33.reshape(channels, 1, 3, 3).to(dtype),
        None,
        (1, 1),
        (1, 1),
        (1, 1),
        False,
        (0, 0),
        channels,
        (True, True, False),
    )
    grad_weight_E33 = grad_weight_E133.reshape(weight_E33.shape).to(accumulate_dtype(x_BHWE))
    return grad_x_BEHW.permute(0, 2, 3, 1), grad_weight_E33
