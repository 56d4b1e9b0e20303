"""The CPU's kernels of the training step against float64, and where they run."""

import copy
import logging

import pytest
import torch
from launches import autograd_steps
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from localvit import ops
from localvit.bench.prepare import saved_bytes
from localvit.locality import ACTS, LocalityFeedForward
from localvit.ops import cpu_kernels, dispatch

SIZES = [(16, 64, 5, 7), (20, 80, 1, 9), (14, 784, 3, 1)]
"""Channels outside and hidden, and the grid: one tile of channels, one and a part of another, and more than a pass."""


@pytest.fixture(autouse=True)
def small_maps(monkeypatch):
    """Small maps run the kernels as well."""
    if cpu_kernels.library() is None:
        pytest.skip("the kernels cannot be compiled here")
    monkeypatch.setattr(dispatch, "LEAST_CPU_VALUES", 1)


class Layers(nn.Sequential):
    """The same layers, which run one by one: only a plain nn.Sequential takes a faster path."""


def module(act="hs+se", channels=16, hidden=64, **arguments):
    torch.manual_seed(0)
    made = LocalityFeedForward(channels, channels, act=act, reduction=4, expand_ratio=hidden / channels, **arguments)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made.train()


def image(channels=16, height=5, width=7, batch=3):
    return 2 * torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(3)) + 0.5


def exact(made):
    """The module's layers in float64."""
    plain = copy.deepcopy(made).double()
    plain.conv = Layers(*plain.conv)
    return plain


def results(made, map_BCHW):
    """Output, the gradients of the map and of each parameter, and the buffers."""
    map_BCHW = map_BCHW.detach().requires_grad_()
    out = made(map_BCHW)
    weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    (out * weights.to(out.dtype)).sum().backward()
    return [out.detach(), map_BCHW.grad, *(each.grad for each in made.parameters()), *made.buffers()]


def assert_exact(made, map_BCHW):
    """A step of the module agrees with float64, its running statistics included."""
    expected = results(exact(made), map_BCHW.double())
    assert_close(results(made, map_BCHW), expected)


