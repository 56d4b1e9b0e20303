"""The recomputing path against the same layers run one by one, which autograd differentiates by itself."""

import contextlib
import copy
import pickle
from functools import partial

import pytest
import torch
from launches import autograd_steps
from torch import nn
from torch.utils.checkpoint import checkpoint

from localvit.bench.prepare import saved_bytes
from localvit.locality import ACTS, LocalityFeedForward

CLOSE = {"rtol": 1e-10, "atol": 1e-11}
"""float64: the map before a norm is normalized twice, by statistics that were rounded once more."""

FORMS = [{}, {"dp_first": True}, {"wo_dp_conv": True}, {"stride": 2}]


def module(act="hs+se", dtype=torch.float64, **form):
    torch.manual_seed(0)
    made = LocalityFeedForward(6, 6, act=act, reduction=2, expand_ratio=3, dtype=dtype, **form)
    with torch.no_grad():
        for entry in (*made.parameters(), *made.buffers()):
            if entry.is_floating_point():
                entry.add_(0.3 * torch.randn_like(entry))
    return made.train()


class Layers(nn.Sequential):
    """The same layers, which run one by one: only a plain nn.Sequential takes a faster path."""


def layer_by_layer(lean):
    plain = copy.deepcopy(lean)
    plain.conv = Layers(*plain.conv)
    return plain


def image(dtype=torch.float64, batch=3):
    return 2 * torch.randn(batch, 6, 5, 7, dtype=dtype, generator=torch.Generator().manual_seed(3))


def results(made, map_BCHW, times=1, context=contextlib.nullcontext):
    """Output, then the gradients of the map and every parameter, then the buffers; the forward within a context."""
    map_BCHW = map_BCHW.detach().requires_grad_()
    out = map_BCHW
    with context():
        for _ in range(times):
            out = made(out)
    weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    (out * weights.to(out.dtype)).sum().backward()
    return [out.detach(), map_BCHW.grad, *(each.grad for each in made.parameters()), *made.buffers()]


def is_lean(out):
    return "_NormActConvBackward" in autograd_steps(out)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "behind a prefix"])
