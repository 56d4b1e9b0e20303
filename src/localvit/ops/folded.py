"""The locality module in a fused model: batch norms folded into the convolutions, and tokens never rearranged.

On NVIDIA GPUs the paper's module is one operator (`localvit.ops.operators`). Elsewhere its convolutions run one by one:
1x1 convolutions as linear layers over channels that lie last, as tokens have them; activation and gate in place, or in
the same pass as the convolution before them, by oneDNN on the CPU (`localvit.ops.dispatch.fused_path`).

Shapes: B batch, C channels, E expanded channels, H and W the patch grid.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from localvit.ops import operators
from localvit.ops.activations import activate
from localvit.ops.dispatch import fused_path, has_papers_form
from localvit.ops.kernel_gates import known_gate
from localvit.ops.stages import ChannelGate, Stages, channel_means, is_plain, parameters_of
from localvit.utils.exporting import is_exporting

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
        self.has_papers_form = has_papers_form(stages)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        if (module := self._as_operator()) is not None:
            _, height, width, _ = x_BHWC.shape
            return operators.run(x_BHWC.flatten(1, 2), (height, width), 0, module).unflatten(1, (height, width))
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
        if (module := self._as_operator()) is not None:
            # It leaves out prefix tokens and puts zeros for them where they are, which needs no copies.
            return operators.run(x_BNC, grid_size, num_prefix_tokens, module)
        map_BHWC = x_BNC[:, num_prefix_tokens:].unflatten(1, grid_size)
        return F.pad(self(map_BHWC).flatten(1, 2), (0, 0, num_prefix_tokens, 0))

    def _as_operator(self) -> operators.Module | None:
        """The convolutions as the operator takes them; None where they run one by one."""
        if not self.has_papers_form:
            return None
        first, second, third = cast("list[FusedConvolution]", list(self))
        parameters = [*parameters_of(first), *parameters_of(second), *parameters_of(third)]
        if fused_path(parameters[0]) != "operator":
            return None
        gate: str | None = None
        if (layers := second.gate) is not None:
            if (known := known_gate(layers)) is None:
                return None
            gate, gate_parameters = known
            parameters += gate_parameters
        # An export traces tensors of a class of its own.
        if not (is_exporting() or all(map(is_plain, parameters))):
            return None
        assert first.act is not None
        assert second.act is not None
        return operators.Module(parameters, first.act, second.act, gate)


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
        if gate_BC is not None:
            x_BHWC = x_BHWC.mul_(gate_BC[:, None, None])  # Nothing else reads the map of the convolution before.
        y_BHWE = self._by_onednn(x_BHWC) if fused_path(self.weight) == "onednn" else self._by_torch(x_BHWC)
        return y_BHWE, None if self.gate is None else self.gate.scale(channel_means(y_BHWE))

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
