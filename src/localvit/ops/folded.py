"""The locality module's inference form: batch norms folded, tokens never copied into another layout.

1x1 convolutions are linear layers over channels that lie last, as tokens have them; activations and the gate work in
place, or in the same pass as the convolution before them where the device can: oneDNN on the CPU, and the kernels of
`localvit.ops.kernels` on CUDA once they are switched on.

Shapes: B batch, C channels, E expanded channels, H and W the patch grid.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from localvit.ops import kernels
from localvit.ops.activations import act_of, activate

PART_BYTES = 2**24
"""The largest map that is made at once on the CPU, where memory beyond the caches, and new memory, is slow."""


class FusedConvolutions(nn.Sequential):
    """What a `LocalityFeedForward` computes in evaluation mode, without its shortcut: (B, H, W, C) in and out.

    Args:
        layers: the module's `conv`, in evaluation mode; it is left as it is.
    """

    def __init__(self, layers: nn.Sequential) -> None:
        fused: list[Any] = []
        followers: list[Any] = [*list(layers)[1:], None]
        for layer, norm in zip(layers, followers, strict=True):
            if isinstance(layer, nn.Conv2d):
                fused.append(FusedConvolution(fuse_conv_bn_eval(layer, norm)))
            elif act := act_of(layer):
                fused[-1].act = act
            elif not isinstance(layer, nn.BatchNorm2d):  # those are folded into the convolution before them
                fused[-1].gate = layer
        super().__init__(*fused)
        self.widest = max(convolution.conv.out_channels for convolution in fused)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        traced = torch.compiler.is_compiling() or isinstance(x_BHWC, torch.fx.Proxy)
        if traced or x_BHWC.device.type != "cpu":
            return super().forward(x_BHWC)
        batch, height, width, _ = x_BHWC.shape
        images = max(PART_BYTES // (height * width * self.widest * x_BHWC.element_size()), 1)
        if batch <= images:
            return super().forward(x_BHWC)
        return torch.cat([super(FusedConvolutions, self).forward(part_BHWC) for part_BHWC in x_BHWC.split(images)])


class FusedConvolution(nn.Module):
    """A convolution with its batch norm folded, and the activation and the channel gate after it: (B, H, W, C) maps."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv: Any = conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.act: Any = None
        self.gate: Any = None

    def forward(self, x_BHWC: Tensor) -> Tensor:
        if kernels.in_use() and self._suits_kernel():
            y_BHWE, sum_BE = kernels.depthwise_act_pool(x_BHWC, self.conv.weight, self.conv.bias, self.act)
            mean_BE = (sum_BE / (y_BHWE.shape[1] * y_BHWE.shape[2])).to(y_BHWE.dtype)
        else:
            y_BHWE = self._by_onednn(x_BHWC) if self._suits_onednn() else self._convolve_and_activate(x_BHWC)
            if self.gate is None:
                return y_BHWE
            mean_BE = channel_means(y_BHWE)
        return y_BHWE.mul_(self.gate.scale(mean_BE)[:, None, None])

    def _convolve_and_activate(self, x_BHWC: Tensor) -> Tensor:
        if self.conv.groups == 1:
            y_BHWE = F.linear(x_BHWC, self.conv.weight.flatten(1), self.conv.bias)
        else:
            y_BHWE = self.conv(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return y_BHWE if self.act is None else activate(y_BHWE, self.act, inplace=True)

    def _suits_kernel(self) -> bool:
        return self.gate is not None and self.conv.groups > 1 and self.conv.stride == (1, 1)

    def _suits_onednn(self) -> bool:
        """Whether oneDNN's fused convolution, which has no gradient and knows no autocast, does the same."""
        weight = self.conv.weight
        return bool(
            weight.device.type == "cpu"
            and weight.dtype in ONEDNN_DTYPES
            and torch.backends.mkldnn.enabled
            and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_exporting())
        )

    def _by_onednn(self, x_BHWC: Tensor) -> Tensor:
        conv = self.conv
        # The operator that torch.compile itself puts for a convolution with an activation; not in torch's Python API.
        out_BEHW = torch.ops.mkldnn._convolution_pointwise(
            x_BHWC.permute(0, 3, 1, 2),
            conv.weight,
            conv.bias,
            conv.padding,
            conv.stride,
            conv.dilation,
            conv.groups,
            *_ONEDNN_ACTS[self.act],
        )
        return out_BEHW.permute(0, 2, 3, 1)


_ONEDNN_ACTS = {None: ("none", [], ""), "hs": ("hardswish", [], ""), "relu6": ("hardtanh", [0.0, 6.0], "")}


def _onednn_dtypes() -> set[torch.dtype]:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return set()
    return {torch.float32, torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else {torch.float32}


ONEDNN_DTYPES = _onednn_dtypes()
"""What oneDNN computes at speed on this machine."""


def channel_means(map_BHWE: Tensor) -> Tensor:
    """The mean of each image's channels over the map, (B, E): what a channel gate reads."""
    if map_BHWE.dtype != torch.bfloat16:
        return map_BHWE.mean((1, 2))
    # torch's mean takes six times as long as its sum on the CPU, and no sum leaves this dtype's range.
    return map_BHWE.flatten(1, 2).sum(1) / (map_BHWE.shape[1] * map_BHWE.shape[2])


class FusedFeedForward(nn.Module):
    """`LocalityFeedForward` in its inference form: maps (B, C, H, W) of any memory format in, channels-last out."""

    def __init__(self, layers: nn.Sequential, *, shortcut: bool) -> None:
        super().__init__()
        self.conv = FusedConvolutions(layers)
        self.shortcut = shortcut

    def forward(self, map_BCHW: Tensor) -> Tensor:
        out_BCHW = self.conv(map_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return map_BCHW + out_BCHW if self.shortcut else out_BCHW
