"""Fused models by the Triton kernels on a GPU, against the same models by torch's functions and in float64.

Shapes: B batch, P prefix tokens, N tokens, C channels, H and W the grid.
"""

import copy
from importlib.util import find_spec

import pytest
import torch
from test_fuse import SMALL, images, shaken, small

import localvit
from localvit.locality import ACTS, LocalityFeedForward
from localvit.ops import use_backend

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]

FAMILIES = [name for name in SMALL if name.startswith("localvit")]
HALF = [torch.bfloat16, torch.float16]


def as_near_as_torch(found, by_torch, exact, dtype):
    """The error against float64 is that of torch's functions in the same dtype, but for the luck of rounding."""
    assert (found.dtype, found.shape) == (by_torch.dtype, by_torch.shape)
    error, allowed = ((each.double().cpu() - exact).norm() / exact.norm() for each in (found, by_torch))
    # Twice the error of torch's functions, and one rounding where they happen to be nearer than that.
    assert error <= 2 * allowed + torch.finfo(dtype).eps, (float(error), float(allowed))


def launched(function, *arguments):
    """A function's result, and the names of the kernels that it launched."""
    from localvit.ops.triton.launch import Launch

    names, run = set(), Launch.__call__

    def noted(launch, *tensors):
        names.add(launch.kernel.__name__)
        run(launch, *tensors)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Launch, "__call__", noted)
        return function(*arguments), names


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("changes", [{}, {"act": "hs+eca"}, {"act": "relu6"}, {"expand_ratio": 2.5}], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_model(name, changes, dtype):
    model = small(name, **changes)
    with torch.no_grad():
        exact = model(images(name))
    fused = localvit.fuse(copy.deepcopy(model).to(dtype)).cuda()
    given = images(name, dtype=dtype).cuda()
    found, names = launched(fused, given)
    assert {"pointwise_kernel", "depthwise_act_pool_kernel"} <= names
    assert torch.equal(found, launched(fused, given)[0])
    with use_backend("torch"):
        by_torch, names = launched(fused, given)
    assert not names
    as_near_as_torch(found, by_torch, exact, dtype)


PAPERS = [{}, {"expand_ratio": 1.0}]
FORMS = [*PAPERS, {"dp_first": True}, {"wo_dp_conv": True}, {"stride": 2}, {"kernel_size": 5}]
"""The paper's form runs by the kernels, the others by torch's functions."""


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_module(act, form):
    torch.manual_seed(0)
    module = shaken(LocalityFeedForward(96, 96, act=act, reduction=24, **form))
    map_BCHW = torch.randn(5, 96, 11, 7).bfloat16()
    exact = copy.deepcopy(module).double()(map_BCHW.double()).detach()
    fused, given = module.bfloat16().fuse().cuda(), map_BCHW.cuda()
    found, names = launched(fused, given)
    kernels = {"pointwise_kernel", "depthwise_act_pool_kernel", *["squeeze_excite_kernel"] * (act == "hs+se")}
    assert names == (kernels if form in PAPERS else set())
    assert torch.equal(given.cpu(), map_BCHW)
    with use_backend("torch"):
        as_near_as_torch(found, launched(fused, given)[0], exact, torch.bfloat16)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("grid", [(14, 14), (7, 7), (3, 11)])
def test_tokens_with_prefix_tokens(prefix, grid):
    """They are not read, and stay zero."""
    torch.manual_seed(0)
    module = shaken(LocalityFeedForward(192, 192, reduction=192))
    x_BNC = torch.randn(9, prefix + grid[0] * grid[1], 192).bfloat16()
    map_BCHW = x_BNC[:, prefix:].unflatten(1, grid).permute(0, 3, 1, 2)
    x_BNC[:, :prefix] = torch.nan
    exact = copy.deepcopy(module).double().conv(map_BCHW.double()).detach().flatten(2).transpose(1, 2)
    fused = module.bfloat16().fuse().conv.cuda()
    found, names = launched(fused.tokens, x_BNC.cuda(), grid, prefix)
    assert names == {"pointwise_kernel", "depthwise_act_pool_kernel", "squeeze_excite_kernel"}
    assert found.is_contiguous()
    assert not found[:, :prefix].any()
    with use_backend("torch"):
        by_torch, _ = launched(fused.tokens, x_BNC.cuda(), grid, prefix)
    as_near_as_torch(found[:, prefix:], by_torch[:, prefix:], exact, torch.bfloat16)


@pytest.mark.parametrize("name", FAMILIES)
def test_captured_in_a_cuda_graph(name):
    fused = localvit.fuse(small(name).bfloat16()).cuda()
    given = images(name, dtype=torch.bfloat16).cuda()
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            fused(given)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fused(given)
        given.copy_(given.flip(0))
        graph.replay()
        assert torch.equal(out, fused(given))
        assert not torch.equal(out[0], out[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_compiled(name):
    """The operator stays a node of the compiled code."""
    torch._dynamo.reset()
    model = small(name)
    with torch.no_grad():
        exact = model(images(name))
        fused = localvit.fuse(model.bfloat16()).cuda()
        given = images(name, dtype=torch.bfloat16).cuda()
        found, names = launched(torch.compile(fused, fullgraph=True, dynamic=False), given)
        assert {"pointwise_kernel", "depthwise_act_pool_kernel"} <= names
        as_near_as_torch(found, fused(given), exact, torch.bfloat16)


def test_gradients_with_respect_to_images():
    """As saliency maps need them."""
    name = "localvit_tiny"
    fused = localvit.fuse(small(name).bfloat16()).cuda()
    given = images(name, dtype=torch.bfloat16).cuda().requires_grad_()
    (found,) = torch.autograd.grad(fused(given).float().square().sum(), given)
    with use_backend("torch"):
        (by_torch,) = torch.autograd.grad(fused(given).float().square().sum(), given)
    assert (found - by_torch).norm() <= 0.1 * by_torch.norm()  # 2^-9 over some ten roundings in each of three blocks
