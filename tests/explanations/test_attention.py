"""Attention maps: equal to a computation by hand, beside a fused call that stays as it is, on the image's grid."""

import pytest
import timm
import torch
from small import LOCAL, ONE_OF_EACH, image_size, small_model
from timm.layers import Attention
from timm.models import tnt
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from timm.models.swin_transformer_v2 import SwinTransformerV2Block

import localvit
from localvit.explanations import attention_maps, layers_of
from localvit.explanations.attention import weights_of_fused_call


def model_and_images(name: str, dtype=torch.float64):
    torch.manual_seed(0)
    model = small_model(name).eval().to(dtype)
    for parameter in model.parameters():  # initial biases and position embeddings are near zero and would hide errors
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model, torch.randn(2, 3, image_size(name), image_size(name), dtype=dtype)


def hand_weights(module, x, mask=None):
    """softmax(q k^T / sqrt(d) + bias), from the module's own weights."""
    rows, num_tokens, _ = x.shape
    heads = module.num_heads
    if isinstance(module, Attention | WindowAttention):
        query, key, _ = module.qkv(x).chunk(3, dim=-1)
    elif isinstance(module, tnt.Attention):
        query, key = module.qk(x).chunk(2, dim=-1)
    else:  # PVT
        query, reduced = module.q(x), x
        if module.sr is not None:
            side = int(num_tokens**0.5)
            reduced = module.norm(module.sr(x.mT.reshape(rows, -1, side, side)).flatten(2).mT)
        key, _ = module.kv(reduced).chunk(2, dim=-1)
    query, key = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in (query, key))
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if isinstance(module, WindowAttention):
        area = module.window_area
        table = module.relative_position_bias_table[module.relative_position_index.flatten()]
        scores = scores + table.view(area, area, heads).permute(2, 0, 1)
        if mask is not None:
            scores = scores + mask.repeat(rows // len(mask), 1, 1)[:, None]
    return scores.softmax(-1)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_maps_equal_a_computation_by_hand(name, fused):
    model, images = model_and_images(name)
    if fused:
        model = localvit.fuse(model)
    layers = layers_of(model)
    seen = {}
    handles = [
        layer.module.register_forward_pre_hook(
            lambda module, args, kwargs, name=layer.name: seen.__setitem__(name, (args[0], kwargs.get("mask"))),
            with_kwargs=True,
        )
        for layer in layers.attentions
    ]
    maps = attention_maps(model, images)
    for handle in handles:
        handle.remove()
    assert len(maps) == len(layers.attentions) == len(seen) > 0
    for found, layer in zip(maps, layers.attentions, strict=True):
        with torch.no_grad():
            expected = hand_weights(layer.module, *seen[layer.name])
        torch.testing.assert_close(found.weights_BWMQK.flatten(0, 1), expected, atol=1e-6, rtol=0)
        assert torch.allclose(found.weights_BWMQK.sum(-1), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_nothing_is_switched_off_and_nothing_stays_behind(name):
    model, images = model_and_images(name, torch.float32)
    with torch.no_grad():
        before = model(images)
    switches = {key: part.fused_attn for key, part in model.named_modules() if hasattr(part, "fused_attn")}
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]
    calls = []
    fused_call = torch.nn.functional.scaled_dot_product_attention

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(func is fused_call)
            return func(*args, **(kwargs or {}))

    with Count():
        maps = attention_maps(model, images)
    if name not in ("localvit_tnt_t_patch16_224", "localvit_swin_tiny_patch4_window7_224"):  # these compute it in steps
        assert sum(calls) == len(maps)
    assert {key: part.fused_attn for key, part in model.named_modules() if hasattr(part, "fused_attn")} == switches
    assert [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()] == hooks
    with torch.no_grad():
        assert torch.equal(model(images), before)


def test_a_model_that_fails_keeps_no_hooks():
    model, _ = model_and_images(LOCAL[0])
    with pytest.raises(Exception):  # noqa: B017, PT011
        attention_maps(model, torch.randn(1, 3, 17, 13, dtype=torch.float64))
    assert not any("lambda" in repr(hook) for part in model.modules() for hook in part._forward_pre_hooks.values())


def small_swin(version: int):
    """A Swin of either version for 64 x 64 pixels, whose last stage needs padding for its windows at 96 x 160."""
    if version == 1:
        return small_model("localvit_swin_tiny_patch4_window7_224", img_size=64).eval()
    sizes = {"embed_dim": 12, "depths": (2, 2), "num_heads": (2, 3), "window_size": 7, "img_size": 64}
    return timm.create_model("swinv2_tiny_window8_256", num_classes=5, strict_img_size=False, **sizes).eval()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_windows_are_put_back_where_the_block_took_them_from(size, version):
    """Values of a map that only the block's own attention sees come back at the same positions."""
    model = small_swin(version)
    layers = layers_of(model)
    blocks = [part for part in model.modules() if isinstance(part, SwinTransformerBlock | SwinTransformerV2Block)]
    assert any(any(block.shift_size) for block in blocks)
    for layer, block in zip(layers.attentions, blocks, strict=True):
        placement = layer.placement(size)
        height, width = placement.query.size
        index_BHWC = torch.arange(1.0, height * width + 1).view(1, height, width, 1).expand(-1, -1, -1, block.dim)
        seen = []
        handle = block.attn.register_forward_pre_hook(lambda _module, args, seen=seen: seen.append(args[0][..., 0]))
        with torch.no_grad():
            block._attn(index_BHWC)
        handle.remove()
        assert torch.equal(placement.query_index_WQ, seen[0].long() - 1)  # padding is 0 in the block


@pytest.mark.parametrize(("version", "size"), [(1, (64, 64)), (1, (96, 160)), (2, (112, 56))])
def test_maps_on_the_grid_apply_as_the_attention_does(version, size):
    """The dense map times the values is what the attention returns, window by window or not."""
    torch.manual_seed(0)
    model = small_swin(version).double()
    block = model.layers[0].blocks[1]
    assert any(block.shift_size)
    inputs = []
    original = block._attn
    block._attn = lambda x: (inputs.append(x), original(x))[1]
    found = attention_maps(model, torch.randn(2, 3, *size, dtype=torch.float64))[1]
    block._attn = original
    x_BHWC = inputs[0]
    with torch.no_grad():
        expected = block._attn(x_BHWC)
        value = block.attn.qkv(x_BHWC.flatten(1, 2)).chunk(3, dim=-1)[2]
        if version == 2:  # its biases are apart
            value = value + block.attn.v_bias
        value_BMND = value.unflatten(2, (block.attn.num_heads, -1)).transpose(1, 2)
        mixed = found.on_grid() @ value_BMND
        # Padded tokens are values too, of the bias of the projection; the grid has none here.
        assert not (found.placement.key_index_WK < 0).any()
        result = block.attn.proj(mixed.transpose(1, 2).flatten(2)).view_as(expected)
    torch.testing.assert_close(result, expected, atol=1e-10, rtol=0)


def test_the_inner_attention_of_tnt_stays_inside_its_patch():
    model, images = model_and_images("localvit_tnt_t_patch16_224")
    inner, outer = attention_maps(model, images)[:2]
    assert (inner.is_inner, outer.is_inner) == (True, False)
    dense = inner.on_grid()[0, 0]
    height, width = inner.placement.query.size
    rows, columns = torch.meshgrid(torch.arange(height) // 4, torch.arange(width) // 4, indexing="ij")
    patch = (rows * width + columns).flatten()
    assert torch.equal(dense > 0, patch[:, None] == patch[None, :])


TIMM = [
    "vit_small_patch16_rope_224",  # rotary positions
    "vit_small_patch16_dinov3",  # rotary positions, registers
    "beit_base_patch16_224",  # relative position bias
    "vit_relpos_small_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_base_patch16_siglip_224",
    "vit_small_patch16_36x1_224",
]


@pytest.mark.parametrize("name", TIMM)
def test_plain_vits_of_timm_equal_their_own_softmax(name):
    """The same model with its unfused attention computes its softmax itself, with positions, norms and biases."""
    torch.manual_seed(0)
    fewer = {"depth": 2, "num_classes": 5, "img_size": 64}
    model = timm.create_model(name, **fewer).eval().double()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    maps = attention_maps(model, images)
    assert len(maps) == 2
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            assert part.fused_attn
            part.fused_attn = False
    rows = []
    for block in model.blocks:
        block.attn.attn_drop.register_forward_pre_hook(lambda _module, args: rows.append(args[0]))
    with torch.no_grad():
        model(images)
    for found, expected in zip(maps, rows, strict=True):
        torch.testing.assert_close(found.on_grid(), expected, atol=1e-6, rtol=0)


def test_a_fused_call_with_every_argument():
    """`scaled_dot_product_attention` itself, on values that make its weights visible."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 6, 5, 3, dtype=torch.float64), torch.randn(2, 2, 7, 3, dtype=torch.float64)
    value = torch.eye(7, dtype=torch.float64).expand(2, 2, 7, 7)
    allowed = torch.rand(5, 7) > 0.3
    allowed[:, 0] = True
    for options in (
        {"enable_gqa": True},
        {"enable_gqa": True, "scale": 0.3},
        {"enable_gqa": True, "attn_mask": allowed},
        {"enable_gqa": True, "attn_mask": torch.randn(6, 5, 7, dtype=torch.float64)},
        {"enable_gqa": True, "is_causal": True},
    ):
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)
        torch.testing.assert_close(weights_of_fused_call(query, key, value, **options), expected)


HUGGING_FACE = {
    "ViT": "ViTForImageClassification",
    "DeiT": "DeiTForImageClassificationWithTeacher",
    "Dinov2": "Dinov2ForImageClassification",
    "Dinov2WithRegisters": "Dinov2WithRegistersForImageClassification",
    "CLIPVision": "CLIPVisionModel",
}


@pytest.mark.parametrize("family", HUGGING_FACE)
def test_vits_of_transformers_equal_the_attentions_that_they_return(family):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    config = getattr(transformers, f"{family}Config")(**sizes, image_size=32, patch_size=8)
    torch.manual_seed(0)
    model = getattr(transformers, HUGGING_FACE[family])(config).eval()
    localvit.localize(model, localvit.Adapter(), inplace=True)
    images = torch.randn(2, 3, 32, 32)
    maps = attention_maps(model, images)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(images, output_attentions=True).attentions
    assert len(maps) == len(expected) == 3
    for found, attentions in zip(maps, expected, strict=True):
        torch.testing.assert_close(found.on_grid(), attentions, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: timm.create_model("resnet18").eval(), "ResNet has no part that can be explained; supported are"),
        (lambda: small_model(LOCAL[0]).train(), "is in training mode; call model.eval"),
    ],
)
def test_what_has_no_maps_says_so(model, message):
    with pytest.raises(ValueError, match=message):
        attention_maps(model(), torch.randn(1, 3, 64, 64))
