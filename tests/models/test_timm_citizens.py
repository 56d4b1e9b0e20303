"""What timm expects of a model, for every registered model of this package (after timm's tests/test_models.py)."""

import copy
import pickle

import pytest
import timm
import torch
from small import ABSOLUTE, ALIASES, BASELINES, LOCAL, MODELS, ONE_OF_EACH, family, image_size, small_model
from timm.models import FeatureGraphNet, group_parameters
from timm.optim import param_groups_weight_decay
from torch import nn

from localvit.locality import SqueezeExcite
from localvit.models.published_names import published_key
from localvit.models.pvt import LocalPVT
from localvit.models.swin import LocalSwin
from localvit.models.t2t import LocalT2T
from localvit.models.tnt import LocalTNT
from localvit.models.vit import LocalViT
from localvit.tokens.mlp import LocalityMlp

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
"""float64 through a few layers with values of order one: only rounding in another order of summation."""


def images(name, batch=2, in_chans=3, scale=(1, 1), dtype=torch.float32, seed=5):
    height, width = (side * image_size(name) for side in scale)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, in_chans, height, width, generator=generator, dtype=torch.float64).to(dtype)


def double(name, **kwargs):
    torch.manual_seed(11)
    return small_model(name, **kwargs).double()


def randomized(model):
    """The model with random norms, biases and positions: by initialization they are zero or equal."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "pos" in name or "token" in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def is_unused(model, name):
    """Whether the logits do not depend on the parameter.

    A head that pools by token reads only the class token, and locality in the last block changes only the image
    tokens. T2T's second norm exists only for published state dicts.
    """
    published = published_key(model, name)
    if published.startswith("tokens_to_token"):
        return ".norm2." in published and any(".conv." in published_key(model, key) for key in model.state_dict())
    slots = [key for key, module in model.named_modules() if isinstance(module, LocalityMlp)]
    return model.global_pool == "token" and bool(slots) and name.startswith(f"{slots[-1]}.")


@pytest.mark.parametrize(("alias", "published"), ALIASES.items())
def test_an_alias_makes_the_same_model(alias, published):
    models = []
    for name in (alias, published):
        torch.manual_seed(2)
        models.append(small_model(name))
    first, second = (model.state_dict() for model in models)
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert models[0].pretrained_cfg["url"] == models[1].pretrained_cfg["url"]
    with torch.device("meta"):
        full = [timm.create_model(name) for name in (alias, published)]
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in full]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", MODELS)
def test_every_used_parameter_gets_a_gradient(name):
    model = small_model(name, drop_path_rate=0.0).train()
    for module in model.modules():
        if isinstance(module, SqueezeExcite):  # every ReLU of a narrow bottleneck may be off at the start
            nn.init.ones_(module.fc[0].bias)
    logits = model(images(name))
    assert logits.shape == (2, 7)
    assert torch.isfinite(logits).all()
    logits.square().mean().backward()
    without = {key for key, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    unused = {key for key, p in model.named_parameters() if p.requires_grad and is_unused(model, key)}
    assert without == unused


@pytest.mark.parametrize("name", MODELS)
def test_reset_classifier(name):
    model = small_model(name).eval()
    image = images(name)
    model.reset_classifier(11)
    assert model(image).shape == (2, 11)
    model.reset_classifier(0)
    assert model(image).shape == (2, model.num_features)
    features = model.forward_features(image)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), model(image))
    model.reset_classifier(5, global_pool="avg")
    assert model(image).shape == (2, 5)
    assert model.get_classifier().weight.dtype == torch.float32
    assert small_model(name, num_classes=0)(image).shape == (2, model.num_features)


@pytest.mark.parametrize("name", MODELS)
def test_forward_intermediates_end_in_forward_features(name):
    model = randomized(double(name)).eval()
    image = images(name, dtype=torch.float64, scale=(1, 2))
    depth = len(model.feature_info)
    final, maps = model.forward_intermediates(image)
    torch.testing.assert_close(final, model.forward_features(image), **CLOSE)
    torch.testing.assert_close(model.forward_head(final), model(image), **CLOSE)
    assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
    for info, feature in zip(model.feature_info, maps, strict=True):
        assert feature.shape[2:] == (image.shape[2] // info["reduction"], image.shape[3] // info["reduction"])

    [last] = model.forward_intermediates(image, indices=[depth - 1], norm=True, intermediates_only=True)
    prefix = getattr(model, "num_prefix_tokens", 0)
    tokens = final[:, prefix:] if prefix else final.flatten(1, 2)
    torch.testing.assert_close(last.flatten(2).transpose(1, 2), tokens, **CLOSE)

    [first] = model.forward_intermediates(image, indices=[0], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(first, maps[0], **CLOSE)
    if prefix:
        [(feature, prefixes)] = model.forward_intermediates(
            image, indices=1, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
        )
        torch.testing.assert_close(torch.cat((prefixes, feature), dim=1), final, **CLOSE)


@pytest.mark.parametrize("name", ["localvit_tnt_t_patch16_224", "localvit_pvt_tiny"])
def test_unknown_output_format_raises(name):
    with pytest.raises(ValueError, match="output_fmt='NHWC'"):
        small_model(name).forward_intermediates(images(name), output_fmt="NHWC")


@pytest.mark.parametrize("name", MODELS)
def test_features_only(name):
    torch.manual_seed(1)
    whole = small_model(name).eval()
    image = images(name)
    depth = len(whole.feature_info)
    for indices in ((0, depth - 1), (0,)):
        torch.manual_seed(1)
        backbone = small_model(name, features_only=True, out_indices=indices).eval()
        features = backbone(image)
        wanted = whole.forward_intermediates(image, indices=list(indices), intermediates_only=True)
        assert [f.shape[1] for f in features] == backbone.feature_info.channels()
        for feature, info, want in zip(features, backbone.feature_info.get_dicts(), wanted, strict=True):
            assert feature.shape[2] * info["reduction"] == image.shape[2]
            assert feature.shape == want.shape
    with torch.device("meta"):
        assert timm.create_model(name, features_only=True).feature_info.channels()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("in_chans", [1, 4])
def test_other_numbers_of_input_channels(name, in_chans):
    assert small_model(name, in_chans=in_chans)(images(name, in_chans=in_chans)).shape == (2, 7)


@pytest.mark.parametrize("name", MODELS)
def test_an_images_logits_do_not_depend_on_the_batch(name):
    model = randomized(double(name)).eval()
    image = images(name, batch=3, dtype=torch.float64)
    torch.testing.assert_close(model(image[1:2]), model(image)[1:2], **CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_images_of_other_sizes_run(name):
    model = small_model(name).eval()
    for scale in ((1, 2), (2, 1), (2, 2)):
        assert torch.isfinite(model(images(name, scale=scale))).all()


@pytest.mark.parametrize("name", ABSOLUTE)
@pytest.mark.parametrize("scale", [(1, 2), (3, 1)])
def test_set_input_size_computes_the_same_as_resampling_in_each_forward(name, scale):
    # float32, because timm resamples positions in float32 whatever their dtype.
    dynamic = randomized(small_model(name)).eval()
    image = images(name, scale=scale)
    resized = copy.deepcopy(dynamic)
    resized.set_input_size(tuple(image.shape[2:]))
    old, new = dynamic.position_grids(), resized.position_grids()
    assert all(old[key] != new[key] for key in new)
    for key, ((height, width), num_prefix_tokens) in new.items():
        assert resized.state_dict()[key].shape[1] == num_prefix_tokens + height * width
    assert [key for key, _ in resized.named_parameters()] == [key for key, _ in dynamic.named_parameters()]
    assert resized.position_grids() == dynamic.position_grids(tuple(image.shape[2:]))
    torch.testing.assert_close(resized(image), dynamic(image))


@pytest.mark.parametrize("name", ABSOLUTE)
def test_grids_with_equal_numbers_of_tokens_are_distinguished(name):
    model = randomized(small_model(name)).eval()
    square, wide, tall = (images(name, scale=scale, seed=7) for scale in ((2, 2), (1, 4), (4, 1)))
    in_turn = [model(image) for image in (square, wide, tall, wide, square)]
    torch.testing.assert_close(in_turn[1], in_turn[3], rtol=0, atol=0)
    torch.testing.assert_close(in_turn[0], in_turn[4], rtol=0, atol=0)
    for image, got in zip((square, wide, tall), in_turn, strict=False):
        resized = copy.deepcopy(model)
        resized.set_input_size(tuple(image.shape[2:]))
        torch.testing.assert_close(resized(image), got)
    # The same tokens in the same order on another grid: neighbors and positions differ.
    assert not torch.allclose(model.forward_features(wide), model.forward_features(wide.mT), atol=1e-3)


def test_swin_accepts_a_new_input_size():
    model = small_model("localvit_swin_tiny_patch4_window7_224").eval()
    model.set_input_size((128, 64))
    assert torch.isfinite(model(images("localvit_swin_tiny_patch4_window7_224", scale=(2, 1)))).all()


@pytest.mark.parametrize("name", ["localvit_tnt_t_patch16_224", "localvit_pvt_tiny", "localvit_T2t_conv7", *BASELINES])
@pytest.mark.parametrize(
    ("size", "side"), [((65, 64), "height of 65"), ((64, 72), "width of 72"), ((8, 64), "height of 8")]
)
def test_images_not_divisible_by_the_patches_raise_with_both_numbers(name, size, side):
    patch = 32 if "pvt" in name else 16
    with pytest.raises(ValueError, match=rf"{side} pixels .* {patch}"):
        small_model(name)(torch.zeros(1, 3, *size))
    with pytest.raises(ValueError, match=rf"{side} pixels .* {patch}"):
        small_model(name, img_size=size)


@pytest.mark.parametrize("name", ["localvit_tnt_t_patch16_224", "localvit_pvt_tiny"])
def test_set_input_size_refuses_sizes_not_divisible_by_the_patches(name):
    model = small_model(name)
    before = model.position_grids()
    with pytest.raises(ValueError, match="width of 72 pixels"):
        model.set_input_size((64, 72))
    assert model.position_grids() == before


@pytest.mark.parametrize("name", LOCAL)
def test_tokens_that_do_not_fill_the_grid_raise_with_both_numbers(name):
    model = small_model(name).eval()
    model(images(name))
    slots = [module for module in model.modules() if isinstance(module, LocalityMlp)]
    assert slots
    for slot in slots:
        sizes = []
        handle = slot.register_forward_pre_hook(lambda slot, args, sizes=sizes: sizes.append(slot.layout.grid.size))
        model(images(name))
        handle.remove()
        [(height, width)] = sizes
        handle = slot.register_forward_pre_hook(lambda slot, args: torch.cat((args[0], args[0][:, :1]), dim=1))
        with pytest.raises(ValueError, match=rf"{height * width + 1} image tokens .*grid of {height * width}"):
            model(images(name))
        handle.remove()


@pytest.mark.parametrize("name", MODELS)
def test_unknown_arguments_raise(name):
    with pytest.raises(TypeError, match="localty"):
        small_model(name, localty=True)


def test_only_the_plain_transformer_can_be_distilled():
    for name in ONE_OF_EACH:
        if family(name) is not LocalViT:
            with pytest.raises(TypeError, match="distilled"):
                small_model(name, distilled=True)


@pytest.mark.parametrize("name", LOCAL)
def test_stochastic_depth_acts_on_attention_and_never_on_locality(name):
    torch.manual_seed(0)
    model = randomized(small_model(name, drop_path_rate=0.999, local_blocks=None)).train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()  # so that an image's output does not depend on the others
    recorded = []
    slots = [module for module in model.modules() if isinstance(module, LocalityMlp)]
    # The last block has the highest rate. Swin's module reads the tokens of a map, the others a class token first.
    slots[-1].register_forward_hook(lambda module, args, output: recorded.append((args[0], output)))
    residual = []
    [block] = [module for module in model.modules() if getattr(module, "mlp", None) is slots[-1]]
    block.register_forward_hook(lambda module, args, output: residual.append((args, output)))
    model(images(name, batch=16))
    [(before, change)], [(args, after)] = recorded, residual
    after = after[1] if isinstance(after, tuple) else after
    torch.testing.assert_close(before + change, after.reshape(before.shape), rtol=0, atol=0)
    entering = args[1] if family(name) is LocalTNT else args[0]
    class_token = 0 if family(name) is LocalSwin else slice(0, 1)
    attention = (before - entering.reshape(before.shape)).flatten(1)
    if family(name) is LocalTNT:
        # TNT adds the inner tokens to the image tokens; only the class token shows the outer attention by itself.
        attention = (before - entering)[:, class_token].flatten(1)
    dropped = attention.abs().amax(1) == 0
    # Rate 0.999 in the last block: all 16 images lose it with probability 0.984, and more than half almost certainly.
    assert dropped.sum() > 8
    assert (change[:, -1].abs().amax(-1) > 0).all()


def test_tnt_has_stochastic_depth_in_the_inner_branches_like_timm():
    model = small_model("localvit_tnt_t_patch16_224", drop_path_rate=0.3)
    block = model.blocks[-1]
    for branch in (block.attn_in.proj_drop, block.attn_out.proj_drop, block.mlp_in.drop2):
        assert branch[-1].drop_prob == pytest.approx(0.3)
    assert not any("drop" in key for key in model.state_dict())


def test_tnt_without_locality_equals_timms():
    from timm.models.tnt import TNT

    ours = randomized(double("tnt_t_patch16_224", drop_path_rate=0.4))
    theirs = TNT(
        64, embed_dim=48, inner_dim=12, depth=2, num_heads_inner=3, num_heads_outer=3, num_classes=7, legacy=True,
        drop_path_rate=0.4,
    ).double()  # fmt: skip
    theirs.load_state_dict(ours.state_dict(), strict=True)
    image = images("tnt_t_patch16_224", dtype=torch.float64)
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(9)
        outputs.append(model.train()(image))
    torch.testing.assert_close(*outputs, **CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_changes_nothing(name):
    results = []
    for checkpointing in (False, True):
        model = randomized(double(name, drop_path_rate=0.2)).train()
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(4)
        loss = model(images(name, dtype=torch.float64)).square().sum()
        loss.backward()
        results.append((loss.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(results[0], results[1], **CLOSE)


# Not Swin: timm's SwinTransformer cannot be traced either if it accepts any size. It then makes its mask in forward.
@pytest.mark.parametrize("name", ABSOLUTE)
def test_graph_feature_extraction(name):
    model = randomized(small_model(name)).eval()
    last = len(model.feature_info) - 1
    graph = FeatureGraphNet(copy.deepcopy(model), out_indices=(0, last)).eval()
    for scale in ((1, 1), (1, 2)):
        image = images(name, scale=scale)
        [(feature, prefix)] = model.forward_intermediates(
            image, indices=[last], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
        torch.testing.assert_close(graph(image)[1], torch.cat((prefix, feature), dim=1))


@pytest.mark.parametrize("name", [*ONE_OF_EACH, *BASELINES])
def test_compiles_into_one_graph(name):
    """On a size that it was not made for, whose grid is not square."""
    torch._dynamo.reset()
    model = randomized(small_model(name, drop_path_rate=0.0)).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    image = images(name, scale=(1, 2))
    torch.testing.assert_close(compiled(image), model(image))


def test_trains_compiled():
    """T2T has LocalViT's blocks behind those of its tokenizer."""
    name = "localvit_T2t_conv7"
    torch._dynamo.reset()
    losses = []
    for compiled in (False, True):
        model = randomized(double(name, drop_path_rate=0.0)).train()
        forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        loss = forward(images(name, dtype=torch.float64)).square().sum()
        loss.backward()
        losses.append((loss.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-7, atol=1e-9)  # hard sigmoid: 3e-8, see test_parity


def test_inductor_computes_the_same():
    torch._dynamo.reset()
    model = randomized(small_model("localvit_nano_patch4_32", depth=1)).eval()
    image = images("localvit_nano_patch4_32")
    # float32, with sums in another order
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(image), model(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*ONE_OF_EACH, *BASELINES])
def test_an_exported_program_computes_the_same(name):
    model = randomized(small_model(name)).eval()
    image = images(name)
    program = torch.export.export(model, (image,), strict=False)
    torch.testing.assert_close(program.module()(image), model(image))