def test_same_numbers_gradients_and_statistics(act, form, layout):
    lean = module(act, **form)
    map_BCHW = image()
    if layout == "channels_last":
        map_BCHW = map_BCHW.to(memory_format=torch.channels_last)
    if layout == "behind a prefix":
        tokens_BNC = torch.cat((torch.full((3, 2, 6), torch.nan), map_BCHW.flatten(2).transpose(1, 2)), dim=1)
        map_BCHW = tokens_BNC[:, 2:].unflatten(1, (5, 7)).permute(0, 3, 1, 2)
    plain = layer_by_layer(lean)
    assert is_lean(lean(map_BCHW))
    assert not is_lean(plain(map_BCHW))
    for mine, expected in zip(results(lean, map_BCHW), results(plain, map_BCHW), strict=True):
        torch.testing.assert_close(mine, expected, **CLOSE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("act", ["relu6", "hs+se", "hs+eca"])
def test_gradcheck(act, form):
    lean = module(act, **form)
    parameters = list(lean.parameters())

    def function(map_BCHW, *values):
        # In place of the module's own, whose running statistics must not run on from one evaluation to the next.
        fresh = copy.deepcopy(lean)
        out = torch.func.functional_call(fresh, dict(zip(dict(lean.named_parameters()), values, strict=True)), map_BCHW)
        assert is_lean(out)
        return out

    assert torch.autograd.gradcheck(function, (image(batch=2).requires_grad_(), *parameters), fast_mode=True)


@pytest.mark.parametrize("times", [2, 3])
def test_used_more_than_once(times):
    lean = module()
    plain = layer_by_layer(lean)
    for mine, expected in zip(results(lean, image(), times), results(plain, image(), times), strict=True):
        torch.testing.assert_close(mine, expected, **CLOSE)


def test_backward_twice_through_one_forward():
    lean = module()
    out = lean(image())
    out.sum().backward(retain_graph=True)
    once = [each.grad.clone() for each in lean.parameters()]
    out.sum().backward()
    for each, grad in zip(lean.parameters(), once, strict=True):
        torch.testing.assert_close(each.grad, 2 * grad, rtol=0, atol=0)


def test_no_gradient_of_a_gradient():
    map_BCHW = image().requires_grad_()
    (grad,) = torch.autograd.grad(module()(map_BCHW).square().sum(), map_BCHW, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("frozen", ["conv.0", "conv.1", "conv.3", "conv.4", "conv.6.fc.0", "conv.7", "conv."])
def test_frozen_parts_get_no_gradient(frozen):
    lean = module()
    for name, parameter in lean.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    plain = layer_by_layer(lean)
    for mine, expected in zip(results(lean, image()), results(plain, image()), strict=True):
        assert (mine is None) == (expected is None)
        if mine is not None:
            torch.testing.assert_close(mine, expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    lean = module(dtype=torch.float32)
    plain = layer_by_layer(lean)
    exact = results(copy.deepcopy(plain).double(), image())
    autocast = partial(torch.autocast, "cpu", dtype)
    with autocast():
        assert is_lean(copy.deepcopy(lean)(image(torch.float32)))
    mine, theirs = (results(made, image(torch.float32), context=autocast) for made in (lean, plain))
    for lean_result, plain_result, expected in zip(mine, theirs, exact, strict=True):
        assert lean_result.dtype == plain_result.dtype
        # As near to float64 as autocast brings the layers one by one, within a factor for the luck of rounding.
        error, allowed = (each.double() - expected.double() for each in (lean_result, plain_result))
        assert error.norm() <= 2 * allowed.norm() + 1e-4 * expected.double().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    exact = results(layer_by_layer(module()), image())
    plain = layer_by_layer(module()).to(dtype)
    lean = module().to(dtype)
    for mine, theirs, expected in zip(results(lean, image(dtype)), results(plain, image(dtype)), exact, strict=True):
        assert mine.dtype == theirs.dtype
        error, allowed = (each.double() - expected.double() for each in (mine, theirs))
        assert error.norm() <= 2 * allowed.norm() + 1e-6 * expected.double().norm()


def test_under_gradient_checkpointing():
    lean, plain = module(), layer_by_layer(module())
    map_BCHW = image().requires_grad_()
    again = image().requires_grad_()
    checkpoint(lean, map_BCHW, use_reentrant=False).square().sum().backward()
    checkpoint(plain, again, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(map_BCHW.grad, again.grad, **CLOSE)
    for mine, expected in zip(lean.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, expected.grad, **CLOSE)
    for mine, expected in zip(lean.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, expected, **CLOSE)


def test_what_is_kept_for_the_backward_pass():
    """The inputs of the three convolutions' norms and of the first convolution, and nothing else of a map's size."""
    lean = module(dtype=torch.float32)

    def growth(made):
        few, many = (saved_bytes(made, image(torch.float32, batch).requires_grad_()) for batch in (2, 6))
        return (many - few) // 4

    places, gate = 5 * 7, 18 + 9 + 9 + 18 + 18  # means, hidden before and after its activation, logits, scale
    dim, hidden = 6, 18
    kept = places * (dim + hidden + hidden + dim)
    assert 4 * kept <= growth(lean) <= 4 * (kept + gate)
    assert growth(layer_by_layer(lean)) >= 4 * places * (2 * dim + 7 * hidden)


def test_float16_means_of_large_maps_do_not_overflow():
    """4,096 positions of value 20 sum up to more than float16 holds; their mean is 20."""
    lean = module("hs+se", torch.float32)
    with torch.no_grad():
        lean.conv[4].weight.zero_()
        lean.conv[4].bias.fill_(20.0)
    with torch.autocast("cpu", torch.float16):
        out = lean(torch.randn(2, 6, 64, 64))
    assert is_lean(out)
    assert out.isfinite().all()


def test_evaluation_mode_and_no_grad_run_the_layers():
    lean = module()
    expected = layer_by_layer(lean)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(lean(image()), expected(image()), rtol=0, atol=0)
    assert all(torch.equal(mine, other) for mine, other in zip(lean.buffers(), expected.buffers(), strict=True))
    assert not is_lean(lean.eval()(image()))


def test_compiled_and_traced():
    torch._dynamo.reset()
    lean = module()
    expected = results(layer_by_layer(lean), image())
    compiled = torch.compile(copy.deepcopy(lean), fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(results(compiled, image()), expected, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
    traced = torch.fx.symbolic_trace(copy.deepcopy(lean))
    for mine, theirs in zip(results(traced, image()), expected, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


def test_copied_and_pickled():
    lean = module()
    expected = results(copy.deepcopy(lean), image())
    for mine, theirs in zip(results(pickle.loads(pickle.dumps(lean)), image()), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
