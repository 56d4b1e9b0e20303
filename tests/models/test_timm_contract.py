"""The contract that timm's own tests/test_models.py holds every model to, for ours, at small sizes."""

import copy
import inspect

import pytest
import timm
import torch
from small import LOCAL, MODELS, ONE_OF_EACH, family, image_size, small_model
from timm.models import FeatureGraphNet, get_notrace_functions, get_notrace_modules
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.tnt import TNT
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import localvit
from localvit.models import swin
from localvit.models.swin import LocalSwin
from localvit.models.t2t import LocalT2T

pytestmark = pytest.mark.skipif(
    tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 31),
    reason="timm's interface as of 1.0.31: earlier ones lack arguments, attributes and ways of loading",
)

FEW = [*ONE_OF_EACH, "T2t_vit_7"]
SWIN = "localvit_swin_tiny_patch4_window7_224"
TNT_T = "localvit_tnt_t_patch16_224"
NANO = "localvit_nano_patch4_32"


def images(name, batch=2, scale=(1, 1)):
    height, width = (side * image_size(name) for side in scale)
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", FEW)
def test_every_parameter_gets_a_gradient(name):
    model = small_model(name).train()
    model(images(name)).mean().backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


def traced(model):
    """As timm's test traces a model."""
    options = {
        "leaf_modules": get_notrace_modules(),
        "autowrap_functions": get_notrace_functions(),
        "param_shapes_constant": True,
    }
    train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=options)
    return create_feature_extractor(
        model, train_return_nodes=train_nodes[-1:], eval_return_nodes=eval_nodes[-1:], tracer_kwargs=options
    )


@pytest.mark.parametrize("name", FEW)
def test_a_traced_graph_computes_the_same_and_trains(name):
    model = small_model(name).eval()
    graph = traced(model)
    [logits] = graph(images(name)).values()
    torch.testing.assert_close(logits, model(images(name)), rtol=1e-4, atol=1e-5)
    [logits] = graph.train()(images(name)).values()
    logits.mean().backward()
    assert [key for key, parameter in graph.named_parameters() if parameter.grad is None] == []


def test_swins_graph_is_for_any_size():
    model = small_model(SWIN).eval()
    graph = FeatureGraphNet(copy.deepcopy(model), out_indices=(1, 3)).eval()
    for scale in ((1, 1), (1, 2), (2, 1)):
        wanted = model.forward_intermediates(images(SWIN, scale=scale), indices=[1, 3], intermediates_only=True)
        got = [feature.permute(0, 3, 1, 2) for feature in graph(images(SWIN, scale=scale))]
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(("window", "shift"), [((4, 4), (2, 2)), ((3, 5), (1, 2)), ((4, 3), (0, 1))])
def test_swins_mask_is_timms(window, shift):
    block = SwinTransformerBlock(6, (24, 30), 2, window_size=window)
    block.window_size, block.shift_size, block.window_area = window, shift, window[0] * window[1]
    tokens = torch.zeros(1, 12, 60, 6)
    expected = SwinTransformerBlock.get_attn_mask(block, tokens)
    assert torch.equal(swin.shifted_window_mask(tokens, window, shift), expected)


@pytest.mark.parametrize("shift", [(0, 0), (2, 1)])
@pytest.mark.parametrize(("height", "width"), [(8, 9), (9, 14), (5, 3)])
def test_swins_attention_in_exported_programs_is_timms(height, width, shift):
    torch.manual_seed(0)
    block = SwinTransformerBlock(6, (24, 30), 2, window_size=(4, 3), shift_size=shift, dynamic_mask=True)
    map_BHWC = torch.randn(2, height, width, 6)
    assert torch.equal(swin.window_attention(block, map_BHWC), SwinTransformerBlock._attn(block, map_BHWC))


@pytest.mark.parametrize("name", FEW)
def test_configuration_and_heads_on_the_meta_device(name):
    model = small_model(name, device="meta").eval()
    state, cfg = model.state_dict(), model.default_cfg
    for key in ("classifier", "first_conv"):
        names = (cfg[key],) if isinstance(cfg[key], str) else cfg[key]
        assert all(f"{each}.weight" in state for each in names)
    assert inspect.signature(model.reset_classifier).parameters["global_pool"].default is None
    image = torch.empty(1, 3, image_size(name), image_size(name), device="meta")
    features = model.forward_features(image)
    assert features.shape[-1] == model.num_features
    assert model.forward_head(features, pre_logits=True).shape[1] == model.head_hidden_size
    assert model.bfloat16()(image.bfloat16()).dtype == torch.bfloat16
    model.double().reset_classifier(0)
    model.reset_classifier(2)
    head = model.get_classifier()
    assert (head.weight.device.type, head.weight.dtype) == ("meta", torch.float64)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", FEW)