@pytest.mark.parametrize("name", MODELS)
def test_memory_formats_agree(name):
    model = randomized(double(name)).eval()
    image = images(name, dtype=torch.float64)
    expected = model(image)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(image.to(memory_format=torch.channels_last)), expected, **CLOSE)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(name, dtype):
    model = small_model(name, dtype=dtype).eval()
    assert {p.dtype for p in model.parameters()} == {dtype}
    logits = model(images(name, dtype=dtype))
    assert logits.dtype == dtype
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_model_is_made_on_the_meta_device(name):
    model = timm.create_model(name, device="meta")
    assert {value.device.type for value in model.state_dict().values()} == {"meta"}
    tensors = [*model.parameters(), *model.buffers()]
    assert {value.device.type for value in tensors} == {"meta"}
    # The state dict is all that has to be filled. (Swin's index is timm's.)
    buffers = {key for key, _ in model.named_buffers() if not key.endswith("relative_position_index")}
    assert buffers <= model.state_dict().keys()


@pytest.mark.parametrize("name", MODELS)
def test_autocast_gives_finite_logits(name):
    model = randomized(small_model(name)).eval()
    image = images(name)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(image)).all()


@pytest.mark.parametrize("name", MODELS)
def test_copies_and_pickles_are_independent(name):
    model = randomized(small_model(name, drop_path_rate=0.1)).eval()
    wide = images(name, scale=(1, 2))
    expected = model(wide)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        model(images(name))  # This model's grid must not become the twin's.
        torch.testing.assert_close(twin(wide), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("coarse", [False, True])
def test_parameter_groups_cover_every_parameter(name, coarse):
    model = small_model(name)
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    grouped = [parameter for names in groups.values() for parameter in names]
    assert sorted(grouped) == sorted(key for key, _ in model.named_parameters())
    assert len(groups) > 2
    # The embedding comes first, the head last.
    assert any("embed" in key for key in groups[0])
    # timm puts what no pattern matches into the head's group, so nothing else may be there (but Swin's coarse norm).
    assert all(key.startswith(("head.", "norm.")) for key in groups[max(groups)])


NO_WEIGHT_DECAY = {
    LocalViT: {"pos_embed", "cls_token"},
    LocalPVT: {"cls_token"},
    LocalT2T: {"cls_token"},
    LocalTNT: {"patch_pos", "pixel_pos", "cls_token"},
    LocalSwin: set(),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_parameters_without_weight_decay_are_the_published_ones(name):
    model = small_model(name)
    named = dict(model.named_parameters())
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    exempt = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert {key for key in named if id(named[key]) in exempt and named[key].ndim > 1} == NO_WEIGHT_DECAY[family(name)]
