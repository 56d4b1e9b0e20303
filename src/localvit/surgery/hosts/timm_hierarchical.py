"""Hosts of timm whose grid changes from stage to stage, or whose tokens do not lie row by row.

Shapes: B batch, N tokens, C channels, H and W the grid.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from localvit.surgery.hosts.timm_plain import in_order
from localvit.surgery.sites import LayoutFactory, Site, Slot, Unsupported, host, site, timm_slot
from localvit.tokens.layouts import ChannelsFirstMap, TokenSequence
from localvit.tokens.permuted import UnfoldedPixelMap, UnfoldedPixels, UnrolledTokens, WindowedTokens
from localvit.tokens.sources import ArgumentsGrid, FixedGrid, GridSource, OutputMap, ResultGrid


@host("timm.models.coat.CoaT")
def coat(model: Any) -> Iterator[Site]:
    """Serial blocks on one grid each; a parallel block has one feed-forward for the tokens of three grids."""
    embeds = [getattr(model, f"patch_embed{stage}") for stage in range(1, 5)]
    sizes = [embed.grid_size for embed in embeds if embed is not None]  # None: pruned
    for stage, size in enumerate(sizes, start=1):
        yield from in_order(model, f"serial_blocks{stage}", FixedGrid(size), 1)
    slot = Unsupported("its feed-forward serves three grids, each with a norm of its own")
    for name, block in model.parallel_blocks.named_children() if model.parallel_blocks is not None else ():
        source = ArgumentsGrid(block.mlp2, partial(_size_of_tokens, sizes=sizes[1:]))
        layout = partial(TokenSequence, num_prefix_tokens=1)
        yield site(model, f"parallel_blocks.{name}", source, layout, mlp="mlp2", slot=slot)


def _size_of_tokens(x_BNC: Tensor, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The grid that the tokens after a class token fill, out of the stages' grids, whose areas all differ."""
    image_tokens = x_BNC.shape[1] - 1
    for height, width in sizes:
        if height * width == image_tokens:
            return height, width
    grids = ", ".join(f"{height} x {width} of {height * width}" for height, width in sizes)
    raise ValueError(f"{image_tokens} image tokens (1 class token left out) fill none of the grids {grids}")


@host("timm.models.crossvit.CrossVit")
def crossvit(model: Any) -> Iterator[Site]:
    """Two branches with patches of different sizes; the cross-attention between them has no feed-forward."""
    sources = [OutputMap(embed.proj, within=embed) for embed in model.patch_embed]
    for name, block in model.blocks.named_children():
        for branch, _ in block.blocks.named_children():
            yield from in_order(model, f"blocks.{name}.blocks.{branch}", sources[int(branch)], 1)


@host("timm.models.hiera.Hiera")
def hiera(model: Any) -> Iterator[Site]:
    """Tokens stay unrolled until the last stage has pooled. Masked images do not fill the grid."""
    if model.patch_drop_rate:
        raise ValueError(
            f"Hiera drops mask units in training (patch_drop_rate={model.patch_drop_rate}), and the others do not "
            "form a map: create the model without patch_drop_rate"
        )
    for name, _ in model.blocks.named_children():
        strides, size = model.reroll.schedule[int(name)]
        if len(size) != 2:
            raise ValueError(f"this Hiera has {len(size)} dimensions of tokens; locality is for images, which have 2")
        yield site(model, f"blocks.{name}", FixedGrid(tuple(size)), partial(UnrolledTokens, strides=strides))


@host("timm.models.levit.Levit")
def levit(model: Any) -> Iterator[Site]:
    """Linear layers on tokens, or, in the `conv` variants, 1x1 convolutions on maps."""
    for index, (name, _) in enumerate(model.stages.named_children()):
        source = ResultGrid(model.stem, partial(_size_after_halving, times=index))
        yield from _levit_stage(model, f"stages.{name}.", None if model.use_conv else source)


@host("timm.models.levit.LevitStage")
def levit_stage(stage: Any) -> Iterator[Site]:
    """A stage by itself, in a `features_only` model, which timm makes of the `conv` variants only."""
    return _levit_stage(stage, "", None)