def test_frozen_parameters_stay_frozen(name):
    model = small_model(name).requires_grad_(False)
    model.reset_classifier(0)
    model.set_input_size(img_size=(2 * image_size(name), 2 * image_size(name)))
    assert not [key for key, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("name", FEW)
def test_pruned_models_compute_the_same_features_and_train_every_parameter(name):
    model = small_model(name).eval()
    wanted = model.forward_intermediates(images(name), intermediates_only=True)
    for index in range(len(model.feature_info)):
        pruned = copy.deepcopy(model)
        take = pruned.prune_intermediate_layers([index], prune_norm=True)
        [feature] = pruned.forward_intermediates(images(name), indices=take, intermediates_only=True)
        torch.testing.assert_close(feature, wanted[index])
        pruned.reset_classifier(0, "avg")
        assert pruned.eval()(images(name)).shape == (2, pruned.num_features)
        pruned.train()
        [feature] = pruned.forward_intermediates(images(name), indices=take, intermediates_only=True)
        (feature.sum() + pruned.forward_features(images(name)).sum()).backward()
        assert [key for key, p in pruned.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_pruned_pvt_has_no_class_token_to_pool():
    model = small_model("localvit_pvt_tiny").eval()
    model.prune_intermediate_layers([1])
    model.reset_classifier(0, "avg")
    tokens = model.forward_features(images("localvit_pvt_tiny"))
    torch.testing.assert_close(model.forward_head(tokens), tokens.mean(1))
    with pytest.raises(ValueError, match="was pruned"):
        model.reset_classifier(0, "token")


@pytest.mark.parametrize("name", FEW)
def test_set_input_size_takes_one_side_and_keeps_what_is_not_given(name):
    model = small_model(name).eval()
    side = 2 * image_size(name)
    pair = copy.deepcopy(model)
    pair.set_input_size((side, side))
    model.set_input_size(side)
    model.set_input_size()
    torch.testing.assert_close(model(images(name, scale=(2, 2))), pair(images(name, scale=(2, 2))), rtol=0, atol=0)
    assert localvit.models.positions.img_size_of(model) == (side, side)
    if traits := getattr(model, "_traits", None):  # timm's record of the size, from 1.0.31 on
        assert tuple(traits["img_size"]) == (side, side)


@pytest.mark.parametrize("name", ["localvit_pvt_tiny", TNT_T, "localvit_T2t_conv7"])
def test_other_patches_are_refused_before_anything_changes(name):
    model = small_model(name).eval()
    expected = model(images(name))
    own = model.position_grids()
    with pytest.raises(ValueError, match=rf"patch_size=8 is not possible: {family(name).__name__} keeps"):
        model.set_input_size(img_size=2 * image_size(name), patch_size=8)
    assert model.position_grids() == own
    assert torch.equal(model(images(name)), expected)


@pytest.mark.parametrize(
    "make", [small_model, lambda name: localvit.localize(timm.create_model("test_vit", img_size=64))]
)
def test_a_replaced_patch_embedding_is_followed(make):
    model = make(NANO).eval()
    size = image_size(NANO) if make is small_model else 64
    old = model.patch_embed.proj
    model(torch.randn(1, 3, size, size))
    model.patch_embed.proj = nn.Sequential(copy.deepcopy(old))
    twin = copy.deepcopy(model)
    model.patch_embed.proj = old
    image = torch.randn(2, 3, size, size)
    assert torch.equal(twin(image), model(image))
    model.set_input_size(img_size=2 * size, patch_size=2 * model.patch_embed.patch_size[0])
    assert model(torch.randn(2, 3, 2 * size, 2 * size)).isfinite().all()


@pytest.mark.parametrize("name", [name for name in LOCAL if family(name) is not LocalT2T])
def test_timms_switches_of_the_image_size(name):
    """The default is any size; False makes the model refuse other sizes, as in timm."""
    switch = {"legacy": True} if family(name).__name__ in ("LocalTNT", "LocalPVT") else {"dynamic_img_size": True}
    if family(name).__name__ == "LocalPVT":
        with pytest.raises(TypeError, match="legacy"):
            small_model(name, **switch)
        return
    assert small_model(name, **switch)(images(name, scale=(1, 2))).shape == (2, 7)
    if "dynamic_img_size" in switch:
        strict = small_model(name, dynamic_img_size=False)
        assert strict(images(name)).shape == (2, 7)
        with pytest.raises(AssertionError, match="doesn't match"):
            strict(images(name, scale=(1, 2)))


def test_swin_of_one_size_computes_timms_masks():
    torch.manual_seed(0)
    strict = small_model(SWIN, strict_img_size=True).eval()
    dynamic = small_model(SWIN, strict_img_size=False).eval()
    dynamic.load_state_dict(strict.state_dict())
    assert not strict.dynamic_img_size
    torch.testing.assert_close(strict(images(SWIN)), dynamic(images(SWIN)))
    assert issubclass(LocalSwin, SwinTransformer)


def test_tnt_without_the_legacy_embedding_equals_timms():
    ours = small_model("tnt_t_patch16_224", legacy=False).double().eval()
    theirs = TNT(64, embed_dim=48, inner_dim=12, depth=2, num_heads_inner=3, num_heads_outer=3, num_classes=7).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    image = images("tnt_t_patch16_224").double()
    torch.testing.assert_close(ours(image), theirs.eval()(image), rtol=1e-9, atol=1e-11)


def test_t2t_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="dynamic_img_size=False is not possible"):
        small_model("localvit_T2t_conv7", dynamic_img_size=False)
    with pytest.raises(TypeError, match="has no argument embed_layer"):
        small_model("localvit_T2t_conv7", embed_layer=nn.Identity)
    assert small_model("localvit_T2t_conv7", dynamic_img_size=True)(images("localvit_T2t_conv7")).shape == (2, 7)


@pytest.mark.parametrize("options", [{"no_embed_class": True}, {"reg_tokens": 2}, {"pos_embed": "none"}], ids=str)
def test_positions_of_timms_options_are_known(options, tmp_path):
    model = small_model(NANO, **options).eval()
    path = localvit.save_checkpoint(model, tmp_path / "a.safetensors")
    larger, _ = localvit.model_from_checkpoint(path, img_size=2 * image_size(NANO))
    image = images(NANO, scale=(2, 2))
    torch.testing.assert_close(larger.eval()(image), model(image), rtol=1e-4, atol=1e-5)


def test_every_name_is_in_timms_lists():
    assert set(MODELS) <= set(timm.list_models(module="models"))
