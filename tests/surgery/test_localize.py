"""`localize` and `delocalize`: what they change and keep, what they refuse, and what a localized model can do."""

import copy
import pickle
from functools import partial

import pytest
import timm
import torch
from checks import hidden_maps, randomized
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import prune

import localvit
from localvit import Adapter, Replace
from localvit.surgery.adapter import LocalityAdapter
from localvit.surgery.localize import locality_modules, localize_with_options
from localvit.tokens.mlp import LocalityMlp

DEPTH = 3


def small_vit(**kwargs):
    torch.manual_seed(0)
    defaults = {"img_size": (48, 80), "depth": DEPTH, "num_classes": 7, "dynamic_img_size": True}
    return timm.create_model("test_vit", **defaults | kwargs).double().eval()


def image(batch=2, height=48, width=80, dtype=torch.float64):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(5)).to(dtype)


def shaken(model):
    """The model with adapters that change its output."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in locality_modules(model).values():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / 5)
    return model


def localized_vit(**options):
    return shaken(localize_with_options(small_vit(), options, inplace=True))


def test_parameters_keep_names_values_and_identity():
    model = small_vit()
    before = dict(model.named_parameters())
    values = {name: parameter.clone() for name, parameter in before.items()}
    assert localvit.localize(model, inplace=True) is model
    after = dict(model.named_parameters())
    assert all(after[name] is parameter and torch.equal(parameter, values[name]) for name, parameter in before.items())
    assert sorted(after.keys() - before.keys()) == [f"blocks.{i}.mlp.fc2.locality.conv.weight" for i in range(DEPTH)]


@pytest.mark.parametrize("method", [Adapter(gate="se"), Replace()])
def test_by_default_the_model_given_stays_as_it_is(method):
    model = small_vit()
    expected, keys = model(image()), list(model.state_dict())
    localized = shaken(
        localvit.localize(model, method, trainable="locality", filter_fn=lambda module, name: "1" in name)
    )
    assert list(locality_modules(localized)) == list(locality_modules(localized))[:1]
    assert localized is not model
    assert list(model.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(image()), expected)
    assert not torch.allclose(localized(image()), expected)
    if isinstance(method, Adapter):
        plain = localvit.delocalize(localized, discard=True)
        assert len(locality_modules(localized)) == 1
        assert torch.equal(plain(image()), expected)


@pytest.mark.parametrize("gate", [None, "se", "eca"])
def test_delocalize_restores_the_original_bit_exactly(gate):
    model = small_vit()
    expected, keys = model(image()), model.state_dict().keys()
    hooks = [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()]
    localvit.localize(model, Adapter(gate=gate), trainable="locality", inplace=True)
    assert torch.equal(model(image()), expected)
    assert localvit.delocalize(model, inplace=True) is model
    assert torch.equal(model(image()), expected)
    assert model.state_dict().keys() == keys
    assert [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()] == hooks
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not hasattr(model, "localized")
    localvit.localize(model, inplace=True)


def test_trained_adapters_are_only_removed_with_discard():
    model = small_vit()
    expected = model(image())
    shaken(localvit.localize(model, inplace=True))
    with pytest.raises(ValueError, match=r"3 of 3 adapters are trained \(blocks.0.mlp.fc2, .*discard=True"):
        localvit.delocalize(model, inplace=True)
    assert len(locality_modules(model)) == DEPTH
    assert torch.equal(localvit.delocalize(model, discard=True)(image()), expected)


@pytest.mark.parametrize(
    ("blocks", "local"), [(None, [0, 1, 2]), ("2-3", [1, 2]), ("1,3", [0, 2]), ([2], [1]), (range(1, 3), [0, 1])]
)
def test_blocks_count_from_one(blocks, local):
    model = localvit.localize(small_vit(), blocks=blocks)
    assert sorted(locality_modules(model)) == [f"blocks.{i}.mlp.fc2.locality" for i in local]
    again = localize_with_options(small_vit(), model.localized.options)
    assert locality_modules(again).keys() == locality_modules(model).keys()


def test_filter_fn_sees_the_projections_and_their_names():
    seen = []

    def last_only(module, name):
        seen.append((type(module), module.in_features, name))
        return name.startswith("blocks.2.")

    model = localvit.localize(small_vit(), filter_fn=last_only)
    hidden = model.blocks[0].mlp.fc2.in_features
    assert seen == [(nn.Linear, hidden, f"blocks.{i}.mlp.fc2") for i in range(DEPTH)]
    assert list(locality_modules(model)) == ["blocks.2.mlp.fc2.locality"]
    again = localize_with_options(small_vit(), model.localized.options)
    assert list(locality_modules(again)) == ["blocks.2.mlp.fc2.locality"]


BAD = [
    (small_vit, {"blocks": "4"}, ValueError, r"blocks='4': the model has blocks 1 to 3, not \[4\]"),
    (small_vit, {"blocks": []}, ValueError, r"blocks=\[\] selects none of the blocks of VisionTransformer"),
    (
        small_vit,
        {"filter_fn": lambda module, name: False},
        ValueError,
        "matched none of the 3 projections.*blocks.0.mlp",
    ),
    (small_vit, {"filter_fn": ["blocks.7.mlp.fc2"]}, ValueError, "names blocks.7.mlp.fc2, but VisionTransformer has"),
    (small_vit, {"kernel": 5}, TypeError, "method='adapter' has no option kernel; its options are kernel_size"),
    (small_vit, {"act": "hs"}, TypeError, "method='adapter' has no option act"),
    (
        small_vit,
        {"method": "replace", "gate": "se"},
        TypeError,
        "method='replace' has no option gate; its options are act",
    ),
    (small_vit, {"kernel_size": 2}, ValueError, "kernel_size=2 must be odd"),
    (small_vit, {"method": "replace", "act": "gelu"}, ValueError, "act='gelu' is not known"),
    (small_vit, {"trainable": "head"}, ValueError, "trainable='head': choose 'all' or 'locality'"),
    (small_vit, {"grid": (3, 5)}, ValueError, "select its linear layers with filter_fn"),
    (partial(timm.create_model, "test_resnet"), {}, ValueError, "ResNet has no feed-forward that localize can find"),
    (lambda: localvit.localize(small_vit()), {}, ValueError, "has locality already, in 3 feed-forwards"),
    (lambda: localvit.create_model("localvit_nano_patch4_32"), {}, ValueError, "has locality already, in 6"),
    (lambda: torch.compile(small_vit()), {}, ValueError, "compiled: localize it first"),
    (lambda: nn.DataParallel(small_vit()), {}, ValueError, "localize model.module before you wrap it"),
    (
        lambda: nn.Linear(3, 5),
        {"grid": "embed", "filter_fn": lambda module, name: True},
        ValueError,
        "not the name of a submodule",
    ),
    (
        lambda: nn.Linear(3, 5),
        {"grid": (0, 5), "filter_fn": lambda module, name: True},
        ValueError,
        r"must be \(height",
    ),
]


def wrapped_last():
    model = small_vit()
    model.blocks[2].mlp.fc2.forward = partial(model.blocks[2].mlp.fc2.forward)
    return model


def quantized():
    return torch.ao.quantization.quantize_dynamic(small_vit().float(), {nn.Linear})


def one_feed_forward_in_two_blocks():
    model = small_vit()
    model.blocks[1].mlp = model.blocks[0].mlp
    return model


def one_projection_on_two_grids():
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1, 1, 1), embed_dim=32)
    model.layers[1].blocks[0].mlp = model.layers[0].blocks[0].mlp
    return model


def compiled_block():
    model = small_vit()
    model.blocks[1] = torch.compile(model.blocks[1])
    return model


BAD += [
    (wrapped_last, {}, ValueError, "another library has wrapped the forward of blocks.2.mlp.fc2"),
    (quantized, {}, ValueError, "blocks.0.mlp.fc2 has no parameters: localize the model before it is quantized"),
    (compiled_block, {}, ValueError, r"blocks\.1 of this model is compiled: localize it first"),
    (lambda: nn.Sequential(nn.DataParallel(small_vit())), {}, ValueError, r"0 of this model is wrapped.*0\.module"),
    (
        one_feed_forward_in_two_blocks,
        {"method": "replace"},
        ValueError,
        "replace blocks.1.mlp, which is the same module as blocks.0.mlp in another block",
    ),
    (one_projection_on_two_grids, {}, ValueError, "are one module, which works on several grids"),
    (lambda: timm.create_model("resnet18"), {}, ValueError, "ResNet has no feed-forward.*it is not a vision transf"),
    (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), nn.TransformerEncoderLayer(8, 2, 32)),
        {},
        ValueError,
        r"It has attention. .*filter_fn \(such as 2.linear2\), .*grid: .*\(such as 0\)",
    ),
]


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(("make", "arguments", "error", "message"), BAD)
def test_invalid_arguments_raise_and_change_nothing(make, arguments, error, message):
    model = make()
    keys = list(model.state_dict())
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    with pytest.raises(error, match=message):
        localize_with_options(model, arguments, inplace=True)
    assert list(model.state_dict()) == keys
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == hooks


def test_delocalize_refuses_with_a_reason():
    with pytest.raises(ValueError, match="VisionTransformer is not localized"):
        localvit.delocalize(small_vit(), inplace=True)
    with pytest.raises(ValueError, match=r"has the paper's module.*create the model again"):
        localvit.delocalize(localvit.localize(small_vit(), Replace()))
    with pytest.raises(ValueError, match=r"the forward of blocks.\d.mlp.fc2 is wrapped, as fuse .*before that"):
        localvit.delocalize(localvit.fuse(localvit.localize(small_vit())))


def test_trainable_locality_trains_nothing_else():
    model = localvit.localize(small_vit(), Adapter(gate="se"), trainable="locality").train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".locality." in name}
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters() if name not in trained}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(image()).square().sum().backward()
        optimizer.step()
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())
    # The head reads the class token only, which does not depend on the patches of the last block.
    assert [module.is_neutral for module in locality_modules(model).values()] == [False, False, True]


def test_images_of_any_size():
    model = localized_vit()
    alone = {size: model(image(1, *size)) for size in ((48, 80), (80, 48), (16, 112))}
    for size, expected in reversed(alone.items()):
        torch.testing.assert_close(model(image(1, *size)), expected, rtol=0, atol=0)
    assert model.blocks[0].mlp.fc2.layout.grid.size is None


def test_images_of_a_batch_do_not_depend_on_each_other():
    model = localized_vit(gate="se")
    images = image(3)
    together = model(images)
    for index in range(3):
        torch.testing.assert_close(
            together[index : index + 1], model(images[index : index + 1]), rtol=1e-10, atol=1e-12
        )
    channels_last = model(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(channels_last, together, rtol=1e-10, atol=1e-12)


def test_tokens_that_do_not_fill_the_grid_are_refused():
    model = localvit.localize(small_vit())
    model.patch_embed(image())
    with pytest.raises(ValueError, match=r"14 image tokens \(1 prefix .*do not fill the 3 x 5 grid of 15"):
        model.blocks(torch.zeros(2, 15, model.embed_dim, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"patch_drop_rate=0.4"):
        localvit.localize(small_vit(patch_drop_rate=0.4), inplace=True)


def test_a_replaced_patch_embedding_is_followed():
    model, host = localvit.localize(small_vit()), small_vit()
    model(image())
    for each in (model, host):
        each.set_input_size((40, 24), patch_size=8)  # as many patches, 5 x 3 of them, from a new convolution
    assert torch.equal(model(image(1, 40, 24)), host(image(1, 40, 24)))
    assert [map_BEHW.shape[2:] for map_BEHW in hidden_maps(model, image(1, 40, 24))] == DEPTH * [(5, 3)]


def test_a_block_copied_by_itself_raises():
    model = localized_vit()
    model(image())
    model.blocks.append(copy.deepcopy(model.blocks[1]))
    with pytest.raises(ValueError, match=r"no patch grid is recorded.*copied from a localized model by itself"):
        model(image())
    model.blocks = model.blocks[:2]  # Blocks that are only removed are not.
    assert torch.isfinite(model(image())).all()


def test_blocks_that_the_model_contains_twice_share_their_locality():
    model = small_vit()
    model.blocks[2] = model.blocks[0]
    model.blocks[1].mlp = model.blocks[0].mlp
    expected = model(image())
    localized = localvit.localize(model)
    assert len(locality_modules(localized)) == 1
    assert localized.blocks[2].mlp.fc2 is localized.blocks[1].mlp.fc2 is localized.blocks[0].mlp.fc2
    assert torch.equal(localized(image()), expected)
    assert not torch.allclose(shaken(localized)(image()), expected)
    assert torch.equal(localvit.delocalize(localized, discard=True)(image()), expected)
    model.blocks[1].mlp = copy.deepcopy(model.blocks[0].mlp)
    assert len(locality_modules(localvit.localize(model, Replace()))) == 2


def test_delocalize_after_other_changes():
    """Removed blocks and a removed head move or take away the parameters that were frozen."""
    model = small_vit()
    model.blocks[2].norm1.requires_grad_(False)
    localvit.localize(model, trainable="locality", inplace=True)
    model.reset_classifier(0)
    model.blocks = model.blocks[1:]
    plain = localvit.delocalize(model)
    assert [name for name, parameter in plain.named_parameters() if not parameter.requires_grad] == [
        "blocks.2.norm1.weight",
        "blocks.2.norm1.bias",
    ]
    for wrapped, message in ((nn.DataParallel(model), "delocalize model.module"), (torch.compile(model), "compiled")):
        with pytest.raises(ValueError, match=message):
            localvit.delocalize(wrapped)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_quantization_leaves_the_branches():
    model = localvit.localize(randomized(small_vit()).float())
    for module in locality_modules(model).values():
        nn.init.normal_(module.conv.weight, std=3, generator=torch.Generator().manual_seed(1))
    plain = localvit.delocalize(model, discard=True)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert type(quantized.blocks[0].mlp.fc1) is torch.ao.nn.quantized.dynamic.Linear
    expected, *others = (each(image(dtype=torch.float32)) for each in (model, quantized, plain))
    of_quantized, of_plain = ((other - expected).norm() / expected.norm() for other in others)
    # 8 bits: about 1/255 of each range, over the layers of three blocks. The branches make a larger difference.
    assert 0 < of_quantized < 0.06 < 0.15 < of_plain


def test_pruning_and_weight_norm_of_a_localized_projection():
    model = localized_vit()
    expected = model(image())
    nn.utils.parametrizations.weight_norm(model.blocks[0].mlp.fc2)
    torch.testing.assert_close(model(image()), expected, rtol=1e-10, atol=1e-12)
    prune.identity(model.blocks[1].mlp.fc2, "weight")
    assert torch.equal(prune.remove(model.blocks[1].mlp.fc2, "weight").weight, model.blocks[1].mlp.fc2.weight)
    torch.testing.assert_close(model(image()), expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match=r"the class of blocks.0.mlp.fc2 was changed, .* before delocalize"):
        localvit.delocalize(model, discard=True)
    before = small_vit()
    nn.utils.parametrizations.weight_norm(before.blocks[0].mlp.fc2)
    assert torch.equal(localvit.localize(before)(image()), before(image()))


def test_blocks_compiled_one_by_one_share_their_code():
    torch._dynamo.reset()
    model, counter = localized_vit(), CompileCounter()
    expected = model(image())
    for block in model.blocks:
        block.compile(backend=counter)
    torch.testing.assert_close(model(image()), expected, rtol=1e-10, atol=1e-12)
    assert counter.frame_count == 1


def test_copies_are_independent():
    model = localized_vit(gate="eca")
    expected = model(image())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        model(image(1, 80, 48))
        assert torch.equal(twin(image()), expected)
        assert twin.localized == model.localized
        twin.load_state_dict(small_vit().state_dict(), strict=True)
        localvit.delocalize(twin, discard=True, inplace=True)
        assert len(locality_modules(model)) == DEPTH


def test_compiles_to_one_graph():
    torch._dynamo.reset()
    model = localized_vit(gate="se")
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    for size in ((48, 80), (80, 48)):
        # The compiler may fold and reorder: some ten roundings of float64.
        torch.testing.assert_close(compiled(image(2, *size)), model(image(2, *size)), rtol=1e-10, atol=1e-12)


def test_code_compiled_for_the_original_is_not_run_for_the_localized_model():
    torch._dynamo.reset()
    plain, model = small_vit(), localized_vit()
    runs = [torch.compile(each, backend="eager", dynamic=False) for each in (plain, model, plain, model)]
    for compiled, each in zip(runs, (plain, model, plain, model), strict=True):
        torch.testing.assert_close(compiled(image()), each(image()), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(model(image()), plain(image()))
    shaken(localvit.localize(plain, Adapter(gate="se"), inplace=True))
    torch.testing.assert_close(runs[0](image()), plain(image()), rtol=1e-10, atol=1e-12)


def test_exports_with_any_batch():
    model = localized_vit(gate="se")
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (image(3),), dynamic_shapes=({0: batch},), strict=False)
    for size in (1, 3, 5):
        torch.testing.assert_close(program.module()(image(size)), model(image(size)), rtol=1e-10, atol=1e-12)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = localized_vit().train()
        model.set_grad_checkpointing(checkpointing)
        model(image()).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-12)


def test_in_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, alone = localized_vit().train(), localized_vit().train()
        wrapped = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(ValueError, match=r"DistributedDataParallel: localize model.module before"):
            localvit.localize(wrapped)
        for _ in range(2):
            for each in (wrapped, alone):
                each(image()).square().sum().backward()
        for (name, parameter), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
            assert torch.equal(parameter.grad, expected.grad), name
        del wrapped
    finally:
        torch.distributed.destroy_process_group()


def test_sharded_models_are_refused_and_localized_models_can_be_sharded(tmp_path):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        model, plain = localized_vit(), small_vit()
        expected = model(image())
        fsdp.fully_shard(model.blocks[1], mesh=mesh)
        fsdp.fully_shard(model, mesh=mesh)
        assert torch.equal(model(image()), expected)
        fsdp.fully_shard(plain, mesh=mesh)
        with pytest.raises(ValueError, match=r"sharded over processes \(cls_token\).*localize the model before"):
            localvit.localize(plain)
    finally:
        torch.distributed.destroy_process_group()


def test_intermediates_and_features_have_locality():
    model, host = localized_vit(), small_vit()
    _, maps = model.forward_intermediates(image())
    _, plain = host.forward_intermediates(image())
    assert maps[0].shape == plain[0].shape == (2, host.embed_dim, 3, 5)
    assert not torch.allclose(maps[0], plain[0])
    backbone = localvit.localize(small_vit(features_only=True))
    assert len(locality_modules(backbone)) == DEPTH
    before = small_vit(features_only=True)(image())
    for feature, expected in zip(backbone(image()), before, strict=True):
        assert torch.equal(feature, expected)
    changed = shaken(backbone)(image())
    assert not torch.allclose(changed[-1], before[-1])


def test_meta_device():
    with torch.device("meta"):
        model = timm.create_model("vit_large_patch16_224")
    localvit.localize(model, Adapter(gate="se"), inplace=True)
    assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 1000)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    localvit.delocalize(model, inplace=True)
    assert locality_modules(model) == {}


@pytest.mark.parametrize("assign", [True, False])
def test_weights_of_the_original_into_a_model_localized_on_the_meta_device(assign):
    """They have no values for the adapters, whose memory is not initialized then."""
    host = small_vit()
    model = localvit.localize(copy.deepcopy(host).to("meta"), Adapter(gate="se", norm="batchnorm"))
    torch.full((10**6,), 7.0)  # So that recycled memory is not zero by chance.
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(host.state_dict(), assign=assign)
    assert torch.equal(model(image()), host(image()))
    assert not any(value.is_meta for value in model.state_dict().values())


@pytest.mark.parametrize("reset", [True, False])
def test_modules_given_memory_one_by_one(reset):
    """As FSDP's `param_init_fn` does, so that each layer of an adapter is initialized as if it were not in one."""
    host = small_vit()
    model = localvit.localize(copy.deepcopy(host).to("meta"), Adapter(gate="se", norm="batchnorm"))
    torch.full((10**6,), 7.0)  # So that recycled memory is not zero by chance.
    for module in model.modules():
        module.to_empty(device="cpu", recurse=False)
        if reset and hasattr(module, "reset_parameters"):
            module.reset_parameters()
    model.load_state_dict(host.state_dict())
    assert torch.equal(model(image()), host(image()))
    localized = localized_vit()
    model = localvit.localize(copy.deepcopy(host).to("meta"))
    for module in model.modules():
        module.to_empty(device="cpu", recurse=False)
    model.load_state_dict(localized.state_dict())
    model.load_state_dict(host.state_dict())
    assert torch.equal(model(image()), localized(image()))


