"""Locality in timm's hierarchical models and in other orders of tokens, compared with the host's own maps.

Shapes: B batch, N tokens, C channels, E hidden channels, H and W the grid.
"""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from checks import (
    adapters_of,
    check_every_adapter_matters,
    check_function_is_kept,
    check_gradients_reach_every_adapter,
    check_map_is_the_image,
    hidden_maps,
    projections_of,
    randomized,
    without_attention,
)
from timm.models.hiera import Hiera
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.nest import Nest
from torch import Tensor, nn

import localvit
from localvit import Replace
from localvit.surgery.sites import Site, Unsupported, find_sites
from localvit.tokens.mlp import LocalityMlp

CLASSES = {"num_classes": 5}


class Tokens(nn.Module):
    """Returns all tokens of a host: its head reads class tokens only, which no patch of the last block affects."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, image_BCHW: Tensor) -> Tensor:
        if hasattr(self.model, "transformers"):
            _, maps = self.model.forward_intermediates(image_BCHW)
            return maps[-1]
        tokens = self.model.forward_features(image_BCHW)
        return torch.cat(tokens, dim=1) if isinstance(tokens, list) else tokens


def silence_levit(site: Site) -> None:
    nn.init.zeros_(site.block.attn.proj.ln.bn.weight)
    nn.init.zeros_(site.block.attn.proj.ln.bn.bias)


def silence_mobilevit_v2(site: Site) -> None:
    """Also removes the norm, whose statistics are those of the whole map."""
    without_attention(site)
    site.block.norm2 = nn.Identity()


@dataclass(frozen=True, kw_only=True)
class Host:
    """A small model of a family."""

    make: Callable[..., nn.Module]
    sites: int
    """Number of feed-forwards, which follows from the depths."""
    image: tuple[int, int] = (64, 96)
    reach: int = 0
    """How many patches away a change of a pixel reaches through the convolutions before the first site."""
    silence: Callable[[Site], None] = without_attention
    refused: str = ""
    """Part of the reason why `Replace` is refused; empty if it is not."""
    more: dict[str, Any] = field(default_factory=dict)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return randomized(self.make(**CLASSES, **self.more)).eval()

    def images(self) -> Tensor:
        return torch.randn(2, 3, *self.image, generator=torch.Generator().manual_seed(0))


def mvitv2(**config: Any) -> Callable[..., nn.Module]:
    """Created for square images; it takes others too."""
    config = {"depths": (1, 2, 1, 2), "embed_dim": 16} | config
    return lambda **kwargs: MultiScaleVit(MultiScaleVitCfg(**config), img_size=96, **kwargs)


def create(name: str, *, tokens: bool = False, **kwargs: Any) -> Callable[..., nn.Module]:
    def make(**more: Any) -> nn.Module:
        model = timm.create_model(name, **kwargs, **more)
        return Tokens(model) if tokens else model

    return make


SMALL_COAT = {"img_size": (64, 96), "serial_depths": (1, 2, 1, 2)}
SMALL_LEVIT = {"img_size": (80, 112), "embed_dim": (32, 48, 64), "num_heads": (2, 3, 4), "depth": (1, 2, 2)}
SMALL_CROSSVIT = {"embed_dim": (24, 48), "depth": ((1, 2, 0), (1, 1, 0))}
SMALL_PIT = {"img_size": (64, 88), "base_dims": (8, 8, 8), "depth": (1, 2, 1)}
SMALL_TWINS = {"img_size": (64, 96), "embed_dims": (16, 32, 40, 64), "depths": (2, 2, 3, 2)}
SMALL_HIERA = {"img_size": (64, 96), "embed_dim": 16, "stages": (1, 2, 2, 1)}

HOSTS = {
    "coat_lite": Host(
        make=create("coat_lite_tiny", tokens=True, **SMALL_COAT, embed_dims=(16, 32, 40, 64)),
        sites=1 + 2 + 1 + 2,
    ),
    "coat": Host(
        make=create("coat_tiny", tokens=True, **SMALL_COAT, embed_dims=(16, 24, 24, 24), parallel_depth=2),
        sites=1 + 2 + 1 + 2 + 2,
        refused="its feed-forward serves three grids",
    ),
    "crossvit": Host(
        make=create("crossvit_9_240", **SMALL_CROSSVIT, img_size=(60, 120)), sites=1 + 2 + 1 + 1, image=(60, 120)
    ),
    "crossvit_dagger": Host(
        make=create("crossvit_9_dagger_240", **SMALL_CROSSVIT, img_size=(120, 240)),
        sites=1 + 2 + 1 + 1,
        image=(120, 240),
        reach=1,  # 7x7 of stride 4, 3x3 of stride 3, 3x3
    ),
    "hiera": Host(make=create("hiera_tiny_224", **SMALL_HIERA), sites=1 + 2 + 2 + 1, reach=1),  # 7x7 of stride 4
    "hiera_unconsumed": Host(make=create("hiera_tiny_224", **SMALL_HIERA, q_pool=1), sites=1 + 2 + 2 + 1, reach=1),
    "levit": Host(
        make=create("levit_128s", **SMALL_LEVIT),
        sites=1 + 2 + 2 + 2,  # and two downsamplings
        image=(80, 112),
        reach=1,  # four 3x3 of stride 2
        silence=silence_levit,
    ),
    "levit_conv": Host(
        make=create("levit_conv_128s", **SMALL_LEVIT),
        sites=1 + 2 + 2 + 2,
        image=(80, 112),
        reach=1,
        silence=silence_levit,
    ),
    "mobilevit": Host(make=create("mobilevit_xxs"), sites=2 + 4 + 3, image=(96, 160), reach=3),  # seven 3x3
    "mobilevit_v2": Host(
        make=create("mobilevitv2_050"), sites=2 + 4 + 3, image=(96, 160), reach=3, silence=silence_mobilevit_v2
    ),
    "mvitv2": Host(make=mvitv2(), sites=1 + 2 + 1 + 2, reach=1),  # 7x7 of stride 4
    "mvitv2_cls": Host(make=mvitv2(use_cls_token=True), sites=1 + 2 + 1 + 2, reach=1, more={"global_pool": "avg"}),
    "mvitv2_widening": Host(
        make=mvitv2(expand_attn=False), sites=1 + 2 + 1 + 2, reach=1, refused="widens 16 channels to 32"
    ),
    "nest": Host(
        make=partial(Nest, img_size=48, embed_dims=(16, 24, 32), num_heads=(2, 3, 4), depths=(1, 2, 2)),
        sites=1 + 2 + 2,
        image=(48, 48),
        more={"drop_path_rate": 0.0},  # 0.5 by default
    ),
    "pit": Host(
        make=create("pit_ti_224", tokens=True, **SMALL_PIT), sites=1 + 2 + 1, image=(64, 88), reach=1
    ),  # patches overlap by half
    "pit_distilled": Host(
        make=create("pit_ti_distilled_224", tokens=True, **SMALL_PIT), sites=1 + 2 + 1, image=(64, 88), reach=1
    ),
    "twins_pcpvt": Host(make=create("twins_pcpvt_small", **SMALL_TWINS), sites=2 + 2 + 3 + 2),
    "twins_svt": Host(make=create("twins_svt_small", **SMALL_TWINS), sites=2 + 2 + 3 + 2),
}

each_host = pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS.keys())


@each_host
def test_function_is_kept(host):
    check_function_is_kept(host.model(), host.images())


@each_host
def test_gradients_reach_every_adapter(host):
    check_gradients_reach_every_adapter(host.model(), host.images())


@each_host
def test_every_adapter_matters(host):
    check_every_adapter_matters(host.model(), host.images())


@each_host
def test_map_is_the_image(host):
    check_map_is_the_image(host.model(), host.images(), reach=host.reach, silence=host.silence)


@each_host
def test_every_feed_forward_is_a_site(host):
    sites = find_sites(host.model())
    assert len(sites) == host.sites
    assert len({id(site.projection) for site in sites}) == host.sites
    assert len({site.block_name for site in sites}) == host.sites


def outputs_as_maps(model: nn.Module, images_BCHW: Tensor) -> list[Tensor]:
    """The outputs of all blocks as maps (B, C, H, W), made by the layouts of their sites."""
    maps, sizes = [], {}

    def keep_size(projection: Any, args: tuple) -> None:
        if hasattr(projection.layout, "grid"):
            sizes[projection.layout] = projection.layout.grid.size

    def show(block: nn.Module, args: tuple, output: Any, layout: Any) -> None:
        if layout in sizes:  # A block that knows its grid itself has forgotten it after its call.
            layout.grid.record(sizes[layout])
        maps.append(layout.to_map(output[0] if isinstance(output, tuple) else output))

    handles = [projection.register_forward_pre_hook(keep_size) for projection in projections_of(model)]
    handles += [
        site.block.register_forward_hook(partial(show, layout=site.projection.layout)) for site in find_sites(model)
    ]
    with torch.no_grad():
        model(images_BCHW)
    for handle in handles:
        handle.remove()
    return maps


@pytest.mark.parametrize("name", [name for name in HOSTS if "mobilevit" not in name and name != "coat"])
def test_blocks_return_the_hosts_own_maps(name):
    """Against `forward_intermediates`, whose code is timm's. Exactly equal, since values are only moved."""
    host = HOSTS[name]
    model = localvit.localize(host.model())
    timm_model = model.model if isinstance(model, Tokens) else model
    if not hasattr(timm_model, "forward_intermediates"):
        pytest.skip(f"timm {timm.__version__} has no forward_intermediates for {type(timm_model).__name__}")
    with torch.no_grad():
        theirs = timm_model.forward_intermediates(host.images(), output_fmt="NCHW", intermediates_only=True)
    ours = outputs_as_maps(model, host.images())
    assert len(theirs) >= 2
    for map_BCHW in theirs:
        assert sum(map_BCHW.shape == other.shape and torch.equal(map_BCHW, other) for other in ours) == 1


