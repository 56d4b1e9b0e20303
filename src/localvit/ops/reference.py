"""What the kernels of a fused locality module compute, in plain torch, for every device and dtype.

Shapes: B batch, N tokens (prefix tokens first), C channels outside, H and W the grid, E hidden channels, Q those of a
gate's bottleneck; of a 1x1 convolution, S rows of an image, R rows written, K and N channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from localvit.ops.activations import ACTIVATIONS, activate

Shape = tuple[int, ...]
"""Of a tensor."""

GATES = ("se", "eca", "ecah")
"""Channel gates that are computed without their layers, by name (`localvit.locality.ACTS`)."""


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


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a map of a dtype is summed: float32, or float64 for a float64 map."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def depthwise_act_pool(x_BHWE: Tensor, weight_E33: Tensor, bias_E: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """Depth-wise 3x3 convolution, bias, activation, and the sums that a channel gate pools.

    Stride 1, zeros around the map. A batch norm is folded into the weight and the bias.

    Args:
        x_BHWE: a map in any floating dtype, possibly a view.
        weight_E33: (E, 3, 3) or (E, 1, 3, 3).
        bias_E: one value per channel.
        act: `hs` (h-swish) or `relu6`.

    Returns:
        The activated map in the dtype of `x_BHWE`, and its sums over positions (B, E), in float32 (float64 for
        float64).

    Raises:
        ValueError: for an unknown `act`, or shapes that do not fit.
    """
    check(x_BHWE.shape, weight_E33.shape, bias_E.shape, act)
    y_BHWE = activate(_depthwise(x_BHWE, weight_E33, bias_E), act, inplace=True)
    return y_BHWE, y_BHWE.sum((1, 2), dtype=accumulate_dtype(x_BHWE.dtype))


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
        "weight": (weight_NK, (weight_NK[0], inner, 1, 1)[: len(weight_NK)]),
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
    """1x1 convolution of a map, a gate's factors before it, bias and activation after it.

    Args:
        x_BSK: the map's positions as rows, in any floating dtype.
        weight_NK: from K to N channels; (N, K) or (N, K, 1, 1).
        bias_N: one value per output channel, or None.
        act: `hs` (h-swish), `relu6`, or None.
        gate_BK: a factor of each input channel of each image, or None.
        skipped: how many rows of each image, the first, are not of the map.
        num_prefix_tokens: how many rows of zeros to put in front.

    Returns:
        Rows (B, num_prefix_tokens + S - skipped, N) in the dtype of the weight.

    Raises:
        ValueError: for an unknown `act`, or shapes that do not fit.
    """
    check_pointwise(x_BSK.shape, weight_NK.shape, shape_of(bias_N), act, shape_of(gate_BK))
    x_BRK = x_BSK[:, skipped:]
    if gate_BK is not None:
        x_BRK = x_BRK * gate_BK[:, None]
    y_BRN = F.linear(x_BRK, weight_NK.flatten(1), bias_N)
    y_BRN = y_BRN if act is None else activate(y_BRN, act, inplace=True)
    return F.pad(y_BRN, (0, 0, num_prefix_tokens, 0))


def squeeze_excite(
    sum_BE: Tensor, positions: int, weight_QE: Tensor, bias_Q: Tensor, weight_EQ: Tensor, bias_E: Tensor
) -> Tensor:
    """The factors (B, E) of a squeeze-and-excitation gate with a hard sigmoid, from a map's sums.

    Args:
        sum_BE: as `depthwise_act_pool` returns them.
        positions: H * W, how many values were summed.
        weight_QE, bias_Q, weight_EQ, bias_E: of the two linear layers, to Q channels and back.
    """
    squeezed_BQ = F.relu(F.linear(means(sum_BE, positions, weight_QE.dtype), weight_QE, bias_Q))
    return F.hardsigmoid(F.linear(squeezed_BQ, weight_EQ, bias_E))


def channel_attention(sum_BE: Tensor, positions: int, weight_11K: Tensor, *, hard: bool) -> Tensor:
    """The factors (B, E) of an ECA gate with a sigmoid or a hard one, from a map's sums; see `squeeze_excite`."""
    mean_B1E = means(sum_BE, positions, weight_11K.dtype)[:, None]
    u_BE = F.conv1d(mean_B1E, weight_11K, padding=weight_11K.shape[2] // 2)[:, 0]
    return F.hardsigmoid(u_BE) if hard else u_BE.sigmoid()


def means(sum_BE: Tensor, positions: int, dtype: torch.dtype) -> Tensor:
    """The means over positions; sums over one position are means already."""
    return (sum_BE if positions == 1 else sum_BE / positions).to(dtype)


class Folded(NamedTuple):
    """Weights and biases of a module's three convolutions, with the batch norms after them."""

    expansion: Tensor
    bias1_E: Tensor
    depthwise: Tensor
    bias2_E: Tensor
    projection: Tensor
    bias3_C: Tensor


def split(parameters: Sequence[Tensor]) -> tuple[Folded, Sequence[Tensor]]:
    """The parameters of a fused module, and those of its gate."""
    return Folded(*parameters[: len(Folded._fields)]), parameters[len(Folded._fields) :]


def feed_forward(
    x_BNC: Tensor,
    height: int,
    width: int,
    num_prefix_tokens: int,
    parameters: Sequence[Tensor],
    act1: str,
    act2: str,
    gate: str | None,
) -> Tensor:
    """As `localvit.ops.operators.feed_forward`."""
    folded, gate_parameters = split(parameters)
    check_feed_forward(x_BNC.shape, height, width, num_prefix_tokens, folded, (act1, act2), gate)
    x_BSE = pointwise(x_BNC, folded.expansion, folded.bias1_E, act1, None, num_prefix_tokens, 0)
    x_BHWE, sum_BE = depthwise_act_pool(x_BSE.unflatten(1, (height, width)), folded.depthwise, folded.bias2_E, act2)
    gate_BE = None if gate is None else gate_factors(gate, sum_BE, height * width, gate_parameters)
    return pointwise(x_BHWE.flatten(1, 2), folded.projection, folded.bias3_C, None, gate_BE, 0, num_prefix_tokens)


def gate_factors(gate: str, sum_BE: Tensor, positions: int, parameters: Sequence[Tensor]) -> Tensor:
    """The factors of a gate by its name; see `squeeze_excite`."""
    if gate == "se":
        return squeeze_excite(sum_BE, positions, *parameters)
    return channel_attention(sum_BE, positions, *parameters, hard=gate == "ecah")


def check_feed_forward(
    tokens: Shape,
    height: int,
    width: int,
    num_prefix_tokens: int,
    folded: Folded,
    acts: tuple[str, str],
    gate: str | None,
) -> None:
    """Raise ValueError unless the tokens fill the grid, the parameters' shapes fit, and the names are known."""
    check_tokens(tokens, height, width, num_prefix_tokens)
    if gate not in (None, *GATES):
        raise ValueError(f"gate={gate!r} is not known; choose one of {', '.join(GATES)}, or None")
    batch, hidden = tokens[0], folded.bias1_E.shape[0]
    check_pointwise(tokens, folded.expansion.shape, folded.bias1_E.shape, acts[0], None)
    check((batch, height, width, hidden), folded.depthwise.shape, folded.bias2_E.shape, acts[1])
    check_pointwise((batch, height * width, hidden), folded.projection.shape, folded.bias3_C.shape, None, None)


def check_tokens(tokens: Shape, height: int, width: int, num_prefix_tokens: int) -> None:
    """Raise ValueError unless tokens (B, N, C) fill the grid."""
    if len(tokens) != 3 or tokens[1] != num_prefix_tokens + height * width:
        raise ValueError(
            f"tokens of shape {tuple(tokens)} do not fill the {height} x {width} grid behind {num_prefix_tokens} "
            f"prefix tokens: they have shape (batch, {num_prefix_tokens + height * width}, channels)"
        )


def _depthwise(x_BHWE: Tensor, weight_E33: Tensor, bias_E: Tensor | None = None) -> Tensor:
    dtype, channels = x_BHWE.dtype, x_BHWE.shape[3]
    weight_E133 = weight_E33.reshape(channels, 1, 3, 3).to(dtype)
    bias_E = None if bias_E is None else bias_E.to(dtype)
    out_BEHW = F.conv2d(x_BHWE.permute(0, 3, 1, 2), weight_E133, bias_E, padding=1, groups=channels)
    return out_BEHW.permute(0, 2, 3, 1).to(dtype)  # autocast may have chosen another
