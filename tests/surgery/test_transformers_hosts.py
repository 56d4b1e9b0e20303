"""Locality in the vision towers of Hugging Face transformers.

Shapes: B batch, N tokens, P prefix tokens, E hidden channels, C channels, H and W the patch grid.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import (
    adapters_of,
    check_every_adapter_matters,
    check_function_is_kept,
    check_gradients_reach_every_adapter,
    check_map_is_the_image,
    output_of,
    projections_of,
    randomized,
)
from torch import nn

import localvit
from localvit import Adapter, Replace
from localvit.surgery.localize import localize_with_options
from localvit.surgery.sites import Site, find_sites
from localvit.tokens.mlp import LocalityMlp

transformers = pytest.importorskip("transformers", reason="Hugging Face transformers is an extra")

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
MLP = {"intermediate_size": 40}
PATCH = {"patch_size": 5}


class Interpolating(nn.Module):
    """A tower that resamples its positions to the image."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, image_BCHW):
        return self.tower(image_BCHW, interpolate_pos_encoding=True)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A small tower, or a variant with other parts, on images whose grid is not square."""

    id: str
    model: str
    config: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    prefix: int
    """Number of tokens that are not patches."""
    sites: int = 2
    grid: tuple[int, int] = (7, 3)
    reach: int = 0
    """How many patches away the model itself brings a change to the hidden map."""
    replace: str | None = None
    """Why the paper's module cannot replace the feed-forward."""
    interpolating: bool = False
    """Whether the tower needs `interpolate_pos_encoding=True` for images of another size."""

    @property
    def image(self) -> torch.Tensor:
        return image(5 * self.grid[0], 5 * self.grid[1])

    def make(self, **changes: Any) -> nn.Module:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.kwargs | changes)
        model = randomized(getattr(transformers, self.model)(config))
        return Interpolating(model) if self.interpolating else model


