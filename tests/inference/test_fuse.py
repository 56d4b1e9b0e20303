"""Fused models compute the same, for every family and ablation, with any statistics."""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn
from torch._dynamo import lookup_backend
from torch.utils.flop_counter import FlopCounterMode

import localvit
from localvit import ops
from localvit.inference.last_block import BLOCKS
from localvit.locality import ACTS, LocalityFeedForward
from localvit.surgery.localize import locality_modules, localize_with_options
from localvit.tokens.mlp import FusedMlp

CLOSE = {"rtol": 1e-10, "atol": 1e-11}
"""float64: folding rounds each weight once more, and sums of hundreds of terms run in another order."""

NANO = {"img_size": (20, 28), "num_classes": 7, "depth": 3}
PVT = {
    "img_size": (24, 40),
    "num_classes": 7,
    "patch_sizes": (4, 2),
    "embed_dims": (10, 33),
    "depths": (1, 2),
    "num_heads": (2, 3),
    "mlp_ratios": (8.0, 4.0),
    "sr_ratios": (2, 1),
}
TNT = {
    "img_size": (32, 48),
    "num_classes": 7,
    "embed_dim": 33,
    "inner_dim": 10,
    "depth": 2,
    "num_heads_inner": 2,
    "num_heads_outer": 3,
}
T2T = {"img_size": (32, 48), "num_classes": 7, "embed_dim": 34, "num_heads": 2, "depth": 2, "reduction": 17}
SMALL = {
    "localvit_nano_patch4_32": NANO,
    "localvit_tiny": NANO | {"img_size": (32, 48), "embed_dim": 24, "num_heads": 3, "reduction": 8},
    "localvit_swin_tiny": {"img_size": (64, 96), "num_classes": 7, "embed_dim": 24, "depths": (1, 1, 2, 1)},
    "localvit_pvt_tiny": PVT,
    "localvit_tnt_tiny": TNT,
    "localvit_t2t_7": T2T,
    "pvt_tiny": PVT,
    "tnt_tiny": TNT,
    "t2t_vit_7": T2T,
    "tnt_s_patch16_224": TNT | {"qkv_bias": True},
    "deit_tiny_distilled_patch16_224": {"img_size": (32, 48), "num_classes": 7, "depth": 3},
    "vit_tiny_patch16_224": {"img_size": (32, 48), "num_classes": 7, "depth": 2, "qk_norm": True, "init_values": 0.5},
    "vit_small_patch14_reg4_dinov2": {"img_size": (42, 28), "num_classes": 7, "depth": 2},
}


