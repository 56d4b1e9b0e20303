"""Running statistics change once for each batch, and not for a batch that raises."""

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.utils.checkpoint import checkpoint

import localvit
from localvit import Adapter, LocalityFeedForward, ops

FORMS = [{}, {"dp_first": True}, {"wo_dp_conv": True}, {"stride": 2}, {"dp_first": True, "stride": 2}]
OTHER_LAYERS = {
    "own": lambda layers: None,
    "cumulative": lambda layers: setattr(layers[1], "momentum", None),
    "GELU": lambda layers: layers.__setitem__(2, nn.GELU()),
    "norm and activation": lambda layers: layers.__setitem__(1, BatchNormAct2d(24, act_layer=nn.SiLU)),
}
"""Layers that take the recomputing path, and such that run one by one."""


def module(layers="own", **form):
    torch.manual_seed(0)
    made = LocalityFeedForward(6, 6, reduction=2, **form).train()
    OTHER_LAYERS[layers](made.conv)
    return made


def buffers_of(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("layers", OTHER_LAYERS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 2])
def test_a_single_value_per_channel_changes_nothing(form, size, layers):
    made = module(layers, **(form if layers == "own" else {}))
    made(torch.randn(3, 6, 5, 7))
    before = buffers_of(made)
    map_BCHW = torch.randn(1, 6, size, size)
    if size == 2 and not (layers == "own" and "stride" in form):
        made(map_BCHW)
        assert all(buffer.isfinite().all() for buffer in made.buffers())
        return
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        made(map_BCHW)
    torch.testing.assert_close(buffers_of(made), before, rtol=0, atol=0)


def test_a_single_value_per_channel_of_an_adapters_norm():
    made = localvit.localize(
        localvit.create_model("localvit_nano_patch4_32", img_size=4, depth=2, local_blocks=()),
        Adapter(norm="batchnorm"),
    ).train()
    before = buffers_of(made)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        made(torch.randn(1, 3, 4, 4))
    torch.testing.assert_close(buffers_of(made), before, rtol=0, atol=0)


def test_an_empty_batch_leaves_mean_and_variance():
    made = module()
    before = buffers_of(made)
    assert made(torch.empty(0, 6, 5, 7)).shape == (0, 6, 5, 7)
    after = buffers_of(made)
    for name in before:
        assert name.endswith("num_batches_tracked") or torch.equal(after[name], before[name])


@pytest.mark.parametrize("layers", OTHER_LAYERS)
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("backend", ["layers", "torch", "triton"])
def test_gradient_checkpointing_counts_each_batch_once(layers, use_reentrant, backend):
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    made, checkpointed = module(layers), module(layers)
    with ops.use_backend(backend):
        for step in range(2):
            batch = torch.randn(3, 6, 5, 7, generator=torch.Generator().manual_seed(step))
            of_plain, of_checkpointed = (batch.clone().requires_grad_() for _ in range(2))
            made(of_plain).square().sum().backward()
            checkpoint(checkpointed, of_checkpointed, use_reentrant=use_reentrant).square().sum().backward()
    # Reentrant checkpointing runs the first forward without gradients, which is layer by layer: float32 sums.
    exact = {"rtol": 1e-5, "atol": 1e-5} if use_reentrant else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(buffers_of(checkpointed), buffers_of(made), **exact)
    assert checkpointed.conv[1].num_batches_tracked == 2
    for mine, expected in zip(checkpointed.parameters(), made.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, expected.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(of_checkpointed.grad, of_plain.grad, rtol=1e-4, atol=1e-4)


def nano(**changes):
    torch.manual_seed(0)
    return localvit.create_model("localvit_nano_patch4_32", img_size=16, embed_dim=24, depth=2, **changes)


SMALL = {
    "vit": nano,
    "adapter": lambda: localvit.localize(nano(local_blocks=()), Adapter(norm="batchnorm")),
    "pvt": lambda: localvit.create_model(
        "localvit_pvt_tiny",
        img_size=16,
        patch_sizes=(2, 2),
        embed_dims=(8, 12),
        depths=(1, 1),
        num_heads=(1, 2),
        mlp_ratios=(2.0, 2.0),
        sr_ratios=(2, 1),
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_timms_gradient_checkpointing(name):
    torch.manual_seed(0)
    plain = SMALL[name]().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing(True)
    x = torch.randn(3, 3, 16, 16)
    for each in (plain, checkpointed):
        each(x).square().sum().backward()
    torch.testing.assert_close(buffers_of(checkpointed), buffers_of(plain), rtol=0, atol=0)
    for mine, expected in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, expected.grad, rtol=0, atol=0)


@pytest.mark.parametrize("name", SMALL)
def test_gradients_by_torch_func(name):
    torch.manual_seed(0)
    model = SMALL[name]().train()
    before = buffers_of(model)
    x = torch.randn(3, 3, 16, 16)
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(values, x):
        return torch.func.functional_call(model, values, (x,)).square().sum()

    found = torch.func.grad(loss)(parameters, x)
    torch.testing.assert_close(buffers_of(model), before, rtol=0, atol=0)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4)


def test_gradients_of_each_image_by_vmap():
    made = module().double()
    x = torch.randn(3, 6, 5, 7, dtype=torch.float64)
    parameters = {name: value.detach() for name, value in made.named_parameters()}

    def loss(values, image_CHW):
        return torch.func.functional_call(made, values, (image_CHW[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for index in range(3):
        made.zero_grad()
        made(x[index : index + 1]).square().sum().backward()
        for name, parameter in made.named_parameters():
            torch.testing.assert_close(found[name][index], parameter.grad, rtol=1e-9, atol=1e-9)


def test_statistics_that_functional_call_is_given_are_updated():
    made, plain = module(), module()
    x = torch.randn(3, 6, 5, 7)
    parameters = {name: value.detach() for name, value in made.named_parameters()}
    buffers, before = buffers_of(made), buffers_of(made)

    def loss(parameters, buffers):
        return torch.func.functional_call(made, (parameters, buffers), (x,)).square().sum()

    torch.func.grad(loss)(parameters, buffers)
    plain(x)
    # float32: the path that plain takes sums in another order.
    torch.testing.assert_close(buffers, buffers_of(plain), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(buffers_of(made), before, rtol=0, atol=0)
