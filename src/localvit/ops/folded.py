"""The locality module in a fused model: batch norms folded into the convolutions, and tokens never rearranged.

1x1 convolutions are linear layers over channels that lie last, as tokens have them. The activation and the gate work in
place, or in the same pass as the convolution before them where an implementation for that exists: oneDNN on the CPU,
the Triton kernels on NVIDIA GPUs (`localvit.ops.dispatch.folded_path`).

Shapes: B batch, C channels, E expanded channels, H and W the patch grid.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from localvit.ops.activations import activate
from localvit.ops.dispatch import folded_path, squeeze_excite_layers
from localvit.ops.operators import DEPTHWISE_ACT_POOL, POINTWISE, SQUEEZE_EXCITE
from localvit.ops.stages import ChannelGate, Stages, channel_means

PART_BYTES = 2**24
"""The largest map that is computed at once on the CPU, where memory beyond the caches, and new memory, is slow."""


class FusedFeedForward(nn.Module):
    """A `LocalityFeedForward` of a fused model: maps (B, C, H, W) of any memory format in, channels-last out."""

    def __init__(self, stages: Stages, *, shortcut: bool) -> None:
        super().__init__()
        self.conv = FusedConvolutions(stages)
        self.shortcut = shortcut

    def forward(self, map_BCHW: Tensor) -> Tensor:
        out_BCHW = self.conv(map_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return map_BCHW + out_BCHW if self.shortcut else out_BCHW


class FusedConvolutions(nn.Sequential):
    """What a `LocalityFeedForward` computes in evaluation mode, without its shortcut: (B, H, W, C) in and out.

    Args:
        stages: those of the module's layers, in evaluation mode; the layers are left as they are.
    """

    def __init__(self, stages: Stages) -> None:
        convs = [stages.first, *(stage.conv for stage in stages.stages)]
        norms = [*(stage.norm for stage in stages.stages), stages.last_norm]
        acts = [*(stage.act for stage in stages.stages), None]
        gates = [*(stage.gate for stage in stages.stages), None]
        folded = [fuse_conv_bn_eval(conv, norm) for conv, norm in zip(convs, norms, strict=True)]
        super().__init__(*map(FusedConvolution, folded, acts, gates))
        self.widest = max(conv.out_channels for conv in folded)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(x_BHWC, torch.fx.Proxy)
        if traced or x_BHWC.device.type != "cpu":
            return self._run(x_BHWC)
        batch, height, width, _ = x_BHWC.shape
        images = max(PART_BYTES // (height * width * self.widest * x_BHWC.element_size()), 1)
        if batch <= images:
            return self._run(x_BHWC)
        return torch.cat([self._run(part_BHWC) for part_BHWC in x_BHWC.split(images)])

    def _run(self, x_BHWC: Tensor) -> Tensor:
        gate_BC = None
        for conv in self:
            x_BHWC, gate_BC = conv(x_BHWC, gate_BC)
        return x_BHWC

    def tokens(self, x_BNC: Tensor, grid_size: tuple[int, int], num_prefix_tokens: int) -> Tensor:
        """As forward for the map of the tokens after the prefix tokens; as tokens (B, P + H * W, C), zero for these."""
        first, *others, last = cast("list[FusedConvolution]", list(self))
        if not (first.runs_rows() and last.runs_rows()):
            map_BHWC = x_BNC[:, num_prefix_tokens:].unflatten(1, grid_size)
            return F.pad(self(map_BHWC).flatten(1, 2), (0, 0, num_prefix_tokens, 0))
        # The operators leave out prefix tokens and put zeros for them where they are, which needs no copies.
        map_BHWC = first.rows(x_BNC, skipped=num_prefix_tokens).view(x_BNC.shape[0], *grid_size, -1)
        gate_BC = first.factors(map_BHWC)
        for conv in others:
            map_BHWC, gate_BC = conv(map_BHWC, gate_BC)
        return last.rows(map_BHWC.flatten(1, 2), gate_BC, num_prefix_tokens=num_prefix_tokens)


class FusedConvolution(nn.Module):
    """A convolution with its batch norm folded, and the activation and channel gate after it: (B, H, W, C) maps.

    Args:
        conv: the folded convolution.
        act: the name of the activation, or None.
        gate: the gate after it, or None.
    """

    def __init__(self, conv: nn.Conv2d, act: str | None, gate: ChannelGate | None) -> None:
        super().__init__()
        assert conv.bias is not None
        # Not `contiguous`, which keeps the ambiguous strides of a 1x1 or depth-wise weight: compiled code reads them.
        self.weight = nn.Parameter(conv.weight.detach().to(memory_format=torch.channels_last))
        self.bias = conv.bias
        for parameter in (self.weight, self.bias):
            parameter.requires_grad_(conv.weight.requires_grad)
        self.kernel_size, self.stride, self.padding = conv.kernel_size, conv.stride, conv.padding
        self.groups = conv.groups
        self.act = act
        self.gate = gate

    def forward(self, x_BHWC: Tensor, gate_BC: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The map, and the factors that the next convolution's input has to be multiplied by, if any.

        Args:
            x_BHWC: the input map.
            gate_BC: factors of its channels.
        """
        if self.runs_rows():
            batch, height, width, _ = x_BHWC.shape
            y_BHWE = self.rows(x_BHWC.flatten(1, 2), gate_BC).view(batch, height, width, -1)
            return y_BHWE, self.factors(y_BHWE)
        if gate_BC is not None:
            x_BHWC = x_BHWC.mul_(gate_BC[:, None, None])  # Nothing else reads the map of the convolution before.
        path = folded_path(self)
        if path == "operator":
            y_BHWE, sum_BE = DEPTHWISE_ACT_POOL.run(x_BHWC, self.weight, self.bias, self.act)
            return y_BHWE, self.factors(y_BHWE, sum_BE)
        y_BHWE = self._by_onednn(x_BHWC) if path == "onednn" else self._by_torch(x_BHWC)
        return y_BHWE, self.factors(y_BHWE)

    def runs_rows(self) -> bool:
        """Whether `rows` computes the convolution."""
        return self.groups == 1 and folded_path(self) == "operator"

    def rows(
        self, x_BSC: Tensor, gate_BC: Tensor | None = None, *, skipped: int = 0, num_prefix_tokens: int = 0
    ) -> Tensor:
        """A 1x1 convolution of rows, as `localvit.ops.operators.pointwise`."""
        weight = self.weight.flatten(1)
        return POINTWISE.run(x_BSC, weight, self.bias, self.act, gate_BC, skipped, num_prefix_tokens)

    def factors(self, y_BHWE: Tensor, sum_BE: Tensor | None = None) -> Tensor | None:
        """The gate's factors of the convolution's map, from its sums over positions if they are known; or None."""
        if self.gate is None or sum_BE is None:
            return None if self.gate is None else self.gate.scale(channel_means(y_BHWE))
        positions = y_BHWE.shape[1] * y_BHWE.shape[2]
        if (layers := squeeze_excite_layers(self.gate)) is None:
            return self.gate.scale((sum_BE / positions).to(y_BHWE.dtype))
        narrow, wide = layers
        return SQUEEZE_EXCITE.run(sum_BE, positions, narrow.weight, narrow.bias, wide.weight, wide.bias)

    def _by_torch(self, x_BHWC: Tensor) -> Tensor:
        if self.groups == 1:
            # Of a view, such as the tokens after prefix tokens, torch would copy the rows and then add the bias to the
            # whole map by an operation of its own; of contiguous rows it is part of the product.
            y_BHWE = F.linear(x_BHWC.contiguous(), self.weight.flatten(1), self.bias)
        else:
            map_BCHW = x_BHWC.permute(0, 3, 1, 2)
            map_BEHW = F.conv2d(map_BCHW, self.weight, self.bias, self.stride, self.padding, groups=self.groups)
            y_BHWE = map_BEHW.permute(0, 2, 3, 1)
        return y_BHWE if self.act is None else activate(y_BHWE, self.act, inplace=True)

    def _by_onednn(self, x_BHWC: Tensor) -> Tensor:
        # The operator that torch.compile itself uses for a convolution with an activation; torch has no Python API.
        out_BEHW = torch.ops.mkldnn._convolution_pointwise(
            x_BHWC.permute(0, 3, 1, 2),
            self.weight,
            self.bias,
            self.padding,
            self.stride,
            (1, 1),
            self.groups,
            *_ONEDNN_ACTIVATIONS[self.act],
        )
        return out_BEHW.permute(0, 2, 3, 1)


_ONEDNN_ACTIVATIONS = {None: ("none", [], ""), "hs": ("hardswish", [], ""), "relu6": ("hardtanh", [0.0, 6.0], "")}