def shaken(model):
    """The model in evaluation mode with all weights and statistics off their initial values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, entry in (*model.named_parameters(), *model.named_buffers()):
            if entry.is_floating_point():
                noise = torch.randn(entry.shape, generator=generator, dtype=torch.float64)
                entry.mul_(1.5 + noise.clamp(-1, 1)) if "running_var" in name else entry.add_(0.1 * noise)
    return model.eval()


def small(name, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    return shaken(localvit.create_model(name, **SMALL[name] | changes).to(dtype))


def images(name, batch=2, dtype=torch.float64):
    size = SMALL[name]["img_size"]
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("form", [{}, {"dp_first": True}, {"wo_dp_conv": True}, {"stride": 2}])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_module(act, form, memory_format):
    torch.manual_seed(0)
    module = shaken(LocalityFeedForward(6, 6, act=act, reduction=2, expand_ratio=3, **form).double())
    map_BCHW = torch.randn(3, 6, 5, 7, dtype=torch.float64).to(memory_format=memory_format)
    untouched = map_BCHW.clone()
    fused = module.fuse()
    torch.testing.assert_close(fused(map_BCHW), module(map_BCHW), **CLOSE)
    assert torch.equal(map_BCHW, untouched)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in fused.modules())
    module.conv[1].running_mean += 1.0  # The negative control: another module computes something else.
    assert not torch.allclose(fused(map_BCHW), module(map_BCHW))


@pytest.mark.parametrize("name", [name for name in SMALL if name.startswith("localvit")])
@pytest.mark.parametrize(
    "changes", [{}, {"depthwise": False}, {"depthwise_first": True}, {"act": "hs+eca"}, {"act": "hs"}], ids=str
)
def test_model_by_the_operators(name, changes):
    """They run the reference here: for a map or for tokens, with and without prefix tokens."""
    pytest.importorskip("triton", reason="Triton is not installed")
    model = small(name, **changes)
    with torch.no_grad(), ops.use_backend("triton"):
        torch.testing.assert_close(localvit.fuse(model)(images(name)), model(images(name)), **CLOSE)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("form", [{}, {"dp_first": True}, {"wo_dp_conv": True}, {"stride": 2}])
@pytest.mark.parametrize("way", ["with gradients", "without", "oneDNN off", "in parts", "kernels in use", "autocast"])
def test_module_in_float32_on_every_path(act, form, way, monkeypatch):
    """1e-5: sums of a hundred products in float32; under autocast 2^-8, the rounding of bfloat16, over six layers."""
    torch.manual_seed(0)
    module = shaken(LocalityFeedForward(6, 6, act=act, reduction=2, expand_ratio=3, **form))
    fused, map_BCHW = module.fuse(), torch.randn(5, 6, 11, 7)
    if way == "in parts":
        monkeypatch.setattr("localvit.ops.folded.PART_BYTES", 2 * 11 * 7 * 18 * 4)
    monkeypatch.setattr("localvit.ops.dispatch._backend", "triton" if way == "kernels in use" else "torch")
    with (
        torch.set_grad_enabled(way == "with gradients"),
        torch.backends.mkldnn.flags(enabled=way != "oneDNN off"),
        torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"),
    ):
        out = fused(map_BCHW)
    expected = module.double()(map_BCHW.double())
    tolerance = 6 * 2**-8 if way == "autocast" else 1e-5
    assert out.dtype == (torch.bfloat16 if way == "autocast" and form.get("stride") else torch.float32)
    assert (out - expected).abs().max() <= tolerance * expected.abs().max()


def test_gradients_with_respect_to_images():
    """As saliency maps need them: operators without a gradient are not used."""
    torch.manual_seed(0)
    module = shaken(LocalityFeedForward(6, 6, reduction=2))
    image = torch.randn(2, 6, 5, 7, requires_grad=True)
    (grad,) = torch.autograd.grad(module.fuse()(image).square().sum(), image)
    (expected,) = torch.autograd.grad(module(image).square().sum(), image)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_parts", [False, True])
@torch.no_grad()
def test_forward_mode_derivatives(in_parts, monkeypatch):
    """oneDNN's fused convolution would leave out the tangent without an error."""
    torch.manual_seed(0)
    module = shaken(LocalityFeedForward(6, 6, reduction=2))
    map_BCHW, tangent_BCHW = torch.randn(2, 2, 6, 5, 7)
    _, expected = torch.func.jvp(module, (map_BCHW,), (tangent_BCHW,))
    if in_parts:
        monkeypatch.setattr("localvit.ops.folded.PART_BYTES", 2)
    _, derivative = torch.func.jvp(module.fuse(), (map_BCHW,), (tangent_BCHW,))
    torch.testing.assert_close(derivative, expected, rtol=1e-4, atol=1e-4)


def test_empty_batch():
    fused = shaken(LocalityFeedForward(6, 6)).fuse()
    with torch.no_grad():
        assert fused(torch.empty(0, 6, 5, 7)).shape == (0, 6, 5, 7)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_model(name, dtype, tolerance):
    model = small(name, dtype)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected, features = model(images(name, dtype=dtype)), model.forward_features(images(name, dtype=dtype))
        fused = localvit.fuse(model)
        for batch in (2, 1):
            out = fused(images(name, dtype=dtype)[:batch])
            assert (out - expected[:batch]).abs().max() <= tolerance * expected.abs().max()
        again = fused.forward_features(images(name, dtype=dtype))
    assert again.shape == features.shape
    assert (again - features).abs().max() <= tolerance * features.abs().max()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {parameter.dtype for parameter in fused.parameters()} == {dtype}


@pytest.mark.parametrize(
    "name",
    ["localvit_tiny", "deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2", "pvt_tiny", "tnt_tiny"],
)
@pytest.mark.parametrize("options", [{"gate": "se"}, {"method": "replace", "act": "hs+eca"}])
def test_localized_model(name, options):
    model = shaken(localize_with_options(small(name, **({"local_blocks": []} if "localvit" in name else {})), options))
    with torch.no_grad():
        expected = model(images(name))
        fused = localvit.fuse(model)
        torch.testing.assert_close(fused(images(name)), expected, **CLOSE)
        assert torch.equal(fused.forward_features(images(name)).isfinite().all(), torch.tensor(True))