@pytest.mark.parametrize("name", ["mobilevit", "mobilevit_v2"])
@pytest.mark.parametrize("image", [(64, 128), (72, 104)], ids=["whole patches", "interpolated"])
def test_mobilevit_blocks_return_what_the_host_folds(name, image):
    """Against the map that the host folds after the transformer, which the first version interpolates back."""
    model = localvit.localize(HOSTS[name].model())
    blocks = [module for module in model.modules() if hasattr(module, "conv_proj")]
    theirs = []
    for block in blocks:
        block.norm = nn.Identity()
        block.conv_proj.register_forward_pre_hook(lambda _, args: theirs.append(args[0]))
    last_of_block = [site.block is block.transformer[-1] for block in blocks for site in find_sites(block)]
    maps = outputs_as_maps(model, torch.randn(2, 3, *image, generator=torch.Generator().manual_seed(0)))
    ours = [map_BCHW for map_BCHW, last in zip(maps, last_of_block, strict=True) if last]
    assert len(ours) == len(theirs) == 3
    for map_BCHW, their_BCHW in zip(ours, theirs, strict=True):
        assert [size % 2 for size in map_BCHW.shape[2:]] == [0, 0]
        if map_BCHW.shape != their_BCHW.shape:
            assert (name, image) == ("mobilevit", (72, 104))
            map_BCHW = F.interpolate(map_BCHW, size=their_BCHW.shape[2:], mode="bilinear", align_corners=False)
        assert torch.equal(map_BCHW, their_BCHW)


