"""The arguments of the paper's ablations, for every family."""

import pytest
import timm
import torch
from small import ONE_OF_EACH, family, image_size, small_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from localvit.models.t2t import random_feature_attention
from localvit.models.tnt import LocalTNT
from localvit.surgery.blocks import select_blocks
from localvit.tokens.mlp import LocalityMlp

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
"""float64: only rounding in another order of summation."""


def images(name, batch=2, seed=5):
    side = image_size(name)
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blocks_of(model):
    """The blocks of the outer transformer in order, for any family."""
    stages = getattr(model, "layers", None) or getattr(model, "stages", None)
    return [block for stage in stages for block in stage.blocks] if stages else list(model.blocks)


@pytest.mark.parametrize(
    ("local_blocks", "depth", "expected"),
    [
        (None, 3, {0, 1, 2}),
        ("1-4", 12, {0, 1, 2, 3}),
        ("1-8", 12, set(range(8))),
        ("5-8", 12, {4, 5, 6, 7}),
        ("9-12", 12, {8, 9, 10, 11}),
        ("1-2, 5,7", 7, {0, 1, 4, 6}),
        ("3", 3, {2}),
        ([1, 3], 3, {0, 2}),
        (range(1, 3), 3, {0, 1}),
        ("", 3, set()),
        ((), 3, set()),
    ],
)
def test_blocks_are_counted_from_one(local_blocks, depth, expected):
    assert select_blocks(local_blocks, depth) == expected


