"""The registered operator of a fused module: gradients, what torch.compile and torch.export see, and the switch."""

import copy

import pytest
import torch
from launches import Draw
from samples import OPERATOR_SAMPLES, expected, sample
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from localvit.locality import ACTS, LocalityFeedForward, SqueezeExcite
from localvit.ops import dispatch, operators, reference, use_backend
from processes import run_source, start, status_of

FEED_FORWARD = torch.ops.localvit.feed_forward


@pytest.fixture
def triton_backend():
    pytest.importorskip("triton", reason="Triton is not installed")
    with use_backend("triton"):
        yield


def drawn(name, seed, dtype=torch.float64):
    """The operator's arguments."""
    _, given = sample(name, Draw(seed), dtype)
    return given


def by_run(x_BNC, height, width, prefix, parameters, *names):
    return operators.run(x_BNC, (height, width), prefix, operators.Module(parameters, *names))


def as_on_a_gpu(x_BNC, height, width, prefix, parameters, *names):
    return operators._WithGradientOfReference.apply((height, width, prefix), names, x_BNC, *parameters)


@pytest.mark.parametrize("name", OPERATOR_SAMPLES)
def test_gradients(name):
    x_BNC, height, width, prefix, parameters, *names = drawn(name, 0)
    given = [each.requires_grad_() for each in (x_BNC, *parameters)]

    def function(x_BNC, *parameters):
        return reference.feed_forward(x_BNC, height, width, prefix, list(parameters), *names)

    assert torch.autograd.gradcheck(function, given)


@pytest.mark.parametrize("name", OPERATOR_SAMPLES)
@pytest.mark.parametrize("form", [by_run, as_on_a_gpu])
def test_gradients_are_those_of_the_reference(name, form):
    x_BNC, *size, parameters, act1, act2, gate = drawn(name, 0)
    given = [each.requires_grad_() for each in (x_BNC, *parameters)]
    outs = [way(x_BNC, *size, parameters, act1, act2, gate) for way in (form, reference.feed_forward)]
    weights = Draw(4).values(*outs[0].shape)
    found, wanted = (torch.autograd.grad(out, given, weights) for out in outs)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)  # float64 sums in another order


@pytest.mark.parametrize("name", OPERATOR_SAMPLES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_registration(name, dtype):
    """Schema and fake registrations, and ahead-of-time dispatch, by torch's own check."""
    torch.library.opcheck(FEED_FORWARD.default, tuple(drawn(name, 0, dtype)))


@pytest.mark.parametrize("name", OPERATOR_SAMPLES)
@pytest.mark.parametrize("grad", [False, True])
def test_run_equals_the_operator(name, grad):
    given = drawn(name, 1)
    with torch.set_grad_enabled(grad):
        found = by_run(*given)
    (wanted,) = expected("feed_forward", given)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)  # float64 sums in another order


def fused(dtype=torch.float64):
    """A module whose fused form is the operator, and its tokens: 2 prefix tokens and a grid of 3 x 5."""
    torch.manual_seed(0)
    made = LocalityFeedForward(6, 6, reduction=2, expand_ratio=3, dtype=dtype).eval()
    return made.fuse().conv.requires_grad_(False)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = fused()

    def forward(self, x_BNC):
        return self.conv.tokens(x_BNC, (3, 5), 2)


def tokens(batch=2):
    return Draw(3).values(batch, 2 + 3 * 5, 6)


NODES = ["localvit.feed_forward.default"]


def seen(graph_module):
    targets = (str(node.target) for node in graph_module.graph.nodes if node.op == "call_function")
    return [target for target in targets if "localvit" in target]


@pytest.mark.parametrize("grad", [False, True])
def test_compiled(triton_backend, grad):
    """In one graph; its values and gradients are those of torch's layers."""
    torch._dynamo.reset()
    module, x_BNC = Tokens(), tokens().requires_grad_(grad)
    out = torch.compile(module, fullgraph=True, backend="aot_eager")(x_BNC)
    dispatch.set_backend("layers")
    wanted = module(x_BNC)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)  # float64 sums in another order
    if grad:
        found, expected = (torch.autograd.grad(each.square().sum(), x_BNC)[0] for each in (out, wanted))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_recompiled_for_another_backend(triton_backend):
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(Tokens(), fullgraph=True, backend=lambda graph, _: graphs.append(seen(graph)) or graph)
    with torch.no_grad():
        for backend in ("triton", "torch"):
            dispatch.set_backend(backend)
            compiled(tokens())
    assert graphs == [NODES, []]


@pytest.mark.parametrize("dynamic", [False, True])
def test_exported(triton_backend, dynamic):
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)} if dynamic else None,)
    program = torch.export.export(Tokens(), (tokens(),), dynamic_shapes=shapes)
    assert seen(program.graph_module) == NODES
    given = tokens(batch=5 if dynamic else 2)
    torch.testing.assert_close(program.module()(given), Tokens()(given), rtol=0, atol=0)
    dispatch.set_backend("torch")
    program = torch.export.export(Tokens(), (tokens(),))
    assert seen(program.graph_module) == []


@pytest.mark.parametrize("name", OPERATOR_SAMPLES)
def test_meta_device(name):
    """As timm's and our own counts of a model's cost use it."""
    x_BNC, height, width, prefix, parameters, *names = drawn(name, 0)
    there = [each.to("meta") for each in parameters]
    found = FEED_FORWARD(x_BNC.to("meta"), height, width, prefix, there, *names)
    assert found.shape == expected("feed_forward", drawn(name, 0))[0].shape