def test_adapters_of_projections_that_timm_folds_are_kept():
    torch.manual_seed(0)
    levit = timm.create_model("levit_128s", img_size=64, embed_dim=(32, 48, 64), num_heads=(2, 3, 4), depth=(1, 1, 1))
    model = shaken(localvit.localize(levit.double()))
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    fused = localvit.fuse(model)
    assert len(locality_modules(fused)) == len(locality_modules(model)) > 0
    with torch.no_grad():
        # timm folds its batch norms into float32 weights.
        torch.testing.assert_close(fused(image), model(image), rtol=1e-5, atol=1e-5)


def test_narrow_heads_use_fused_attention_on_the_cpu_only():
    """TNT's heads over pixels have width 5 here, those over patches 11; a meta model stands for other devices."""
    block = localvit.fuse(small("tnt_tiny")).blocks[0]
    assert block.attn_in.fused_attn
    assert block.attn_out.fused_attn
    block.to("meta")
    assert not block.attn_in.fused_attn
    assert block.attn_out.fused_attn


def multiply_adds(model, name):
    """Multiply-adds of one image by torch's counter, which does not count fused attention on the CPU."""
    model = copy.deepcopy(model).requires_grad_(False)
    with FlopCounterMode(display=False) as counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        model(images(name, batch=1))
    return counter.get_total_flops() // 2


def dead_work(dim, hidden, patches, prefix=1, bottleneck=None):
    """Multiply-adds of the last block that no prefix token depends on: those of the patches, and of locality.

    Without locality (`bottleneck` is None) the feed-forward has two linear layers.
    """
    feed_forward = patches * 2 * dim * hidden
    if bottleneck is not None:
        feed_forward += patches * 9 * hidden + 2 * hidden * bottleneck
    return feed_forward + patches * 2 * dim * dim + 2 * patches * (patches + prefix) * dim


