"""The operators of `localvit.ops.operators` in plain torch, for every device and dtype.

Shapes: B batch, H and W the grid, E channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from localvit.ops.activations import ACTIVATIONS, activate

Shape = tuple[int, ...]
"""Of a tensor."""


def check(map_BHWE: Shape, weight_E33: Shape, bias_E: Shape, act: str) -> None:
    """Raise ValueError unless weight and bias have the map's channels, and the activation is known."""
    if act not in ACTIVATIONS:
        raise ValueError(f"act={act!r} is not known; choose one of {', '.join(ACTIVATIONS)}")
    if len(map_BHWE) != 4:
        raise ValueError(f"a map has shape (batch, height, width, channels), not {tuple(map_BHWE)}")
    channels = map_BHWE[3]
    if tuple(weight_E33) not in ((channels, 3, 3), (channels, 1, 3, 3)):
        raise ValueError(
            f"the depth-wise weight of a map of {channels} channels has shape ({channels}, 3, 3) or "
            f"({channels}, 1, 3, 3), not {tuple(weight_E33)}"
        )
    if tuple(bias_E) != (channels,):
        raise ValueError(f"bias has shape {tuple(bias_E)}; with {channels} channels it must be ({channels},)")


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a map is summed: float32, or float64 for a float64 map."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def depthwise_act_pool(x_BHWE: Tensor, weight_E33: Tensor, bias_E: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """As `localvit.ops.operators.depthwise_act_pool`."""
    check(x_BHWE.shape, weight_E33.shape, bias_E.shape, act)
    y_BHWE = activate(_depthwise(x_BHWE, weight_E33, bias_E), act, inplace=True)
    return y_BHWE, y_BHWE.sum((1, 2), dtype=accumulate_dtype(x_BHWE))


def check_pointwise(
    x_BSK: Shape, weight_NK: Shape, bias_N: Shape | None, act: str | None, gate_BK: Shape | None
) -> None:
    """Raise ValueError unless the shapes fit the rows, and the activation is known."""
    if act is not None and act not in ACTIVATIONS:
        raise ValueError(f"act={act!r} is not known; choose one of {', '.join(ACTIVATIONS)}, or None")
    if len(x_BSK) != 3:
        raise ValueError(f"the rows have shape (batch, rows, channels), not {tuple(x_BSK)}")
    batch, _, inner = x_BSK
    wanted = {
        "weight": (weight_NK, (weight_NK[0], inner)),
        "bias": (bias_N, (weight_NK[0],)),
        "gate": (gate_BK, (batch, inner)),
    }
    for name, (found, shape) in wanted.items():
        if found is not None and tuple(found) != shape:
            raise ValueError(f"{name} has shape {tuple(found)}; for rows of shape {tuple(x_BSK)} it must be {shape}")


def shape_of(x: Tensor | None) -> Shape | None:
    """The shape of a tensor; None of None."""
    return None if x is None else x.shape


def pointwise(
    x_BSK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    act: str | None,
    gate_BK: Tensor | None,
    skipped: int,
    num_prefix_tokens: int,
) -> Tensor:
    """As `localvit.ops.operators.pointwise`."""
    check_pointwise(x_BSK.shape, weight_NK.shape, shape_of(bias_N), act, shape_of(gate_BK))
    x_BRK = x_BSK[:, skipped:]
    if gate_BK is not None:
        x_BRK = x_BRK * gate_BK[:, None]
    y_BRN = F.linear(x_BRK, weight_NK, bias_N)
    y_BRN = y_BRN if act is None else activate(y_BRN, act, inplace=True)
    return F.pad(y_BRN, (0, 0, num_prefix_tokens, 0))


def squeeze_excite(
    sum_BE: Tensor, positions: int, weight_QE: Tensor, bias_Q: Tensor, weight_EQ: Tensor, bias_E: Tensor
) -> Tensor:
    """As `localvit.ops.operators.squeeze_excite`."""
    mean_BE = (sum_BE / positions).to(weight_QE.dtype)
    return F.hardsigmoid(F.linear(F.relu(F.linear(mean_BE, weight_QE, bias_Q)), weight_EQ, bias_E))


def _depthwise(x_BHWE: Tensor, weight_E33: Tensor, bias_E: Tensor | None = None) -> Tensor:
    dtype, channels = x_BHWE.dtype, x_BHWE.shape[3]
    weight_E133 = weight_E33.reshape(channels, 1, 3, 3).to(dtype)
    bias_E = None if bias_E is None else bias_E.to(dtype)
    out_BEHW = F.conv2d(x_BHWE.permute(0, 3, 1, 2), weight_E133, bias_E, padding=1, groups=channels)
    return out_BEHW.permute(0, 2, 3, 1).to(dtype)  # autocast may have chosen another