def assert_close(found, expected, tolerance=2e-5):
    """To a part of each tensor's largest value: the sums are of values of that size."""
    for mine, other in zip(found, expected, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            atol = tolerance * max(1, float(other.abs().max()))
            torch.testing.assert_close(mine.double(), other.double(), rtol=0, atol=atol)


def runs_kernels(out):
    return "_CpuFeedForwardBackward" in autograd_steps(out)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(("channels", "hidden", "height", "width"), SIZES)
def test_same_as_float64(act, channels, hidden, height, width):
    made, map_BCHW = module(act, channels, hidden), image(channels, height, width)
    assert runs_kernels(copy.deepcopy(made)(map_BCHW))
    assert_exact(made, map_BCHW)


def test_tokens_behind_a_prefix():
    tokens_BNC = torch.full((3, 2 + 35, 16), torch.nan)
    tokens_BNC[:, 2:] = image().flatten(2).transpose(1, 2)
    map_BCHW = tokens_BNC[:, 2:].unflatten(1, (5, 7)).permute(0, 3, 1, 2)
    made = module()
    assert runs_kernels(copy.deepcopy(made)(map_BCHW))
    assert_exact(made, map_BCHW)


def test_statistics_of_maps_far_from_zero():
    """A mean of 1000 deviations: squares minus the square of the mean would leave nothing in float32."""
    z_BHWE = torch.randn(3, 5, 7, 64, generator=torch.Generator().manual_seed(3)) + 1000
    mean_BE, square_BE = cpu_kernels.moments(z_BHWE).unbind(1)
    expected_BSE = z_BHWE.double().flatten(1, 2)
    torch.testing.assert_close(mean_BE.double(), expected_BSE.mean(1), rtol=1e-6, atol=0)
    variance_BE = expected_BSE.var(1, correction=0)
    torch.testing.assert_close(square_BE.double() / 35, variance_BE, rtol=1e-4, atol=0)


@pytest.mark.parametrize("act", ["hs", "relu6"])
def test_same_bits_with_any_number_of_threads(act):
    generator = torch.Generator().manual_seed(3)
    grad_BHWE, z1_BHWE, z2_BHWE = torch.randn(3, 3, 5, 7, 80, generator=generator)
    norm_4E, weight_9E = torch.rand(4, 80, generator=generator), torch.rand(9, 80, generator=generator)
    gate_B2E = torch.rand(3, 2, 80, generator=generator)

    def all_results(threads):
        torch.set_num_threads(threads)
        through = grad_BHWE.clone()
        sums = cpu_kernels.norm_act_depthwise_backward_(
            through, z2_BHWE, norm_4E, gate_B2E, norm_4E[:2], z1_BHWE, norm_4E, weight_9E, act
        )
        gate_BE = gate_B2E[:, 0].contiguous()
        return [
            *(through, *sums, cpu_kernels.moments(z1_BHWE), cpu_kernels.norm_act_means(z2_BHWE, norm_4E, act)),
            *cpu_kernels.norm_act_depthwise(z1_BHWE, norm_4E, weight_9E, act),
            cpu_kernels.norm_act_gate(z2_BHWE, norm_4E, gate_BE, act),
            *cpu_kernels.norm_act_gate_backward(grad_BHWE, z2_BHWE, norm_4E, gate_BE, act),
        ]

    before = torch.get_num_threads()
    try:
        for one, several in zip(all_results(1), all_results(4), strict=True):
            torch.testing.assert_close(one, several, rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("act", ["hs", "relu6"])
def test_not_a_number_stays(act):
    map_BCHW = image()
    map_BCHW[1, 2, 3, 4] = torch.nan
    assert module(act)(map_BCHW).isnan().all()


@pytest.mark.parametrize("frozen", ["conv.0", "conv.1", "conv.3", "conv.4", "conv.6.fc.0", "conv.7", "conv."])
def test_frozen_parts_get_no_gradient(frozen):
    made = module()
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    assert_exact(made, image())


def test_backward_twice_through_one_forward():
    made = module()
    out = made(image())
    out.sum().backward(retain_graph=True)
    once = [each.grad.clone() for each in made.parameters()]
    out.sum().backward()
    for each, grad in zip(made.parameters(), once, strict=True):
        torch.testing.assert_close(each.grad, 2 * grad, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_each_batch_once(reentrant):
    made, map_BCHW = module(), image().requires_grad_()
    plain = exact(made)
    checkpoint(made, map_BCHW, use_reentrant=reentrant).sum().backward()
    plain(map_BCHW.detach().double()).sum().backward()
    assert_close(made.buffers(), plain.buffers())
    assert_close([each.grad for each in made.parameters()], [each.grad for each in plain.parameters()])


def test_saves_no_more_than_the_recomputing_path():
    made, map_BCHW = module(), image().requires_grad_()
    kernels = saved_bytes(made, map_BCHW)
    with ops.use_backend("torch"):
        recomputing = saved_bytes(made, map_BCHW)
    vectors = 4 * 64 * (9 + 4 + 4)
    assert kernels <= recomputing + vectors


def test_large_maps_only_by_default(monkeypatch):
    monkeypatch.undo()
    made = module(channels=64, hidden=256)
    assert runs_kernels(made(image(64, 32, 32, batch=4)))
    assert not runs_kernels(made(image(64, 32, 31, batch=4)))


class Counter(TorchDispatchMode):
    """Counts convolutions: a mode that has to see each of torch's operations."""

    convolutions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.convolutions += func in (torch.ops.aten.convolution.default, torch.ops.aten.mkldnn_convolution.default)
        return func(*args, **(kwargs or {}))


def with_other_activation(made):
    made.conv[2] = nn.ReLU6()


def with_depthwise_expansion(made):
    made.conv[0] = nn.Conv2d(64, 64, 1, groups=64, bias=False)


def with_depthwise_projection(made):
    made.conv[7] = nn.Conv2d(64, 64, 1, groups=64, bias=False)


@pytest.mark.parametrize(
    ("arguments", "change"),
    [
        ({"hidden": 72 + 4}, None),
        ({"stride": 2}, None),
        ({"dp_first": True}, None),
        ({"wo_dp_conv": True}, None),
        ({"kernel_size": 5}, None),
        ({}, with_other_activation),
        ({"channels": 64}, with_depthwise_expansion),
        ({"channels": 64}, with_depthwise_projection),
        ({}, nn.Module.double),
        ({}, nn.Module.eval),
    ],
)
def test_other_modules_run_other_paths(arguments, change):
    made = module(**arguments)
    if change is not None:
        change(made)
    map_BCHW = image(made.conv[0].in_channels).to(made.conv[0].weight.dtype)
    assert not runs_kernels(made(map_BCHW))


def test_other_contexts_run_other_paths():
    made, map_BCHW = module(), image()
    with torch.autocast("cpu", torch.bfloat16):
        assert not runs_kernels(made(map_BCHW))
    with ops.use_backend("torch"):
        assert not runs_kernels(made(map_BCHW))
    with Counter() as counter:
        assert not runs_kernels(made(map_BCHW))
    assert counter.convolutions
    assert runs_kernels(made(map_BCHW))


def test_without_a_compiler_the_other_path_runs_and_the_log_says_so_once(caplog):
    from torch._inductor import config
    from torch._inductor.cpp_builder import cpp_compiler_search

    cpp_compiler_search.cache_clear()
    cpu_kernels.library.cache_clear()
    try:
        made = module()
        # Not by monkeypatch, which afterwards removes the setting from torch's configuration.
        with config.patch({"cpp.cxx": ("no-such-compiler",)}), caplog.at_level(logging.INFO, "localvit"):
            assert not runs_kernels(copy.deepcopy(made)(image()))
            assert_exact(made, image())
        found = [record.message for record in caplog.records if "are not used" in record.message]
        assert len(found) == 1
        assert "No working C++ compiler" in found[0]
    finally:
        cpu_kernels.library.cache_clear()
        cpp_compiler_search.cache_clear()