@pytest.mark.parametrize(
    ("name", "changes", "gone"),
    [
        ("localvit_tiny", {}, dead_work(24, 4 * 24, patches=2 * 3, bottleneck=4 * 24 // 8)),
        ("localvit_pvt_tiny", {}, dead_work(33, 4 * 33, patches=3 * 5, bottleneck=4)),
        ("localvit_tnt_tiny", {}, dead_work(33, 4 * 33, patches=2 * 3, bottleneck=4)),
        ("localvit_t2t_7", {}, dead_work(34, 2 * 34, patches=2 * 3, bottleneck=2 * 34 // 17)),
        ("pvt_tiny", {}, dead_work(33, 4 * 33, patches=3 * 5)),
        ("tnt_tiny", {}, dead_work(33, 4 * 33, patches=2 * 3)),
        ("t2t_vit_7", {}, dead_work(34, 2 * 34, patches=2 * 3)),
        ("tnt_s_patch16_224", {}, dead_work(33, 4 * 33, patches=2 * 3)),
        ("deit_tiny_distilled_patch16_224", {}, dead_work(192, 4 * 192, patches=2 * 3, prefix=2)),
        # The head averages all tokens.
        ("localvit_swin_tiny", {}, 0),
        ("localvit_tiny", {"global_pool": "avg"}, 0),
        ("localvit_pvt_tiny", {"global_pool": "avg"}, 0),
        ("tnt_tiny", {"global_pool": "avg"}, 0),
    ],
)
def test_the_last_block_skips_what_the_logits_do_not_depend_on(name, changes, gone):
    model = small(name, **changes)
    fused = localvit.fuse(model)
    assert multiply_adds(model, name) - multiply_adds(fused, name) == gone
    assert any("forward" in vars(module) for module in fused.modules() if type(module) in BLOCKS) == (gone > 0)
    with torch.no_grad():
        torch.testing.assert_close(fused(images(name)), model(images(name)), **CLOSE)


@pytest.mark.parametrize("name", ["localvit_tiny", "localvit_pvt_tiny", "localvit_tnt_tiny", "t2t_vit_7"])
def test_features_still_have_every_token_between_calls_for_logits(name):
    model = small(name)
    fused = localvit.fuse(model)
    height, width = SMALL[name]["img_size"]
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fused(images(name)), model(images(name)), **CLOSE)
            with pytest.raises((ValueError, AssertionError), match=r"divisible|multiple"):  # timm's and ours
                fused(torch.zeros(1, 3, height - 1, width, dtype=torch.float64))
            for mine, theirs in zip(
                (fused.forward_features(images(name)), *fused.forward_intermediates(images(name))[1]),
                (model.forward_features(images(name)), *model.forward_intermediates(images(name))[1]),
                strict=True,
            ):
                torch.testing.assert_close(mine, theirs, **CLOSE)


def block_before_last(fused):
    return [module for module in fused.modules() if type(module) in BLOCKS][-2]


SHORTENED = ["localvit_tiny", "localvit_pvt_tiny", "localvit_tnt_tiny"]


@pytest.mark.parametrize("name", SHORTENED)
def test_threads_get_logits_and_features_of_one_fused_model(name):
    fused = localvit.fuse(small(name))
    with torch.no_grad():
        expected = {call: call(images(name)) for call in (fused, fused.forward_features)}

        def run(call):
            with torch.no_grad():
                return [torch.equal(call(images(name)), expected[call]) for _ in range(40)]

        with ThreadPoolExecutor(2) as executor:
            assert list(executor.map(run, expected)) == [[True] * 40] * 2


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("name", SHORTENED)
def test_features_have_every_token_after_a_call_that_raised(name, error):
    fused = localvit.fuse(small(name))
    with torch.no_grad():
        expected = fused.forward_features(images(name))

        def fail(module, args):
            raise error("stop")

        handle = block_before_last(fused).register_forward_pre_hook(fail)
        with pytest.raises(error, match="stop"):
            fused(images(name))
        handle.remove()
        assert torch.equal(fused.forward_features(images(name)), expected)


@pytest.mark.parametrize("name", SHORTENED)
def test_a_hook_runs_a_fused_model(name):
    """A call within a call, before the last block of the outer one."""
    fused = localvit.fuse(small(name))
    with torch.no_grad():
        logits, features = fused(images(name)), fused.forward_features(images(name))
        twin = fused(images(name).flip(0))
        seen = []

        def run_nested(module, args):
            if not seen:
                seen.append(None)
                seen[0] = fused(images(name).flip(0))

        block_before_last(fused).register_forward_pre_hook(run_nested)
        assert torch.equal(fused(images(name)), logits)
        assert torch.equal(seen[0], twin)
        assert torch.equal(fused.forward_features(images(name)), features)


def test_fused_in_place():
    model = small("localvit_tiny")
    with torch.no_grad():
        expected = localvit.fuse(model)(images("localvit_tiny"))
        assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        assert localvit.fuse(model, inplace=True) is model
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        assert torch.equal(model(images("localvit_tiny")), expected)


@pytest.mark.parametrize("name", ["localvit_tiny", "localvit_pvt_tiny", "localvit_tnt_tiny"])
def test_a_head_changed_to_read_every_token_gets_every_token(name):
    model = small(name)
    fused = localvit.fuse(model)
    for each in (model, fused):
        torch.manual_seed(0)
        each.reset_classifier(11, "avg")
        each.double().eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(images(name)), model(images(name)), **CLOSE)


class Doubled(nn.Linear):
    """A projection that does more than multiply by its weight."""

    def forward(self, x_BNC):
        return 2 * super().forward(x_BNC)


class Mixing(nn.Linear):
    """A feed-forward that mixes tokens."""

    def forward(self, x_BNC):
        return super().forward(x_BNC + x_BNC.mean(1, keepdim=True))


def attention_hooked(model):
    model.blocks[-1].attn.proj.register_forward_hook(lambda module, args, out: out + args[0].mean(1, keepdim=True))


def inner_attention_hooked(model):
    model.blocks[0].attn_in.v.register_forward_hook(lambda module, args, out: 2 * out)


def attention_wrapped(model):
    projection = model.blocks[-1].attn.qkv
    projection.forward = lambda x: 2 * type(projection).forward(projection, x)


def attention_replaced(model):
    model.blocks[-1].attn.qkv = shaken(Doubled(192, 3 * 192).double())


def attention_localized(model):
    names = ["blocks.1.attn.qkv"]
    localvit.localize(model, filter_fn=names, grid="patch_embed.proj", num_prefix_tokens=1, inplace=True)
    shaken(model)


def class_token_localized(model):
    shaken(localvit.localize(model, filter_fn=["blocks.1.mlp.fc2"], grid=(1, 7), inplace=True))


def feed_forward_replaced(model):
    model.blocks[-1].mlp = shaken(Mixing(192, 192).double())


def head_replaced(model):
    class Averages(type(model)):
        def forward_head(self, x, pre_logits=False):
            return super().forward_head(x.mean(1, keepdim=True), pre_logits)

    model.__class__ = Averages


def stages_pruned(model):
    model.prune_intermediate_layers([0], prune_head=False)
    model.eval()  # the new list of stages


@pytest.mark.parametrize(
    ("name", "changes", "change"),
    [
        ("vit_tiny_patch16_224", {"qk_norm": False}, attention_hooked),
        ("vit_tiny_patch16_224", {"qk_norm": False}, attention_wrapped),
        ("vit_tiny_patch16_224", {"qk_norm": False}, attention_replaced),
        ("vit_tiny_patch16_224", {"qk_norm": False}, attention_localized),
        ("vit_tiny_patch16_224", {"qk_norm": False}, class_token_localized),
        ("vit_tiny_patch16_224", {"qk_norm": False}, feed_forward_replaced),
        ("vit_tiny_patch16_224", {"qk_norm": False}, head_replaced),
        ("tnt_tiny", {}, inner_attention_hooked),
        ("pvt_tiny", {"embed_dims": (33, 33), "num_heads": (3, 3)}, stages_pruned),
    ],
)
def test_changed_models_keep_their_last_block(name, changes, change):
    model = small(name, **changes)
    with torch.no_grad():
        before = model(images(name))
        change(model)
        expected = model(images(name))
        assert not torch.allclose(expected, before)
        torch.testing.assert_close(localvit.fuse(model)(images(name)), expected, **CLOSE)


def test_masked_attention_uses_the_whole_block():
    name = "deit_tiny_distilled_patch16_224"
    model = small(name)
    mask = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) > 0
    mask.fill_diagonal_(True)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(images(name), attn_mask=mask))
        assert not torch.allclose(expected, model(images(name)))
        fused = localvit.fuse(model)
        out = fused(images(name), attn_mask=mask)
        torch.testing.assert_close(out, expected, **CLOSE)


