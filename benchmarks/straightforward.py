"""LocalViT as the paper reads, in NCHW: a straightforward implementation to measure the one of `localvit` against.

It implements the locality feed-forward, and how a block uses it, from arXiv 2104.05707, figure 3 and equations 8 to 10.
The image tokens are copied into a contiguous map, which passes a 1x1 convolution, batch norm, activation, depth-wise
convolution, batch norm, activation, gate, 1x1 convolution and batch norm. The input of the map is added, and the class
token is put in front again. Attention is explicit: queries times keys, softmax, times values. Nothing is folded or left
out.

The rest of the model stays as it is: patch embeddings, positions, norms, projections of attentions, window partition,
the inner transformer of TNT, the random-feature attention of T2T, heads. The grid need not be square.

Shapes: B batch, N tokens (prefix tokens first), P prefix tokens, C channels, E expanded channels, H and W the grid.
"""

import copy
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from localvit.locality import SqueezeExcite
from localvit.models.pvt_stage import Block as PVTBlock
from localvit.models.t2t import TokenPerformer, random_feature_attention
from localvit.tokens.mlp import LocalityMlp

from timm.models.tnt import Block as TNTBlock  # isort: skip
from timm.models.vision_transformer import Block as ViTBlock  # isort: skip


class HardSwish(nn.Module):
    """Hard swish, as defined in arXiv 1905.02244, section 5.2."""

    def forward(self, x: Tensor) -> Tensor:
        return x * F.relu6(x + 3) / 6


class Gate(nn.Module):
    """Squeeze-and-excitation of a map (B, E, H, W), with the linear layers in `fc`."""

    def __init__(self, fc: nn.Sequential) -> None:
        super().__init__()
        self.fc = nn.Sequential(*list(fc)[:-1])  # without the hard sigmoid, which forward writes out

    def forward(self, map_BEHW: Tensor) -> Tensor:
        scale_BE = F.relu6(self.fc(F.adaptive_avg_pool2d(map_BEHW, 1).flatten(1)) + 3) / 6
        return map_BEHW * scale_BE[:, :, None, None]


class FeedForward(nn.Module):
    """The locality feed-forward with its shortcut, for tokens (B, P + H * W, C)."""

    def __init__(self, mlp: LocalityMlp) -> None:
        super().__init__()
        self.layout = mlp.layout
        replacements: dict[type, Any] = {
            nn.Hardswish: lambda act: HardSwish(),
            SqueezeExcite: lambda gate: Gate(gate.fc),
        }
        self.conv = nn.Sequential(*(replacements.get(type(layer), lambda layer: layer)(layer) for layer in mlp.conv))

    def forward(self, x_BNC: Tensor) -> Tensor:
        prefix_BPC, image_BNC = x_BNC.tensor_split([self.layout.num_prefix_tokens], dim=1)
        map_BCHW = image_BNC.transpose(1, 2).unflatten(2, self.layout.grid.size).contiguous()
        map_BCHW = map_BCHW + self.conv(map_BCHW)
        image_BNC = map_BCHW.flatten(2).transpose(1, 2)
        return torch.cat((prefix_BPC, image_BNC), dim=1) if prefix_BPC.shape[1] else image_BNC


def _vit(block: Any, x_BNC: Tensor) -> Tensor:
    return block.mlp(x_BNC + block.drop_path1(block.ls1(block.attn(block.norm1(x_BNC)))))


def _pvt(block: Any, x_BNC: Tensor, grid_size: tuple[int, int]) -> Tensor:
    return block.mlp(x_BNC + block.drop_path1(block.attn(block.norm1(x_BNC), grid_size)))


def _swin(block: Any, x_BHWC: Tensor) -> Tensor:
    x_BHWC = x_BHWC + block.drop_path1(block._attn(block.norm1(x_BHWC)))
    return block.mlp(x_BHWC.flatten(1, 2)).unflatten(1, x_BHWC.shape[1:3])


def _tnt(block: Any, pixels: Tensor, x_BNC: Tensor) -> tuple[Tensor, Tensor]:
    # The attentions and the inner feed-forward include stochastic depth.
    pixels = pixels + block.attn_in(block.norm_in(pixels))
    pixels = pixels + block.mlp_in(block.norm_mlp_in(pixels))
    from_pixels_BNC = block.proj(block.norm1_proj(pixels).reshape(x_BNC.shape[0], x_BNC.shape[1] - 1, -1))
    x_BNC = torch.cat((x_BNC[:, :1], x_BNC[:, 1:] + from_pixels_BNC), dim=1)
    return pixels, block.mlp(x_BNC + block.attn_out(block.norm_out(x_BNC)))


def _performer(stage: Any, x_BHWD: Tensor) -> Tensor:
    key, query, value = stage.kqv(stage.norm1(x_BHWD.flatten(1, 2))).chunk(3, dim=-1)
    attended = value + stage.proj(random_feature_attention(query, key, value, stage.w))
    return stage.mlp(attended).unflatten(1, x_BHWD.shape[1:3])


FORWARDS = {ViTBlock: _vit, PVTBlock: _pvt, SwinTransformerBlock: _swin, TNTBlock: _tnt, TokenPerformer: _performer}


def straightforward(model: nn.Module) -> nn.Module:
    """Copy a LocalViT and implement its blocks in the straightforward way; in training it computes the same, too.

    The copy has the same mode, device, dtype and state dict.

    Raises:
        ValueError: If the model has no locality feed-forward, or has one in a block of an unknown family.
    """
    plain = copy.deepcopy(model)
    modules: list[Any] = list(plain.modules())
    blocks = [module for module in modules if isinstance(getattr(module, "mlp", None), LocalityMlp)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no locality feed-forward to implement")
    for block in blocks:
        forward: Any = FORWARDS.get(type(block))
        if forward is None:
            raise ValueError(f"there is no straightforward forward for {type(block).__name__}: add it to FORWARDS")
        block.mlp = FeedForward(block.mlp).train(block.training)
        block.forward = MethodType(forward, block)
    for module in modules:
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return plain
