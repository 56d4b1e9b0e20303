"""Locality in the families of timm: what holds for all of them, and what is special about some.

Shapes: B batch, N tokens, C channels, H and W the patch grid.
"""

import copy
import pickle
from functools import partial

import pytest
import timm
import torch
import weights
from checks import (
    adapters_of,
    check_every_adapter_matters,
    check_function_is_kept,
    check_gradients_reach_every_adapter,
    check_map_is_the_image,
    projections_of,
    randomized,
)
from timm.layers import SEModule
from timm.models.davit import ChannelBlock, SpatialBlock
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock
from timm.models.vision_transformer import ParallelThingsBlock, VisionTransformer
from timm_families import PLAIN, ROWS, images, make
from torch import nn

import localvit
from localvit import Adapter, Replace
from localvit.models.pretrained import from_published
from localvit.surgery.sites import find_sites
from localvit.tokens.layouts import ChannelsFirstMap, ChannelsLastMap
from localvit.tokens.mlp import LocalityMlp
from published import golden_model

every_row = pytest.mark.parametrize("row", ROWS, ids=str)


@every_row
def test_sites_follow_from_the_depths(row):
    assert len(find_sites(make(row))) == row.sites


@every_row
def test_function_is_kept(row):
    check_function_is_kept(make(row), images(row.size))


@every_row
def test_gradients_reach_every_adapter(row):
    check_gradients_reach_every_adapter(make(row), images(row.size))


@every_row
def test_every_adapter_matters(row):
    check_every_adapter_matters(make(row), images(row.size, batch=1))


@every_row
def test_state_dict_goes_from_one_localized_model_to_another(row):
    one = randomized(localvit.localize(make(row)), seed=2).eval()
    other = localvit.localize(make(row)).eval()
    other.load_state_dict(one.state_dict(), strict=True)
    assert not any(adapter.is_neutral for adapter in adapters_of(other))
    image = images(row.size, batch=1)
    with torch.no_grad():
        assert torch.equal(one(image), other(image))