def attention_shapes(graph):
    """Shapes of the queries of each scaled_dot_product_attention in a graph of torch.compile or torch.export."""
    nodes = [node for node in graph.nodes if "scaled_dot_product_attention" in str(node.target)]
    metas = [node.args[0].meta for node in nodes]
    return [tuple((meta["val"] if "val" in meta else meta["example_value"]).shape) for meta in metas]


COMPILED = {
    "localvit_tiny": ({"depth": 1}, 1, (2, 3, 1, 8), (2, 3, 7, 8)),
    "localvit_pvt_tiny": ({"depths": (1, 1)}, 2, (2, 3, 1, 11), (2, 3, 16, 11)),
    "localvit_tnt_tiny": ({"depth": 1}, 2, (2, 3, 1, 11), (2, 3, 7, 11)),
    "localvit_t2t_7": ({"depth": 1}, 1, (2, 2, 1, 17), None),
    # Its head reads every token, in windows of 49; 3 x 4 of them cover 16 x 24 tokens.
    "localvit_swin_tiny": ({"depths": (2,), "num_heads": (3,)}, 2, (2 * 3 * 4, 3, 49, 8), None),
}
"""Changes that make a small model smaller, its number of attentions, and the shape (batch, heads, tokens, channels) of
the queries of the last one, for logits and for features (None to skip these)."""