def test_features_only_model():
    """Its class is timm's FeatureListNet, which contains the stages."""
    host = HOSTS["levit_conv"]
    model = randomized(host.make(features_only=True)).eval()
    assert len(find_sites(model)) == host.sites
    with torch.no_grad():
        before = model(host.images())
        torch.testing.assert_close(localvit.localize(model)(host.images()), before, rtol=0, atol=0)


def test_coat_uses_a_feed_forward_on_three_grids():
    host = HOSTS["coat"]
    maps = hidden_maps(localvit.localize(host.model()), host.images())
    serial = [(16, 24), (8, 12), (8, 12), (4, 6), (2, 3), (2, 3)]
    assert [tuple(map_BEHW.shape[2:]) for map_BEHW in maps] == serial + 2 * [(8, 12), (4, 6), (2, 3)]


def test_coat_names_the_grids_that_tokens_do_not_fill():
    host = HOSTS["coat"]
    block = localvit.localize(host.model()).model.parallel_blocks[0]
    with pytest.raises(ValueError, match=r"95 image tokens .* the grids 8 x 12 of 96, 4 x 6 of 24, 2 x 3 of 6"):
        block.mlp2(torch.zeros(1, 96, 24))


def test_masked_hiera_raises_with_both_numbers():
    """Two of the six mask units of 8 x 8 are dropped. A mask that drops none is allowed."""
    host = HOSTS["hiera"]
    model, images = localvit.localize(host.model()), host.images()
    mask = torch.tensor([[True, False, True, True, False, True]] * 2)
    with pytest.raises(ValueError, match="256 image tokens do not fill the 16 x 24 grid of 384"):
        model.forward_features(images, mask=mask)
    with torch.no_grad():
        whole = model.forward_features(images, mask=torch.ones_like(mask))
        assert torch.equal(whole, model.forward_features(images))