def _levit_stage(model: Any, prefix: str, source: GridSource | None) -> Iterator[Site]:
    layout: LayoutFactory = ChannelsFirstMap if source is None else TokenSequence
    if not isinstance(model.get_submodule(f"{prefix}downsample"), nn.Identity):
        yield site(model, f"{prefix}downsample", source, layout, slot=Slot(norm=None, drop_path="drop_path"))
    for name, _ in model.get_submodule(f"{prefix}blocks").named_children():
        yield site(model, f"{prefix}blocks.{name}", source, layout, slot=Slot(norm=None))


def _size_after_halving(map_BCHW: Tensor, times: int) -> tuple[int, int]:
    """Every stage but the first keeps every second row and column, the first included."""
    return -(-map_BCHW.shape[2] // 2**times), -(-map_BCHW.shape[3] // 2**times)


@host("timm.models.mobilevit.MobileVitBlock")
def mobilevit_block(block: Any) -> Iterator[Site]:
    """Linear layers on unfolded pixels."""
    return _on_pixels(block, UnfoldedPixels)


@host("timm.models.mobilevit.MobileVitV2Block")
def mobilevit_v2_block(block: Any) -> Iterator[Site]:
    """1x1 convolutions on unfolded pixels."""
    return _on_pixels(block, UnfoldedPixelMap)


def _on_pixels(block: Any, unfolded: LayoutFactory) -> Iterator[Site]:
    """A transformer on the pixels of a convolution's map, which the block first interpolates to whole patches."""
    source = ResultGrid(block.conv_1x1, partial(_in_whole_patches, patch_size=block.patch_size))
    for name, _ in block.transformer.named_children():
        yield site(block, f"transformer.{name}", source, partial(unfolded, patch_size=block.patch_size))


def _in_whole_patches(map_BCHW: Tensor, patch_size: tuple[int, int]) -> tuple[int, int]:
    patch_height, patch_width = patch_size
    return -(-map_BCHW.shape[2] // patch_height) * patch_height, -(-map_BCHW.shape[3] // patch_width) * patch_width


@host("timm.models.mvitv2.MultiScaleBlock")
def mvit_block(block: Any) -> Iterator[Site]:
    """The attention pools, and returns the grid of the feed-forward that follows."""
    slot = timm_slot(block)
    if block.shortcut_proj_mlp is not None:
        slot = Unsupported(
            f"it widens {block.mlp.fc1.in_features} channels to {block.dim_out}, and its shortcut reads the norm too"
        )
    source = ResultGrid(block.attn, _size_after_pooling)
    layout = partial(TokenSequence, num_prefix_tokens=int(block.has_cls_token))
    yield site(block, "", source, layout, slot=slot)


def _size_after_pooling(result: tuple[Tensor, Sequence[int]]) -> tuple[int, int]:
    _, (height, width) = result
    return height, width


@host("timm.models.nest.NestLevel")
def nest_level(level: Any) -> Iterator[Site]:
    """Windows of the map that its `pool` returns."""
    layout = partial(WindowedTokens, window_size=(level.block_size, level.block_size))
    source = OutputMap(level.pool)
    for name, _ in level.transformer_encoder.named_children():
        yield site(level, f"transformer_encoder.{name}", source, layout)


@host("timm.models.pit.PoolingVisionTransformer")
def pit(model: Any) -> Iterator[Site]:
    """Each stage reads a map and class tokens, and pools the map first if it has a `pool`."""
    for name, stage in model.transformers.named_children():
        pooled = ResultGrid(stage.pool, _size_of_first)
        source: GridSource = ArgumentsGrid(stage, _size_of_first) if stage.pool is None else pooled
        yield from in_order(model, f"transformers.{name}.blocks", source, model.cls_token.shape[1])


def _size_of_first(map_and_tokens: tuple[Tensor, Tensor]) -> tuple[int, int]:
    map_BCHW, _ = map_and_tokens
    return map_BCHW.shape[2], map_BCHW.shape[3]


@host("timm.models.twins.Block")
def twins_block(block: Any) -> Iterator[Site]:
    """The size of the grid is an argument of the block."""
    yield site(block, "", ArgumentsGrid(block, _size_argument))


def _size_argument(x_BNC: Tensor, size: tuple[int, int]) -> tuple[int, int]:
    return size