def test_adapters_take_the_dtype_of_assigned_weights():
    host = small_vit().bfloat16()
    model = localvit.localize(small_vit().to("meta"))
    model.load_state_dict(host.state_dict(), assign=True)
    assert torch.equal(model(image().bfloat16()), host(image().bfloat16()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.08), (torch.float16, 0.01)])
def test_lower_precision(dtype, tolerance):
    # 2^-24, 2^-9, 2^-11 over the roundings of three blocks.
    model = localized_vit()
    expected = model(image())
    out = copy.deepcopy(model).to(dtype)(image().to(dtype))
    assert out.dtype == dtype
    assert (out.double() - expected).norm() <= tolerance * expected.norm()
    made_low = localvit.localize(small_vit().to(dtype))
    assert {parameter.dtype for parameter in made_low.parameters()} == {dtype}


def test_under_autocast():
    model = localized_vit().float()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(image(dtype=torch.float32))
    expected = model(image(dtype=torch.float32))
    assert (low.float() - expected).norm() <= 0.08 * expected.norm()


def test_inside_another_module():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.neck = small_vit(num_classes=0), nn.Linear(64, 5).double()

        def forward(self, x):
            return self.neck(self.backbone(x))

    detector = Detector()
    expected = detector(image())
    localvit.localize(detector, inplace=True)
    assert list(locality_modules(detector)) == [f"backbone.blocks.{i}.mlp.fc2.locality" for i in range(DEPTH)]
    assert torch.equal(detector(image()), expected)
    original = {key: value for key, value in detector.state_dict().items() if ".locality." not in key}
    detector.load_state_dict(original, strict=True)


