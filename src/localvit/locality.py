"""The paper's idea: a depth-wise convolution inside the feed-forward, so that neighboring patches exchange information.

LocalViT: Bringing Locality to Vision Transformers, arXiv 2104.05707, section 3.

Shapes: B batch, C input channels, E expanded (hidden) channels, H and W the patch grid.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from localvit import ops

ACTS = ("relu6", "hs", "hs+se", "hs+eca", "hs+ecah")
"""Activation and channel gate of the module, in the order of the published integers 1 to 5."""


class SqueezeExcite(ops.ChannelGate):
    """Channel gate from the mean of the whole map: squeeze-and-excitation, arXiv 1709.01507, with a hard sigmoid.

    Takes and returns (B, E, H, W). `reduction` divides the channels: the bottleneck has `channels // reduction`.

    Raises:
        ValueError: for a reduction that leaves the bottleneck no channel.
    """

    def __init__(
        self,
        channels: int,
        reduction: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= reduction <= channels:
            raise ValueError(
                f"reduction={reduction} leaves the squeeze-and-excitation gate over {channels} channels no bottleneck: "
                f"it divides the channels, so choose 1 to {channels}"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // reduction, **factory),
            nn.ReLU(),
            nn.Linear(channels // reduction, channels, **factory),
            nn.Hardsigmoid(),
        )

    def scale(self, mean_BE: Tensor) -> Tensor:
        """The factor (B, E) of each channel, given the mean of each channel over the map."""
        return self.fc(mean_BE)

    def linear_layers(self) -> tuple[nn.Linear, nn.Linear] | None:
        fc = self.fc
        layers: list[Any] = list(fc)
        known = [nn.Linear, nn.ReLU, nn.Linear, nn.Hardsigmoid]
        # A subclass may compute something else of the same layers.
        if type(self) is not SqueezeExcite or [type(layer) for layer in layers] != known:
            return None
        narrow, _, wide, _ = layers
        untouched = all(map(ops.is_untouched, (self, fc, *layers)))
        return (narrow, wide) if untouched and narrow.bias is not None and wide.bias is not None else None


class EfficientChannelAttention(ops.ChannelGate):
    """Channel gate from a 1-D convolution over the channel means (ECA-Net, arXiv 1910.03151).

    Takes and returns (B, E, H, W). The kernel grows with log2 of the channels; unlike timm's `EcaModule`, it may be 1.
    """

    def __init__(
        self, channels: int, *, hard: bool, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        t = int(abs((math.log2(channels) + 1) / 2))
        kernel_size = t if t % 2 else t + 1
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False, device=device, dtype=dtype)
        self.gate = nn.Hardsigmoid() if hard else nn.Sigmoid()

    def scale(self, mean_BE: Tensor) -> Tensor:
        """The factor (B, E) of each channel, given the mean of each channel over the map."""
        return self.gate(self.conv(mean_BE[:, None]))[:, 0]

    def convolution_layers(self) -> tuple[nn.Conv1d, nn.Module] | None:
        conv, gate = self.conv, self.gate
        same = conv.in_channels == conv.out_channels == 1 and 2 * conv.padding[0] == conv.kernel_size[0] - 1
        # A subclass may compute something else of the same layers.
        if type(self) is not EfficientChannelAttention or type(conv) is not nn.Conv1d or not same:
            return None
        if conv.bias is not None or conv.stride != (1,) or conv.dilation != (1,) or conv.padding_mode != "zeros":
            return None
        known = type(gate) in (nn.Sigmoid, nn.Hardsigmoid) and all(map(ops.is_untouched, (self, conv, gate)))
        return (conv, gate) if known else None


def resolve_act(act: str | int) -> str:
    """The name in `ACTS` of an activation, given by name or by the published integer (1 for the first).

    Raises:
        ValueError: for anything else.
    """
    name = ACTS[act - 1] if isinstance(act, int) and 1 <= act <= len(ACTS) else act
    if name not in ACTS:
        raise ValueError(f"act={act!r} is not known; choose one of {', '.join(ACTS)} or its number, 1 to {len(ACTS)}")
    return str(name)


class LocalityFeedForward(nn.Module):
    """The locality feed-forward: 1x1 expansion, depth-wise convolution, channel gate, 1x1 projection, plus the input.

    Maps (B, in_dim, H, W) to (B, out_dim, ceil(H / stride), ceil(W / stride)) in any memory format; tokens viewed as
    a map are channels-last and stay so. The signature, its defaults and the state dict (`conv.<n>.*`) are the published
    module's; the keyword-only arguments are additions.

    Args:
        in_dim: channels C of the input map.
        out_dim: channels of the output map.
        stride: stride of the depth-wise convolution.
        expand_ratio: hidden channels E = int(in_dim * expand_ratio).
        act: one of `ACTS` (or its published integer): the activation after both norms, and the gate.
        reduction: divisor of E for the squeeze-and-excitation bottleneck; other gates have none.
        wo_dp_conv: leave out the depth-wise convolution, its norm and its activation (Table 4's control).
        dp_first: place them before the expansion, over C channels.
        kernel_size: of the depth-wise convolution, odd.
        act_layer: makes the activation, instead of the one that `act` names; the gate stays.
        norm_layer: makes a norm, given its number of channels, such as `partial(nn.GroupNorm, 8)` or timm's
            `LayerNorm2d` where batches are small.
        shortcut: whether the input is added at the end. By default it is where `stride` is 1 and the width stays, as in
            an inverted residual.

    Raises:
        ValueError: for an unknown `act`, a width, ratio, stride, kernel size or reduction out of range, `stride` > 1,
            `dp_first` or `kernel_size` without the depth-wise convolution that they describe, or a `shortcut` between
            maps of different shapes.

    Source: arXiv 2104.05707, figure 3 and equations 8 to 10.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        stride: int = 1,
        expand_ratio: float = 4.0,
        act: str | int = "hs+se",
        reduction: int = 4,
        wo_dp_conv: bool = False,
        dp_first: bool = False,
        *,
        kernel_size: int = 3,
        act_layer: Callable[[], nn.Module] | None = None,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        shortcut: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_dim = int(in_dim * expand_ratio)
        act = resolve_act(act)
        _check_sizes(in_dim, out_dim, stride, expand_ratio, kernel_size)
        _check_depthwise(wo_dp_conv, dp_first, stride, kernel_size)
        same_shape = stride == 1 and in_dim == out_dim
        if shortcut and not same_shape:
            raise ValueError(f"shortcut=True adds the input, which stride={stride}, {in_dim} -> {out_dim} reshape")
        self.shortcut = same_shape if shortcut is None else shortcut
        # Only what was given, since not every norm layer takes both.
        factory: dict[str, Any] = {k: v for k, v in {"device": device, "dtype": dtype}.items() if v is not None}
        activation = act_layer or (nn.ReLU6 if act == "relu6" else nn.Hardswish)

        def pointwise(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 1, bias=False, **factory), norm_layer(outputs, **factory)]

        def depthwise(channels: int) -> list[nn.Module]:
            padding = kernel_size // 2
            conv = nn.Conv2d(channels, channels, kernel_size, stride, padding, groups=channels, bias=False, **factory)
            return [conv, norm_layer(channels, **factory), activation()]

        layers = [*pointwise(in_dim, hidden_dim), activation()]
        if dp_first:
            layers = depthwise(in_dim) + layers
        elif not wo_dp_conv:
            layers += depthwise(hidden_dim)
        if act == "hs+se":
            layers.append(SqueezeExcite(hidden_dim, reduction, **factory))
        elif act in ("hs+eca", "hs+ecah"):
            layers.append(EfficientChannelAttention(hidden_dim, hard=act == "hs+ecah", **factory))
        layers += pointwise(hidden_dim, out_dim)
        self.conv = nn.Sequential(*layers)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        out_BCHW = ops.feed_forward(self.conv, map_BCHW)
        return map_BCHW + out_BCHW if self.shortcut else out_BCHW

    def fuse(self) -> nn.Module:
        """The module of a fused model (`localvit.fuse`): batch norms folded. Itself where folding would change results.

        The name is the one that timm's `reparameterize_model` looks for.

        Raises:
            ValueError: in training mode.
        """
        stages = ops.stages_to_fold(self, self.conv) if type(self) is LocalityFeedForward else None
        return self if stages is None else ops.FusedFeedForward(stages, shortcut=self.shortcut)


def _check_sizes(in_dim: int, out_dim: int, stride: int, expand_ratio: float, kernel_size: int) -> None:
    for name, value in (("in_dim", in_dim), ("out_dim", out_dim), ("stride", stride)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if int(in_dim * expand_ratio) < 1:
        raise ValueError(f"expand_ratio={expand_ratio} leaves no hidden channel of in_dim={in_dim}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size} must be odd, so that each patch is the center of its neighborhood")


def _check_depthwise(wo_dp_conv: bool, dp_first: bool, stride: int, kernel_size: int) -> None:
    given = [f"stride={stride}"] * (stride > 1) + ["dp_first=True"] * dp_first
    given += [f"kernel_size={kernel_size}"] * (kernel_size != 3)
    if wo_dp_conv and given:
        raise ValueError(f"{given[0]} needs the depth-wise convolution, which wo_dp_conv=True leaves out")