def test_a_copy_of_a_fused_module_runs_the_operator(triton_backend):
    with torch.no_grad():
        module = Tokens()
        torch.testing.assert_close(copy.deepcopy(module)(tokens()), module(tokens()), rtol=0, atol=0)


def test_triton_is_imported_only_where_a_kernel_runs(tmp_path):
    program = (
        "import sys, torch; from localvit import ops; "
        "one = torch.ones(1); parameters = [torch.ones(1, 1, 1, 1), one, torch.ones(1, 1, 3, 3), one] * 2; "
        "torch.ops.localvit.feed_forward(torch.ones(1, 4, 1), 2, 2, 0, parameters[:6], 'hs', 'hs', None); "
        "print(ops.backend(), [name for name in sys.modules if 'localvit.ops.triton.' in name])"
    )
    out, err = tmp_path / "out", tmp_path / "err"
    assert status_of(start(run_source, program, out=out, err=err)) == 0, err.read_text()
    assert out.read_text().strip() == "auto []"


class Halved(SqueezeExcite):
    """Other factors of the same layers."""

    def scale(self, mean_BE):
        return super().scale(mean_BE) / 2


class Doubled(torch.Tensor):
    """A weight that counts twice, as those of quantization and adapters compute something else than they hold."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if "mkldnn" in str(function):
            raise NotImplementedError("of torch's public functions only")
        args = [2 * each.as_subclass(torch.Tensor) if type(each) is cls else each for each in args]
        return function(*args, **(kwargs or {}))


def operator_calls(monkeypatch):
    """The calls of the operator from now on."""
    calls, run = [], operators.run

    def noted(*given):
        calls.append(given)
        return run(*given)

    monkeypatch.setattr(operators, "run", noted)
    return calls


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_weights_that_compute_something_else(backend, number):
    """Of each folded convolution, in place of the operator and of oneDNN's."""
    torch.manual_seed(0)
    fused = LocalityFeedForward(6, 6, reduction=2).eval().fuse().conv
    changed = copy.deepcopy(fused)
    changed[number]._parameters["weight"] = fused[number].weight.detach().as_subclass(Doubled)
    x_BHWC = Draw(3).values(2, 3, 5, 6, dtype=torch.float32)
    with torch.no_grad(), dispatch.use_backend(backend):
        found = changed(x_BHWC)
        fused[number].weight *= 2
        torch.testing.assert_close(found, fused(x_BHWC), rtol=1e-5, atol=1e-5)  # float32 sums in another order


@pytest.mark.parametrize("way", ["subclass", "hook", "no bias", "weight of a subclass", "as written"])
def test_only_known_gates_run_by_the_operator(triton_backend, way, monkeypatch):
    torch.manual_seed(0)
    made = LocalityFeedForward(6, 6, reduction=2, expand_ratio=3, dtype=torch.float64).eval()
    if way == "subclass":
        made.conv[6] = Halved(18, 2, dtype=torch.float64)
    layers = made.conv[6].fc
    if way == "no bias":
        layers[0].bias = None
    fused = made.fuse().conv
    for of in (made, fused):
        fc = next(part for part in of.modules() if isinstance(part, SqueezeExcite)).fc
        if way == "hook":
            fc[1].register_forward_hook(lambda module, inputs, output: 2 * output)
        if way == "weight of a subclass":
            fc[0]._parameters["weight"] = fc[0].weight.detach().as_subclass(Doubled)
    calls = operator_calls(monkeypatch)
    x_BHWC = Draw(3).values(2, 3, 5, 6)
    wanted = made.conv(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(fused(x_BHWC), wanted, rtol=1e-10, atol=1e-10)  # float64 sums in another order
    assert len(calls) == (way == "as written")


FORMS = {"as the paper has it": {}, "stride": {"stride": 2}, "larger neighborhood": {"kernel_size": 5}}
FORMS |= {"depth-wise first": {"dp_first": True}, "no depth-wise convolution": {"wo_dp_conv": True}}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("form", FORMS)
def test_only_the_papers_form_runs_by_the_operator(triton_backend, act, form, monkeypatch):
    torch.manual_seed(0)
    made = LocalityFeedForward(6, 6, act=act, reduction=2, dtype=torch.float64, **FORMS[form]).eval()
    calls = operator_calls(monkeypatch)
    map_BCHW = Draw(3).values(2, 6, 3, 5)
    torch.testing.assert_close(made.fuse()(map_BCHW), made(map_BCHW), rtol=1e-10, atol=1e-10)
    assert len(calls) == (form == "as the paper has it")


class Operations(TorchDispatchMode):
    """The names of torch's operations that compute a value for each position and hidden channel, but for views."""

    def __init__(self, size):
        super().__init__()
        self.size, self.names = size, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() == self.size and not function.is_view:
            self.names.append(function.__name__.removesuffix(".default"))
        return out


def test_without_kernels_no_step_is_an_addition_to_the_hidden_map():
    """The steps that write it: biases are part of the product and of the convolution."""
    module, x_BNC = Tokens(), tokens()
    with torch.no_grad(), Operations(2 * 3 * 5 * 18) as seen_operations:
        module(x_BNC)
    names = ["addmm", "hardswish_", "convolution", "hardswish_", "mul_.Tensor"]
    assert [name for name in seen_operations.names if name != "_unsafe_view"] == names