@pytest.mark.parametrize("name", COMPILED)
def test_copied_and_compiled(name):
    changes, attentions, for_logits, for_features = COMPILED[name]
    fused = localvit.fuse(small(name, **changes))
    graphs = []

    def check(call, expected, shape, backend):
        def keep_graph(module, inputs):
            graphs.append(module.graph)
            return lookup_backend(backend)(module, inputs)

        compiled = torch.compile(call, fullgraph=True, backend=keep_graph, dynamic=False)
        torch.testing.assert_close(compiled(images(name)), expected, **CLOSE)
        shapes = attention_shapes(graphs[-1])
        assert (len(shapes), shapes[-1]) == (attentions, shape)

    torch._dynamo.reset()
    with torch.no_grad():
        logits, features = fused(images(name)), fused.forward_features(images(name))
        torch.testing.assert_close(copy.deepcopy(fused)(images(name)), logits, rtol=0, atol=0)
        check(fused, logits, for_logits, "aot_eager")
        if for_features is not None:
            # torch.compile does not check hooks when it looks for code compiled before.
            check(fused.forward_features, features, for_features, "eager")
            torch._dynamo.reset()
            check(fused.forward_features, features, for_features, "eager")
            check(fused, logits, for_logits, "eager")


@pytest.mark.parametrize("name", COMPILED)
def test_exported_with_a_dynamic_batch(name):
    changes, attentions, for_logits, _ = COMPILED[name]
    fused = localvit.fuse(small(name, **changes))
    batch = torch.export.Dim("batch")
    program = torch.export.export(fused, (images(name),), strict=False, dynamic_shapes=({0: batch},))
    shapes = attention_shapes(program.graph)
    assert (len(shapes), shapes[-1][1:]) == (attentions, for_logits[1:])
    assert not any("softmax" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        for size in (2, 5):
            out = program.module()(images(name, batch=size))
            # timm resamples the positions of grids that are not square in float32; compiled, in another order.
            torch.testing.assert_close(out, fused(images(name, batch=size)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", COMPILED)
def test_traced_by_jit(name):
    fused = localvit.fuse(small(name, torch.float32, **COMPILED[name][0]))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Tracing warns of every size that it takes as a constant.
        traced = torch.jit.trace(fused, images(name, dtype=torch.float32))
        # float32: a traced model runs torch's own convolutions, which sum in another order.
        expected = fused(images(name, dtype=torch.float32))
        torch.testing.assert_close(traced(images(name, dtype=torch.float32)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "once"), [("localvit_pvt_tiny", [10, 10, 2, 2]), ("localvit_tnt_tiny", [12, 16, 10])])
def test_nothing_is_copied_into_another_layout(name, once):
    """PVT's weights of the spatial reduction are not copied, and TNT's pixels only where they are created."""
    fused = localvit.fuse(small(name))
    with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profile:
        fused(images(name))
    clones = [event.input_shapes[0] for event in profile.events() if event.name == "aten::clone"]
    assert len(clones) > 0
    assert clones.count(once) <= (name == "localvit_tnt_tiny")


def test_reparameterize_model_finds_the_modules():
    model = small("localvit_nano_patch4_32")
    folded = reparameterize_model(model)
    assert sum(isinstance(module, FusedMlp) for module in folded.modules()) == 3
    with torch.no_grad():
        name = "localvit_nano_patch4_32"
        torch.testing.assert_close(folded(images(name)), model(images(name)), **CLOSE)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_lower_precision(dtype, tolerance):
    # 2^-9 and 2^-11 over some ten roundings in each of three blocks.
    name = "localvit_tiny"
    model = small(name)
    with torch.no_grad():
        expected = model(images(name))
        out = localvit.fuse(copy.deepcopy(model).to(dtype))(images(name, dtype=dtype))
    assert out.dtype == dtype
    assert (out.double() - expected).norm() <= tolerance * expected.norm()


def test_training_mode_is_refused():
    model = small("localvit_nano_patch4_32")
    with pytest.raises(ValueError, match=r"LocalViT is in training mode.*call model.eval\(\) before fuse"):
        localvit.fuse(model.train())
    with pytest.raises(ValueError, match=r"call eval\(\) before fuse\(\)"):
        model.blocks[0].mlp.fuse()


def test_a_fused_model_compiles_for_the_cpu():
    """Inductor checks the memory layout of every operator's result against the one that it was compiled for."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = localvit.create_model("localvit_nano_patch4_32", depth=1).eval()
    images = torch.randn(1, 3, 32, 32)  # with one image, strides are ambiguous
    with torch.inference_mode():
        out = torch.compile(localvit.fuse(model), dynamic=False)(images)
    torch.testing.assert_close(out, model(images), rtol=1e-4, atol=1e-5)  # float32 sums of a hundred products