def without_gates(model: nn.Module) -> nn.Module:
    """The model without squeeze-and-excitation, which spreads a change over the whole map."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, SEModule):
                setattr(module, name, nn.Identity())
    return model


@pytest.mark.parametrize(
    ("row", "size"),
    [(row, row.size) for row in ROWS if row.reach is not None]
    + [(row, row.size[::-1]) for row in ROWS if row.reach is not None and row.any_size],
    ids=str,
)
def test_map_is_the_image(row, size):
    check_map_is_the_image(without_gates(make(row)), images(size, batch=1), reach=row.reach)


MIXED = [row for row in ROWS if row.reach is None and row.family.startswith("vision_transformer")]


@pytest.mark.parametrize("row", MIXED, ids=str)
def test_map_is_that_of_timms_intermediates(row):
    """Where a change spreads over the map: against timm's maps of the blocks' outputs, whose layout is the same."""
    model = localvit.localize(make(row)).eval().model
    [layout, *_] = [projection.layout for projection in projections_of(model)]
    maps = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, x_BNC: maps.append(layout.to_map(x_BNC)))
    with torch.no_grad():
        expected = model.forward_intermediates(images(row.size), output_fmt="NCHW", intermediates_only=True)
    assert len(maps) == len(expected) == 2
    for map_BCHW, timms_BCHW in zip(maps, expected, strict=True):
        assert torch.equal(map_BCHW, timms_BCHW)


def assert_output_is_what_was_read_and_made(site, out, read, made, layout):
    """`out`, of the block, is the sum of `read` and `made` by its feed-forward, as tokens or as a map."""
    tokens = made if isinstance(site.block, nn.Sequential) else read + made  # ParallelThingsBlock adds outside.
    if isinstance(site.block, SwinTransformerV2CrBlock):
        tokens = site.block.norm3(tokens)  # It norms the sum in the last block and is not part of the feed-forward.
    if out.shape != tokens.shape:
        tokens = layout.to_map(tokens)
    if out.shape != tokens.shape:
        tokens = tokens.permute(0, 2, 3, 1)
    assert torch.equal(out, tokens)


@every_row
def test_replace(row):
    """In training too a block returns the sum of its feed-forward's input and output: no norm, scale, stochastic depth.

    The layout's map of the tokens is the block's own map. Prefix tokens pass unchanged; gradients reach all weights.
    """
    model = make(row, drop_path_rate=0.0 if row.shared_drop_path else 0.5).train()
    if row.refused:
        assert_refused(model, row.refused, Replace())
        return
    sites = find_sites(model)
    localvit.localize(model, Replace(reduction=2), inplace=True)
    slots = [module for module in model.modules() if isinstance(module, LocalityMlp)]
    assert len(slots) == row.sites
    seen, sizes = {}, {}
    for slot in slots:
        if hasattr(slot.layout, "grid"):  # A block that knows its grid itself forgets it after its call.
            slot.register_forward_hook(lambda slot, args, out: sizes.update({slot: slot.layout.grid.size}))
    for module in [*(site.block for site in sites), *slots]:
        module.register_forward_hook(lambda module, args, out: seen.update({module: (args[0], out)}))
    model(images(row.size)).square().sum().backward()
    for site, slot in zip(sites, slots, strict=True):
        assert slot is site.block.get_submodule(site.slot.mlp)
        read, made = seen[slot]
        _, out = seen[site.block]
        if slot in sizes:
            slot.layout.grid.record(sizes[slot])
        assert_output_is_what_was_read_and_made(
            site, out[-1] if isinstance(out, tuple) else out, read, made, slot.layout
        )
        assert not made[:, : getattr(slot.layout, "num_prefix_tokens", 0)].any()
        assert isinstance(slot.conv[1], nn.BatchNorm2d)
        assert slot.conv[1].num_batches_tracked == 1
        assert slot.conv[0].weight.grad.any()
        assert slot.conv[3].weight.grad.any()


def assert_refused(model: nn.Module, message: str, method: Adapter | Replace) -> None:
    before = {name: (type(module), len(module._forward_hooks)) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        localvit.localize(model, method, inplace=True)
    assert {name: (type(module), len(module._forward_hooks)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("row", [row for row in ROWS if row.shared_drop_path], ids=str)
def test_replace_needs_a_stochastic_depth_of_the_feed_forward(row):
    assert_refused(make(row, drop_path_rate=0.5), "create the model without drop_path_rate", Replace())


@pytest.mark.skipif(
    not hasattr(timm.models.vision_transformer, "DiffParallelScalingBlock"),
    reason=f"timm {timm.__version__} projects attention and feed-forward separately",
)
@pytest.mark.parametrize("kind", ["DiffParallelScalingBlock", "ParallelScalingBlock"])
def test_a_projection_shared_with_attention_is_refused(kind):
    block_fn = getattr(timm.models.vision_transformer, kind)
    if kind == "ParallelScalingBlock":
        block_fn = partial(block_fn, fuse_out_proj=True)
    model = VisionTransformer(48, block_fn=block_fn, **PLAIN)
    assert_refused(model, rf"blocks\.0 \({kind}\) has one output projection", Adapter())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_dropped_patches_are_refused(name):
    model = timm.create_model(name, img_size=(42, 70), patch_size=14, patch_drop_rate=0.25, **PLAIN)
    assert_refused(model, r"patch_drop_rate=0\.25", Adapter())


def test_parallel_feed_forwards_are_of_one_block():
    model = VisionTransformer(48, block_fn=ParallelThingsBlock, **PLAIN)
    localvit.localize(model, blocks="2", inplace=True)
    assert adapters_of(model.blocks[0]) == []
    assert len(adapters_of(model.blocks[1])) == 2


def test_convits_class_token_comes_after_its_local_blocks():
    [row] = [row for row in ROWS if row.family == "convit"]
    layouts = [projection.layout for projection in projections_of(localvit.localize(make(row)))]
    assert [layout.num_prefix_tokens for layout in layouts] == [0, 0, 1]


@pytest.mark.parametrize("row", [row for row in ROWS if row.any_size], ids=str)
def test_sizes_in_turn(row):
    """Images of transposed sizes have as many patches; the grid of the last image does not count for the next."""
    model = randomized(localvit.localize(make(row)), seed=2).eval()
    untouched = copy.deepcopy(model)
    with torch.no_grad():
        model(images(row.size))
        assert torch.equal(model(images(row.size[::-1])), untouched(images(row.size[::-1])))


CSATV2 = [
    ("TransformerBlock", {"inp": 8, "oup": 8, "num_heads": 2}, 8),
    ("TransformerBlock", {"inp": 8, "oup": 12, "num_heads": 2, "downsample": True}, 8),
    ("SpatialTransformerBlock", {}, 1),
]


@pytest.mark.parametrize(("kind", "kwargs", "channels"), CSATV2)
def test_csatv2s_tokens_are_its_map(kind, kwargs, channels):
    """The block returns the map of its feed-forward's input plus output, also after pooling."""
    csatv2 = pytest.importorskip("timm.models.csatv2", reason=f"timm {timm.__version__} has no csatv2")
    torch.manual_seed(0)
    block = getattr(csatv2, kind)(**kwargs).eval()
    localvit.localize(block, inplace=True)
    [projection] = projections_of(block)
    layout = projection.layout
    maps = []
    block.norm2.register_forward_pre_hook(lambda norm, args: maps.append(layout.to_map(args[0])))
    block.mlp.register_forward_hook(lambda mlp, args, out: maps.append(layout.to_map(out)))
    with torch.no_grad():
        out_BCHW = block(torch.randn(2, channels, 7, 11))
    assert out_BCHW.shape[2:] == ((4, 6) if kwargs.get("downsample") else (7, 11))
    assert torch.equal(out_BCHW, sum(maps))