ROWS = [
    Row(
        id="vit",
        model="ViTModel",
        config="ViTConfig",
        kwargs=SMALL | MLP | PATCH | {"image_size": (35, 15)},
        prefix=1,
    ),
    Row(
        id="deit",
        model="DeiTModel",
        config="DeiTConfig",
        kwargs=SMALL | MLP | PATCH | {"image_size": (35, 15)},
        prefix=2,
    ),
    Row(
        id="beit",
        model="BeitModel",
        config="BeitConfig",
        kwargs=SMALL
        | MLP
        | PATCH
        | {"image_size": (35, 15), "use_relative_position_bias": True, "layer_scale_init_value": 0.5}
        | {"drop_path_rate": 0.0},
        prefix=1,
    ),
    Row(
        id="dinov2",
        model="Dinov2Model",
        config="Dinov2Config",
        kwargs=SMALL | PATCH | {"image_size": 25, "mlp_ratio": 2},
        prefix=1,
    ),
    Row(
        id="dinov2 swiglu",
        model="Dinov2Model",
        config="Dinov2Config",
        kwargs=SMALL | PATCH | {"image_size": 25, "mlp_ratio": 2, "use_swiglu_ffn": True},
        prefix=1,
    ),
    Row(
        id="dinov2 registers",
        model="Dinov2WithRegistersModel",
        config="Dinov2WithRegistersConfig",
        kwargs=SMALL | PATCH | {"image_size": 25, "mlp_ratio": 2, "num_register_tokens": 3},
        prefix=4,
    ),
    Row(
        id="dinov3",
        model="DINOv3ViTModel",
        config="DINOv3ViTConfig",
        kwargs=SMALL | MLP | PATCH | {"num_register_tokens": 4},
        prefix=5,
    ),
    Row(
        id="dinov3 gated",
        model="DINOv3ViTModel",
        config="DINOv3ViTConfig",
        kwargs=SMALL | MLP | PATCH | {"num_register_tokens": 0, "use_gated_mlp": True},
        prefix=1,
    ),
    Row(
        id="clip",
        model="CLIPVisionModel",
        config="CLIPVisionConfig",
        kwargs=SMALL | MLP | PATCH | {"image_size": 25},
        prefix=1,
        interpolating=True,
    ),
    Row(
        id="siglip",
        model="SiglipVisionModel",
        config="SiglipVisionConfig",
        kwargs=SMALL | MLP | PATCH | {"image_size": 25},
        prefix=0,
        interpolating=True,
    ),
    Row(
        id="swin",
        model="SwinModel",
        config="SwinConfig",
        kwargs=PATCH
        | {"image_size": (35, 25), "embed_dim": 12, "depths": [2, 1], "num_heads": [2, 2], "window_size": 3},
        prefix=0,
        sites=3,
        grid=(7, 5),
    ),
    Row(
        id="segformer",
        model="SegformerModel",
        config="SegformerConfig",
        kwargs={
            "num_encoder_blocks": 2,
            "depths": [2, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [12, 24],
            "patch_sizes": [5, 3],
            "strides": [5, 2],
            "num_attention_heads": [2, 3],
            "mlp_ratios": [2, 3],
            "drop_path_rate": 0.0,
        },
        prefix=0,
        sites=3,
        reach=1,
        replace="the feed-forward of SegformerLayer has a depth-wise convolution already",
    ),
]
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
ROW = {row.id: row for row in ROWS}


def image(height: int = 35, width: int = 15) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def without_attention(site: Site) -> None:
    """Zero the attention of a site's layer. Its name is `attention` or `self_attn` in all versions of the library."""
    for name, module in site.block.named_modules():
        if name.startswith(("attention.", "self_attn.")) and isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def perturb(model: nn.Module) -> nn.Module:
    for adapter in adapters_of(model):
        nn.init.normal_(adapter.conv.weight, generator=torch.Generator().manual_seed(2))
    return model


@every_row
def test_function_is_kept(row):
    model = row.make()
    assert len(find_sites(model)) == row.sites
    check_function_is_kept(model, row.image)


@every_row
def test_gradients_reach_every_adapter(row):
    check_gradients_reach_every_adapter(row.make(), row.image)


@every_row
def test_every_adapter_matters(row):
    check_every_adapter_matters(row.make(), row.image)


@every_row
def test_map_is_the_image(row):
    check_map_is_the_image(row.make(), row.image, reach=row.reach, silence=without_attention)


@every_row
def test_the_first_adapter_convolves_the_patches_only(row):
    """Against a convolution over the map that this test makes of the hidden tokens."""
    model = perturb(localvit.localize(row.make().double().eval()))
    projection = projections_of(model)[0]
    seen = []
    projection.register_forward_hook(lambda projection, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        output_of(model, row.image)
    [(before_BNE, out_BNC)] = seen
    assert before_BNE.shape[1] == row.prefix + row.grid[0] * row.grid[1]
    map_BEHW = before_BNE[:, row.prefix :].transpose(1, 2).unflatten(2, row.grid)
    weight = projection.locality.conv.weight
    map_BEHW = map_BEHW + F.conv2d(map_BEHW, weight, padding=1, groups=map_BEHW.shape[1])
    after_BNE = torch.cat([before_BNE[:, : row.prefix], map_BEHW.flatten(2).transpose(1, 2)], 1)
    # float64; the two lay the map out differently in memory, so sums may go in another order.
    torch.testing.assert_close(out_BNC, F.linear(after_BNE, projection.weight, projection.bias))


@every_row
def test_replace(row):
    """A layer without its attention is the paper's module with its shortcut; prefix tokens pass unchanged."""
    model = row.make().double().eval()
    sites = find_sites(model)
    layer = sites[0].block
    if not hasattr(layer, "mlp") or row.replace:
        why = row.replace or r"replace .*layer.*two parts; in transformers 5\.9 and newer it is one"
        with pytest.raises(ValueError, match=why):
            localvit.localize(model, Replace(), inplace=True)
        return
    without_attention(sites[0])
    localvit.localize(model, Replace(reduction=4), inplace=True)
    assert sum(isinstance(module, LocalityMlp) for module in model.modules()) == row.sites
    seen = []
    layer.register_forward_hook(lambda layer, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        output_of(model, row.image)
        [(before_BNC, after_BNC)] = seen
        after_BNC = after_BNC[0] if isinstance(after_BNC, tuple) else after_BNC
        map_BCHW = before_BNC[:, row.prefix :].transpose(1, 2).unflatten(2, row.grid)
        expected_BCHW = map_BCHW + layer.mlp.conv(map_BCHW)
    assert torch.equal(after_BNC[:, : row.prefix], before_BNC[:, : row.prefix])
    torch.testing.assert_close(after_BNC[:, row.prefix :], expected_BCHW.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("beit", {"drop_path_rate": 0.1}, "drop_path_rate=0"),
        ("dinov2", {"drop_path_rate": 0.1}, "drop_path_rate=0"),
        ("vit", {"hidden_dropout_prob": 0.1}, "hidden_dropout_prob=0"),
        ("swin", {"hidden_dropout_prob": 0.1}, "hidden_dropout_prob=0"),
    ],
)
def test_replace_is_refused_where_dropout_serves_attention_too(name, changes, why):
    model = ROW[name].make(**changes)
    if not hasattr(find_sites(model)[0].block, "mlp"):
        why = "two parts"
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=why):
        localvit.localize(model, Replace(), inplace=True)
    assert set(model.state_dict()) == before
    localvit.localize(model, inplace=True)


def test_swin_keeps_the_stochastic_depth_of_its_attention():
    model = ROW["swin"].make(drop_path_rate=0.5)
    if hasattr(find_sites(model)[0].block, "mlp"):
        blocks = [site.block for site in find_sites(model)]
        dropped = [block.drop_path for block in blocks]
        localvit.localize(model, Replace(), inplace=True)
        assert all(isinstance(block.mlp, LocalityMlp) for block in blocks)
        assert all(block.drop_path is before for block, before in zip(blocks, dropped, strict=True))


def test_classifiers_and_backbones_contain_towers():
    classifier = transformers.ViTForImageClassification(transformers.ViTConfig(**ROW["vit"].kwargs))
    localvit.localize(classifier, blocks="2", inplace=True)
    [adapter] = adapters_of(classifier)
    assert adapter is adapters_of(classifier.vit)[0]
    config = transformers.Dinov2WithRegistersConfig(**ROW["dinov2 registers"].kwargs, out_features=["stage2"])
    backbone = randomized(transformers.Dinov2WithRegistersBackbone(config)).double().eval()
    with torch.no_grad():
        [expected] = backbone(image()).feature_maps
        localized = localvit.localize(backbone)
        [after] = localized(image()).feature_maps
        [other] = perturb(localized)(image()).feature_maps
    assert expected.shape[2:] == (7, 3)
    assert torch.equal(after, expected)
    assert not torch.allclose(other, expected)


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_text_towers_do_not_change(family):
    vision = getattr(transformers, f"{family}VisionConfig")(**SMALL, **MLP, **PATCH, image_size=25)
    tokens = {"vocab_size": 31, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text = getattr(transformers, f"{family}TextConfig")(**SMALL, **MLP, **tokens, max_position_embeddings=7)
    config = getattr(transformers, f"{family}Config")(text_config=text.to_dict(), vision_config=vision.to_dict())
    model = randomized(getattr(transformers, f"{family}Model")(config)).eval()
    words = torch.tensor([[5, 11, 3, 2]])
    with torch.no_grad():
        before = model(words, image(25, 25).float())
        perturb(localvit.localize(model, inplace=True))
        after = model(words, image(25, 25).float())
    assert len(adapters_of(model.vision_model)) == len(adapters_of(model)) == 2
    assert torch.equal(after.text_embeds, before.text_embeds)
    assert not torch.allclose(after.image_embeds, before.image_embeds)


def test_images_of_several_sizes():
    """What an adapter adds that shifts the map by one row, on either grid."""
    row = ROW["vit"]
    tower = row.make(image_size=25)
    model = localvit.localize(Interpolating(tower).double().eval(), blocks="1")
    [adapter] = adapters_of(model)
    with torch.no_grad():
        adapter.conv.weight[:, :, 0, 1] = 1.0
    seen = []
    adapter.register_forward_hook(lambda adapter, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        for height, width in ((7, 3), (2, 11)):
            output_of(model, image(5 * height, 5 * width))
            map_BEHW, added_BEHW = seen.pop()
            assert map_BEHW.shape[2:] == (height, width)
            assert torch.equal(added_BEHW[:, :, 1:], map_BEHW[:, :, :-1])
            assert not added_BEHW[:, :, 0].any()


def test_masked_patches_stay_on_the_grid():
    model = perturb(localvit.localize(ROW["dinov2"].make().double().eval()))
    masked = torch.arange(2 * 21).reshape(2, 21) % 3 == 0
    with torch.no_grad():
        out = model(image(), bool_masked_pos=masked).last_hidden_state
    assert out.shape == (2, 22, 24)
    assert torch.isfinite(out).all()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_gradient_checkpointing_changes_nothing(name):
    """Layers run again in the backward pass, after Swin's grid has changed."""
    model = perturb(localvit.localize(ROW[name].make(hidden_dropout_prob=0.0).double().train()))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        output_of(model, ROW[name].image).square().sum().backward()
        gradients.append([adapter.conv.weight.grad.clone() for adapter in adapters_of(model)])
    assert all(grad.any() for grad in gradients[0])
    for grad, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, grad)


def test_save_pretrained_stores_a_loadable_original(tmp_path):
    """The file of a localized model loads as the model before `localize`."""
    model = ROW["vit"].make().eval()
    original = copy.deepcopy(model)
    localvit.localize(model, inplace=True)
    model.save_pretrained(tmp_path)
    loaded = transformers.ViTModel.from_pretrained(tmp_path).eval()
    assert loaded.state_dict().keys() == original.state_dict().keys()
    with torch.no_grad():
        expected = output_of(original, image().float())
        assert torch.equal(output_of(loaded, image().float()), expected)
        assert torch.equal(output_of(localvit.localize(loaded), image().float()), expected)


def test_unknown_names_of_layers_raise():
    model = ROW["clip"].make()
    for module in model.modules():
        if isinstance(getattr(module, "encoder", None), nn.Module):
            module.stack = module.encoder
            del module.encoder
            break
    with pytest.raises(ValueError, match="version of transformers is too old or too new"):
        localvit.localize(model, inplace=True)


# SigLIP 2: images of several shapes in a batch


def siglip2(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Siglip2VisionConfig(**SMALL, **MLP, patch_size=2, num_patches=25, **changes)
    return randomized(transformers.Siglip2VisionModel(config))


def patches_of_shapes(*shapes: tuple[int, int], padding: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Patches (B, N, 12) of images with these grids, noise in the padding, their mask and shapes."""
    tokens = max(height * width for height, width in shapes) + padding
    generator = torch.Generator().manual_seed(3)
    patches = torch.randn(len(shapes), tokens, 12, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[int(n < height * width) for n in range(tokens)] for height, width in shapes])
    return patches, mask, torch.tensor(shapes)


SHAPES = ((2, 7), (5, 3), (3, 5), (1, 11))


def test_siglip2_keeps_its_function():
    model, inputs = siglip2(), patches_of_shapes(*SHAPES, padding=2)
    assert len(find_sites(model)) == 2  # The pooling head is not a site.
    check_function_is_kept(model, *inputs)
    check_gradients_reach_every_adapter(model, *inputs)
    check_every_adapter_matters(model, *inputs)


def test_siglip2_computes_the_same_for_an_image_in_any_batch():
    model = perturb(localvit.localize(siglip2().double().eval(), Adapter(kernel_size=5)))
    patches, mask, shapes = patches_of_shapes(*SHAPES, padding=2)
    with torch.no_grad():
        together = model(patches, mask, shapes)
        for sample, (height, width) in enumerate(SHAPES):
            some = slice(0, height * width)
            alone = model(patches[sample, None, some], mask[sample, None, some], shapes[sample, None])
            # float64; attention sums over other padding, in another order.
            torch.testing.assert_close(together.last_hidden_state[sample, some], alone.last_hidden_state[0])
            torch.testing.assert_close(together.pooler_output[sample], alone.pooler_output[0])


def test_siglip2_adapter_convolves_each_map():
    """Against a convolution over each image's own map, of a prime size."""
    model = perturb(localvit.localize(siglip2().double().eval()))
    projection = projections_of(model)[0]
    seen = []
    projection.register_forward_hook(lambda projection, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        model(*patches_of_shapes(*SHAPES, padding=2))
    [(hidden_BNE, out_BNC)] = seen
    for hidden_NE, out_NC, grid in zip(hidden_BNE, out_BNC, SHAPES, strict=True):
        tokens = grid[0] * grid[1]
        map_EHW = hidden_NE[:tokens].T.unflatten(1, grid)
        added_EHW = F.conv2d(map_EHW, projection.locality.conv.weight, padding=1, groups=len(map_EHW))
        after_NE = torch.cat([(map_EHW + added_EHW).flatten(1).T, hidden_NE[tokens:]])
        torch.testing.assert_close(out_NC, F.linear(after_NE, projection.weight, projection.bias))


@pytest.mark.filterwarnings("ignore:The tensor attribute .* was assigned during export:UserWarning")
def test_siglip2_exports_for_any_shapes():
    """Traced with some shapes and run with others; the number of tokens stays 17."""
    pytest.importorskip("transformers", minversion="5.9", reason="older versions cannot export SigLIP 2 at all")
    model = perturb(localvit.localize(siglip2().double().eval()))
    program = torch.export.export(model, patches_of_shapes(*SHAPES, padding=2)).module()
    inputs = patches_of_shapes((7, 2), (1, 2), (4, 4), (3, 5), padding=1)
    with torch.no_grad():
        torch.testing.assert_close(output_of(program, *inputs), output_of(model, *inputs))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"gate": "se"}, r"the gate \(SqueezeExcite\) takes means"),
        ({"gate": "eca"}, r"the gate \(EfficientChannelAttention\) takes means"),
        ({"norm": "batchnorm"}, "norm='batchnorm' takes means"),
        ({"method": "replace"}, "grids of different sizes"),
    ],
    ids=["se", "eca", "batchnorm", "paper"],
)
def test_siglip2_refuses_means_over_maps(options, why):
    model = siglip2()
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=why):
        localize_with_options(model, options, inplace=True)
    assert set(model.state_dict()) == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_siglip2_takes_layer_norm():
    """It is zero where there is no token, so an image gets the same in any batch."""
    model = perturb(localvit.localize(siglip2().double().eval(), Adapter(norm="layernorm")))
    patches, mask, shapes = patches_of_shapes((2, 7), (5, 3))
    with torch.no_grad():
        together = model(patches, mask, shapes).last_hidden_state
        alone = model(patches[:1, :14], mask[:1, :14], shapes[:1]).last_hidden_state
    torch.testing.assert_close(together[0, :14], alone[0])


def test_siglip2_text_tower_does_not_change():
    vision = transformers.Siglip2VisionConfig(**SMALL, **MLP, patch_size=2, num_patches=25)
    text = transformers.Siglip2TextConfig(**SMALL, **MLP, vocab_size=31)
    config = transformers.Siglip2Config(text_config=text.to_dict(), vision_config=vision.to_dict())
    model = localvit.localize(transformers.Siglip2Model(config))
    assert len(adapters_of(model)) == len(adapters_of(model.vision_model)) == 2
