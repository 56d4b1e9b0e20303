"""The paper's idea: a depth-wise convolution inside the feed-forward, so that neighboring patches talk.

LocalViT: Bringing Locality to Vision Transformers, arXiv 2104.05707, section 3.

Shapes: B batch, C input channels, E expanded (hidden) channels, H and W the patch grid.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from localvit.ops.folded import FusedFeedForward
from localvit.ops.recompute import Convolutions

ACTS = ("relu6", "hs", "hs+se", "hs+eca", "hs+ecah")
"""Activation and channel gate of the module, in the order of the published integers 1 to 5."""


class SqueezeExcite(nn.Module):
    """Channel gate from the mean of the whole map: squeeze-and-excitation, arXiv 1709.01507, with a hard sigmoid.

    Reads and returns (B, E, H, W). `reduction` divides the channels: the bottleneck is `channels // reduction` wide.
    """

    def __init__(self, channels: int, reduction: int, *, device=None, dtype=None) -> None:
        super().__init__()
        if not 1 <= reduction <= channels:
            raise ValueError(
                f"reduction={reduction} leaves the squeeze-and-excitation gate over {channels} channels no width; "
                f"it divides the channels: give 1 to {channels}"
            )
        factory = {"device": device, "dtype": dtype}
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // reduction, **factory),
            nn.ReLU(),
            nn.Linear(channels // reduction, channels, **factory),
            nn.Hardsigmoid(),
        )

    def scale(self, mean_BE: Tensor) -> Tensor:
        """The factor (B, E) of each channel, from the channels' means."""
        return self.fc(mean_BE)

    def forward(self, map_BEHW: Tensor) -> Tensor:
        return map_BEHW * self.scale(map_BEHW.mean((2, 3)))[:, :, None, None]


class EfficientChannelAttention(nn.Module):
    """Channel gate from a 1-D convolution over the channel means (ECA-Net, arXiv 1910.03151).

    Reads and returns (B, E, H, W). The kernel grows with log2 of the channels; unlike timm's `EcaModule` it may be 1.
    """

    def __init__(self, channels: int, *, hard: bool, device=None, dtype=None) -> None:
        super().__init__()
        t = int(abs((math.log2(channels) + 1) / 2))
        kernel_size = t if t % 2 else t + 1
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False, device=device, dtype=dtype)
        self.gate = nn.Hardsigmoid() if hard else nn.Sigmoid()

    def scale(self, mean_BE: Tensor) -> Tensor:
        """The factor (B, E) of each channel, from the channels' means."""
        return self.gate(self.conv(mean_BE[:, None]))[:, 0]

    def forward(self, map_BEHW: Tensor) -> Tensor:
        return map_BEHW * self.scale(map_BEHW.mean((2, 3)))[:, :, None, None]


def resolve_act(act: str | int) -> str:
    """Name of an activation given by name or by the published integer (1 relu6, 2 hs, 3 hs+se, 4 hs+eca, 5 hs+ecah).

    Raises ValueError for anything else.
    """
    name = ACTS[act - 1] if isinstance(act, int) and 1 <= act <= len(ACTS) else act
    if name not in ACTS:
        raise ValueError(f"act={act!r} is not known; choose one of {', '.join(ACTS)} or its number, 1 to {len(ACTS)}")
    return str(name)


class LocalityFeedForward(nn.Module):
    """The locality feed-forward: 1x1 expand, 3x3 depth-wise, channel gate, 1x1 project, plus the input.

    Maps (B, in_dim, H, W) to (B, out_dim, ceil(H / stride), ceil(W / stride)) in any memory format; tokens viewed as
    a map are channels-last and stay so. The input is added at the end unless `stride` or a change of width forbids it,
    as in an inverted residual. The signature and the state dict (`conv.<n>.*`) are the published module's.

    Args:
        in_dim: channels C of the input map.
        out_dim: channels of the output map.
        stride: stride of the depth-wise convolution.
        expand_ratio: hidden channels E = int(in_dim * expand_ratio).
        act: one of `ACTS` (or its published integer): the activation after both norms, and the gate.
        reduction: divisor of E for the squeeze-and-excitation bottleneck; other gates have none.
        wo_dp_conv: leave the depth-wise convolution, its norm and its activation out (Table 4's control).
        dp_first: put them before the expansion, over C channels.

    Raises:
        ValueError: for an unknown `act`, a width, ratio, stride or reduction that leaves nothing to compute, or
            `stride` > 1 or `dp_first` without the depth-wise convolution that they place.

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_dim = int(in_dim * expand_ratio)
        for name, value in (("in_dim", in_dim), ("out_dim", out_dim), ("stride", stride)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if hidden_dim < 1:
            raise ValueError(f"expand_ratio={expand_ratio} leaves no hidden channel of in_dim={in_dim}")
        if wo_dp_conv and (stride > 1 or dp_first):
            asked = f"stride={stride}" if stride > 1 else "dp_first=True"
            raise ValueError(f"{asked} needs the depth-wise convolution, which wo_dp_conv=True leaves out")
        act = resolve_act(act)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def convolution(inputs: int, outputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 1, bias=False, **factory), nn.BatchNorm2d(outputs, **factory)]

        def activation() -> nn.Module:
            return nn.ReLU6() if act == "relu6" else nn.Hardswish()

        def depthwise(channels: int) -> list[nn.Module]:
            return [
                nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False, **factory),
                nn.BatchNorm2d(channels, **factory),
                activation(),
            ]

        layers = [*convolution(in_dim, hidden_dim), activation()]
        if dp_first:
            layers = depthwise(in_dim) + layers
        elif not wo_dp_conv:
            layers += depthwise(hidden_dim)
        if act == "hs+se":
            layers.append(SqueezeExcite(hidden_dim, reduction, **factory))
        elif act in ("hs+eca", "hs+ecah"):
            layers.append(EfficientChannelAttention(hidden_dim, hard=act == "hs+ecah", **factory))
        layers += convolution(hidden_dim, out_dim)
        self.conv = Convolutions(*layers)
        self.shortcut = stride == 1 and in_dim == out_dim

    def fuse(self) -> nn.Module:
        """The form that `localvit.fuse` puts in its place, and timm's `reparameterize_model` too: batch norms folded.

        Raises ValueError in training mode.
        """
        self._check_evaluation()
        return FusedFeedForward(self.conv, shortcut=self.shortcut)

    def _check_evaluation(self) -> None:
        if self.training:
            raise ValueError("batch norms take each batch's statistics in training mode: call eval() before fuse()")

    def forward(self, map_BCHW: Tensor) -> Tensor:
        out_BCHW = self.conv(map_BCHW)
        return map_BCHW + out_BCHW if self.shortcut else out_BCHW