@pytest.mark.parametrize("block_class", [SpatialBlock, ChannelBlock])
def test_davits_blocks_may_lack_a_feed_forward(block_class):
    assert len(find_sites(block_class(8, 2))) == 1
    assert find_sites(block_class(8, 2, ffn=False)) == []


@pytest.mark.parametrize(
    ("layout_class", "shape"), [(ChannelsLastMap, (2, 7, 11, 5)), (ChannelsFirstMap, (2, 5, 7, 11))]
)
def test_layouts_of_maps_are_views(layout_class, shape):
    layout = pickle.loads(pickle.dumps(layout_class(None)))
    x = torch.randn(shape)
    map_BCHW = layout.to_map(x)
    assert map_BCHW.shape == (2, 5, 7, 11)
    assert map_BCHW.data_ptr() == x.data_ptr()
    assert torch.equal(layout.to_tokens(map_BCHW), x)


def test_replace_in_deit_gives_localvit_t():
    """timm's DeiT-T with the paper's 4 heads has the keys of LocalViT-T, and the published program's numbers."""
    fixture = golden_model("localvit_tiny_mlp4_act3_r192")
    ours = timm.create_model(fixture["model"]).double().eval()
    model = timm.create_model("deit_tiny_patch16_224", num_heads=4).double().eval()
    localvit.localize(model, Replace(reduction=192), inplace=True)
    assert [(key, value.shape) for key, value in model.state_dict().items()] == [
        (key, value.shape) for key, value in ours.state_dict().items()
    ]
    state_dict = {key: torch.from_numpy(weights.tensor(key, tuple(shape))) for key, shape, _ in fixture["state_dict"]}
    ours.load_state_dict(from_published(state_dict, ours), strict=True)
    model.load_state_dict(ours.state_dict(), strict=True)
    expected = fixture["eval"]
    image_BCHW = torch.from_numpy(weights.images(**expected["images"]))
    with torch.inference_mode():
        logits = model(image_BCHW)
        assert torch.equal(logits, ours(image_BCHW))
    published = torch.tensor(expected["logits_first_10"], dtype=torch.float64)
    # float64 through twelve blocks: as in tests/models/test_parity.py.
    torch.testing.assert_close(logits[:, :10], published, rtol=1e-9, atol=1e-9)