def test_replace_also_removes_norm_and_stochastic_depth():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", depth=DEPTH, drop_path_rate=0.3, init_values=1e-3, img_size=(48, 80))
    localvit.localize(model, Replace(act="hs+eca"), blocks="2-3", inplace=True)
    for index, block in enumerate(model.blocks):
        local = index > 0
        assert isinstance(block.mlp, LocalityMlp) == local
        assert [isinstance(getattr(block, name), nn.Identity) for name in ("norm2", "ls2")] == [local] * 2
        assert isinstance(block.drop_path2, nn.Identity) == (local or index == 0)
        assert not isinstance(block.norm1, nn.Identity)
        assert not isinstance(block.ls1, nn.Identity)
    hidden = model.blocks[0].mlp.fc2.in_features
    assert model.blocks[1].mlp.conv[0].out_channels == hidden
    assert not any(isinstance(module, LocalityAdapter) for module in model.modules())
    model.train()(image(dtype=torch.float32)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_report_counts_what_was_added():
    model = small_vit()
    before = sum(parameter.numel() for parameter in model.parameters())
    hidden = model.blocks[0].mlp.fc2.in_features
    localvit.localize(model, Adapter(kernel_size=5, gate="eca"), blocks="1,3", inplace=True)
    report = localvit.locality_report(model, (3, 48, 80))
    assert [(part.name, part.channels, part.grid_size) for part in report] == [
        (f"blocks.{i}.mlp.fc2.locality", hidden, (3, 5)) for i in (0, 2)
    ]
    after = sum(parameter.numel() for parameter in model.parameters())
    assert sum(part.parameters for part in report) == after - before
    eca = model.blocks[0].mlp.fc2.locality.gate.conv.weight.numel()
    assert all(part.multiply_adds == 25 * hidden * 3 * 5 + eca * hidden for part in report)
    table = str(report)
    assert table.count("3 x 5") == 2
    assert table.splitlines()[-1].split() == ["total", f"{after - before:,}", f"{2 * report[0].multiply_adds:,}"]


def test_report_of_the_papers_module():
    # FACTS: depth-wise 3x3 over 768 channels, its norm's two vectors, and 768 -> 4 -> 768 with biases, in 12 blocks.
    report = localvit.locality_report(localvit.create_model("localvit_tiny", device="meta"))
    assert [part.grid_size for part in report] == [(14, 14)] * 12
    assert {part.parameters for part in report} == {9 * 768 + 2 * 768 + 2 * 4 * 768 + 4 + 768}
    assert {part.multiply_adds for part in report} == {9 * 768 * 196 + 2 * 4 * 768}
    assert {part.channels for part in report} == {768}


def test_report_of_a_convolution_before_the_expansion_and_a_gate_after_it():
    model = localvit.create_model("localvit_tiny", act="hs+eca", depthwise_first=True, device="meta")
    report = localvit.locality_report(model)
    kernel = 5  # ECA's over 768 channels: int((log2(768) + 1) / 2)
    assert {part.channels for part in report} == {192}
    assert {part.parameters for part in report} == {9 * 192 + 2 * 192 + kernel}
    assert {part.multiply_adds for part in report} == {9 * 192 * 196 + kernel * 768}


def test_report_needs_an_input_size():
    with pytest.raises(ValueError, match="no configuration with an image size: pass input_size"):
        localvit.locality_report(nn.Sequential(localized_vit()))