@pytest.mark.parametrize(
    ("local_blocks", "message"),
    [
        ("0-4", r"blocks 1 to 12, not \[0\]"),
        ("9-13", r"blocks 1 to 12, not \[13\]"),
        ([13, 14], r"not \[13, 14\]"),
        ([-1], r"not \[-1\]"),
        ("4-1", "4-1 runs backwards"),
        ("one", "'one' is neither"),
        ("1:4", "'1:4' is neither"),
        ("1--4", "'1--4' is neither"),
    ],
)
def test_invalid_blocks_raise(local_blocks, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        timm.create_model("localvit_tiny", local_blocks=local_blocks)


@pytest.mark.parametrize(
    ("local_blocks", "first", "last"), [("1-4", 1, 4), ("1-8", 1, 8), ("5-8", 5, 8), ("9-12", 9, 12)]
)
@pytest.mark.parametrize("name", ["localvit_tiny", "localvit_tnt_tiny"])
def test_blocks_of_table_5_are_local(name, local_blocks, first, last):
    model = timm.create_model(name, local_blocks=local_blocks, device="meta")
    local = [number for number, block in enumerate(model.blocks, start=1) if isinstance(block.mlp, LocalityMlp)]
    assert local == list(range(first, last + 1))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_other_blocks_keep_the_plain_feed_forward(name):
    model = small_model(name, local_blocks=[2], drop_path_rate=0.3).train()
    first, second, *rest = blocks_of(model)
    assert isinstance(second.mlp, LocalityMlp)
    for block in (first, *rest):
        assert isinstance(block.mlp.fc1, nn.Linear)
    norm = "norm_mlp" if family(name) is LocalTNT else "norm2"
    assert isinstance(getattr(first, norm), nn.LayerNorm)
    assert isinstance(getattr(second, norm), nn.Identity)
    assert torch.isfinite(model(images(name).float())).all()


def timm_model(name):
    """timm's own model: what a model without any locality must equal."""
    common = {"num_classes": 7, "mlp_ratio": 4.0}
    if name == "localvit_nano_patch4_32":
        return VisionTransformer(16, 4, embed_dim=48, depth=2, num_heads=4, **common)
    return SwinTransformer(64, embed_dim=24, depths=(2, 1, 1, 1), num_heads=(1, 2, 3, 4), window_size=4, **common)


@pytest.mark.parametrize("name", ["localvit_nano_patch4_32", "localvit_swin_tiny"])
def test_without_locality_the_model_equals_timms(name):
    ours, theirs = small_model(name, local_blocks=[], drop_path_rate=0.1).double(), timm_model(name).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with torch.inference_mode():
        torch.testing.assert_close(ours.eval()(images(name)), theirs.eval()(images(name)), **CLOSE)


@pytest.mark.parametrize(
    ("local", "baseline"),
    [("localvit_tnt_tiny", "tnt_tiny"), ("localvit_pvt_tiny", "pvt_tiny"), ("localvit_t2t_7", "t2t_vit_7")],
)
def test_without_locality_the_model_equals_the_baseline(local, baseline):
    ours, theirs = small_model(local, local_blocks="").double(), small_model(baseline).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with torch.inference_mode():
        torch.testing.assert_close(ours.eval()(images(local)), theirs.eval()(images(local)), rtol=0, atol=0)


@pytest.mark.parametrize("act", [1, 2, 3, 4, 5, "relu6", "hs", "hs+se", "hs+eca", "hs+ecah"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_family_runs_with_every_activation(name, act):
    model = small_model(name, act=act)
    slot = blocks_of(model)[0].mlp
    kinds = {type(module).__name__ for module in slot.modules()}
    assert ("ReLU6" in kinds) == (act in (1, "relu6"))
    assert ("SqueezeExcite" in kinds) == (act in (3, "hs+se"))
    assert ("EfficientChannelAttention" in kinds) == (act in (4, 5, "hs+eca", "hs+ecah"))
    assert torch.isfinite(model(images(name).float())).all()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_expand_ratio_reduction_and_depthwise_change_the_module(name):
    width = blocks_of(small_model(name, local_blocks=[]))[0].mlp.fc1.in_features
    conv = blocks_of(small_model(name, expand_ratio=3.0, reduction=2))[0].mlp.conv
    assert [tuple(conv[i].weight.shape) for i in (0, 3)] == [(3 * width, width, 1, 1), (3 * width, 1, 3, 3)]
    assert conv[6].fc[0].weight.shape == (3 * width // 2, 3 * width)

    def depthwise(**kwargs):
        return [
            m
            for m in small_model(name, **kwargs).modules()
            if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1
        ]

    assert not depthwise(depthwise=False)
    early = blocks_of(small_model(name, depthwise_first=True))[0].mlp.conv
    assert early[0].weight.shape == (width, 1, 3, 3)


DEFAULT_REDUCTION = {  # the paper's hidden width and bottleneck, at the published sizes
    "localvit_pvt_tiny": (64 * 8, 8),  # reduction = width 64
    "localvit_tnt_tiny": (192 * 4, 4),
    "localvit_swin_tiny": (96 * 4, 96 * 4 // 24),
    "localvit_t2t_7": (256 * 2, 4),
    "localvit_tiny": (192 * 4, 4),
    "localvit_tiny_se4": (192 * 4, 192),
    "localvit_small": (384 * 4, 4),
}


@pytest.mark.parametrize(("name", "widths"), DEFAULT_REDUCTION.items())
def test_default_bottlenecks_are_the_papers(name, widths):
    model = timm.create_model(name, device="meta")
    gate = blocks_of(model)[0].mlp.conv[6].fc
    assert (gate[0].in_features, gate[0].out_features) == widths


BAD = [
    ({"act": "gelu"}, "act='gelu'"),
    ({"act": 0}, "act=0"),
    ({"act": 6}, "act=6"),
    ({"reduction": 0}, "reduction=0"),
    ({"reduction": 100_000}, "reduction=100000"),
    ({"expand_ratio": 0.0}, "expand_ratio=0.0"),
    ({"depthwise": False, "depthwise_first": True}, "needs the depth-wise convolution"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_invalid_arguments_raise(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        small_model(name, **arguments)


def test_unknown_pooling_raises():
    with pytest.raises(ValueError, match="global_pool='most'"):
        small_model("localvit_pvt_tiny", global_pool="most")
    with pytest.raises(ValueError, match="global_pool='most'"):
        small_model("localvit_pvt_tiny").reset_classifier(3, "most")


def test_t2t_accepts_only_patches_of_16_pixels():
    with pytest.raises(ValueError, match="patch_size=8"):
        small_model("localvit_t2t_7", patch_size=8)


def test_t2t_tokenizer_is_local_if_any_block_is():
    for local_blocks, local in ((None, True), ("2", True), ([], False)):
        model = small_model("localvit_t2t_7", local_blocks=local_blocks)
        stages = (model.patch_embed.attention1, model.patch_embed.attention2)
        assert [isinstance(stage.mlp, LocalityMlp) for stage in stages] == [local, local]


def test_t2t_positions_are_sinusoids_and_its_random_features_orthogonal():
    model = timm.create_model("t2t_vit_7", dtype=torch.float64)
    n, d = 197, 256
    for position, channel in ((0, 0), (0, 1), (1, 0), (13, 7), (196, 254), (196, 255)):
        angle = torch.tensor(position / 10000 ** (2 * (channel // 2) / d), dtype=torch.float64)
        expected = angle.cos() if channel % 2 else angle.sin()
        assert model.pos_embed[0, position, channel].item() == pytest.approx(expected.item(), abs=1e-12)
    assert model.pos_embed.shape == (1, n, d)
    features = model.patch_embed.attention1.w
    # Initialized in single precision: 1e-6 of the squared length, which is their number, 32.
    torch.testing.assert_close(features @ features.T, 32 * torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-4)
    assert not features.requires_grad
    assert not model.pos_embed.requires_grad


def test_random_feature_attention_approximates_softmax_attention():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (0.5 * torch.randn(2, 5, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    features = torch.randn(200_000, 3, generator=generator, dtype=torch.float64)
    exact = torch.softmax(query @ key.mT, dim=-1) @ value
    # The error falls with 1 / sqrt of the 200,000 features, about 0.002; four times that.
    torch.testing.assert_close(random_feature_attention(query, key, value, features), exact, rtol=0, atol=0.01)


def test_locality_does_not_change_the_distillation_token():
    torch.manual_seed(0)
    model = small_model("localvit_nano_patch4_32", distilled=True).double().train()
    assert model.num_prefix_tokens == 2
    assert model.pos_embed.shape[1] == 2 + 16
    slot = model.blocks[0].mlp
    assert slot.layout.num_prefix_tokens == 2
    image = images("localvit_nano_patch4_32")
    model.set_distilled_training(True)
    logits, distilled = model(image)
    assert logits.shape == distilled.shape == (2, 7)
    assert not torch.allclose(logits, distilled)
    outputs = []
    slot.register_forward_hook(lambda module, args, output: outputs.append(output))
    model.eval()
    mean = model(image)
    assert mean.shape == (2, 7)
    assert not outputs[0][:, :2].any()
    assert outputs[0][:, 2:].any()

    plain = small_model("localvit_nano_patch4_32", distilled=True, local_blocks=[]).double().eval()
    theirs = VisionTransformerDistilled(16, 4, embed_dim=48, depth=2, num_heads=4, num_classes=7).double().eval()
    theirs.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(plain(image), theirs(image), **CLOSE)
