"""The locality module's inference form: batch norms folded, tokens never copied into another layout.

1x1 convolutions become linear layers over channels that lie last, as tokens have them, and activations and the gate
work in place.

Shapes: B batch, C channels, E expanded channels, H and W the patch grid.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class FusedConvolutions(nn.Sequential):
    """What a `LocalityFeedForward` computes in evaluation mode, without its shortcut: (B, H, W, C) in and out.

    Args:
        layers: the module's `conv`, in evaluation mode; it is left as it is.
    """

    def __init__(self, layers: nn.Sequential) -> None:
        fused: list[nn.Module] = []
        followers: list[Any] = [*list(layers)[1:], None]
        for layer, norm in zip(layers, followers, strict=True):
            if isinstance(layer, nn.BatchNorm2d):
                continue  # folded into the convolution before it
            if isinstance(layer, nn.Conv2d):
                convolution = fuse_conv_bn_eval(layer, norm)
                fused.append(_Depthwise(convolution) if layer.groups > 1 else _linear(convolution))
            elif isinstance(layer, nn.Hardswish | nn.ReLU6):
                fused.append(type(layer)(inplace=True))
            else:
                fused.append(_GateInPlace(layer))
        super().__init__(*fused)


def _linear(convolution: nn.Conv2d) -> nn.Linear:
    """A 1x1 convolution as a linear layer over the last dimension."""
    weight, bias = convolution.weight, convolution.bias
    assert bias is not None
    linear = nn.Linear(convolution.in_channels, convolution.out_channels, device="meta")  # its weights come now
    linear.weight = nn.Parameter(weight.detach().flatten(1), requires_grad=weight.requires_grad)
    linear.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
    return linear.eval()


class _Depthwise(nn.Module):
    """A depth-wise convolution over maps whose channels lie last."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.conv = convolution

    def forward(self, x_BHWE: Tensor) -> Tensor:
        return self.conv(x_BHWE.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class _GateInPlace(nn.Module):
    """A channel gate that multiplies the map it is given, whose channels lie last."""

    def __init__(self, gate: Any) -> None:
        super().__init__()
        self.gate: Any = gate

    def forward(self, x_BHWE: Tensor) -> Tensor:
        # A sum divided, for in half precision torch's mean takes six times as long on the CPU.
        mean_BE = x_BHWE.flatten(1, 2).sum(1) / (x_BHWE.shape[1] * x_BHWE.shape[2])
        return x_BHWE.mul_(self.gate.scale(mean_BE)[:, None, None])


class FusedFeedForward(nn.Module):
    """`LocalityFeedForward` in its inference form: maps (B, C, H, W) of any memory format in, channels-last out."""

    def __init__(self, layers: nn.Sequential, *, shortcut: bool) -> None:
        super().__init__()
        self.conv = FusedConvolutions(layers)
        self.shortcut = shortcut

    def forward(self, map_BCHW: Tensor) -> Tensor:
        out_BCHW = self.conv(map_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return map_BCHW + out_BCHW if self.shortcut else out_BCHW