SMALL_VIDEO = {
    "img_size": (4, 32, 32),
    "q_stride": (1, 2, 2),
    "mask_unit_size": (1, 8, 8),
    "patch_kernel": (3, 7, 7),
    "patch_stride": (2, 4, 4),
    "patch_padding": (1, 3, 3),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_drop_rate": 0.25}, r"drops mask units in training \(patch_drop_rate=0.25\)"),
        (SMALL_VIDEO, "3 dimensions of tokens; locality is for images"),
    ],
    ids=["patch_drop_rate", "video"],
)
def test_hiera_is_refused_if_its_tokens_do_not_form_a_map(changes, message):
    model = Hiera(**(SMALL_HIERA | changes))
    with pytest.raises(ValueError, match=message):
        localvit.localize(model, inplace=True)


def with_trained_adapters(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for adapter in adapters_of(model):
        nn.init.normal_(adapter.conv.weight, std=0.1, generator=generator)
    return model


@each_host
def test_copies_compute_the_same(host):
    """A deep copy, a pickled one, and a new model that loads the state dict."""
    model, images = with_trained_adapters(localvit.localize(host.model())), host.images()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = localvit.localize(host.model())
    loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded]
    with torch.no_grad():
        expected = model(images)
        assert not torch.equal(expected, host.model()(images))
        for each in copies:
            assert torch.equal(each(images), expected)


def paper_parameters(dim: int, hidden_dim: int) -> int:
    """Two 1x1 convolutions and the 3x3 depth-wise one, without bias, each with a BatchNorm."""
    return (dim * hidden_dim + 2 * hidden_dim) + (9 * hidden_dim + 2 * hidden_dim) + (hidden_dim * dim + 2 * dim)


@pytest.mark.parametrize("name", [name for name, host in HOSTS.items() if not host.refused])
def test_replace(name):
    """The model has the parameters of the paper's figure 3 in place of the old ones, and all of them get a gradient."""
    host = HOSTS[name]
    model, images = host.model().train(), host.images()
    before, replaced, added = sum(parameter.numel() for parameter in model.parameters()), 0, 0
    for site in find_sites(model):
        gone = [site.block.mlp, *([site.block.norm2] if site.slot.norm else [])]
        replaced += sum(parameter.numel() for module in gone for parameter in module.parameters())
        added += paper_parameters(site.dim, site.hidden_dim)
    localvit.localize(model, Replace(act="hs"), inplace=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == before - replaced + added
    modules = [module for module in model.modules() if isinstance(module, LocalityMlp)]
    assert len(modules) == host.sites
    model(images).square().sum().backward()
    for module in modules:
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())
    with torch.no_grad():
        assert torch.isfinite(model.eval()(images)).all()


@pytest.mark.parametrize("name", [name for name, host in HOSTS.items() if host.refused])
def test_replace_is_refused_with_the_reason(name):
    model = HOSTS[name].model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"the paper's module cannot replace .*{HOSTS[name].refused}"):
        localvit.localize(model, Replace(), inplace=True)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_replace_in_some_blocks_of_a_host():
    """Blocks that widen are refused: in MViTv2 without `expand_attn` the last of each stage except the last."""
    model, images = HOSTS["mvitv2_widening"].model(), HOSTS["mvitv2_widening"].images()
    assert [isinstance(site.slot, Unsupported) for site in find_sites(model)] == [True, False, True, True, False, False]
    localvit.localize(model, Replace(), blocks=[2, 5, 6], inplace=True)
    assert torch.isfinite(model(images)).all()


def test_replace_needs_a_stochastic_depth_of_the_feed_forward():
    model = timm.create_model("coat_lite_tiny", **SMALL_COAT, drop_path_rate=0.1)
    with pytest.raises(ValueError, match="create the model without drop_path_rate"):
        localvit.localize(model, Replace(), inplace=True)
