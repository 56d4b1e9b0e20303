"""The registered operators: gradients, what torch.compile and torch.export see, and the switch."""

import launches
import pytest
import torch
from torch import nn

from localvit.ops import dispatch, operators, reference, use_backend
from localvit.ops.activations import ACTIVATIONS
from processes import run_source, start, status_of

SIZE = (2, 3, 5, 4)
OPERATORS = torch.ops.localvit


@pytest.fixture
def triton_backend():
    pytest.importorskip("triton", reason="Triton is not installed")
    with use_backend("triton"):
        yield


def sample(operator, seed=0, dtype=torch.float64):
    given = launches.arguments(launches.Draw(seed), operator, SIZE, dtype)
    return [each.requires_grad_(operator != "norm_act_depthwise_backward") for each in given]


@pytest.mark.parametrize("operator", ["depthwise_act_pool", "norm_act_depthwise"])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("registered", [False, True])
def test_gradients(operator, act, registered):
    form = getattr(OPERATORS if registered else reference, operator)
    for seed in range(3):
        assert torch.autograd.gradcheck(lambda *given: form(*given, act), sample(operator, seed))


def test_gradients_of_gradients():
    """Of the inference operator; the training pair has none, and says so."""
    assert torch.autograd.gradgradcheck(
        lambda *given: OPERATORS.depthwise_act_pool(*given, "hs"), sample("depthwise_act_pool")
    )
    given = sample("norm_act_depthwise")
    out, *_ = OPERATORS.norm_act_depthwise(*given, "hs")
    (grad,) = torch.autograd.grad(out.sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


@pytest.mark.parametrize("registered", [False, True])
def test_no_gradient_flows_through_the_moments(registered):
    form = OPERATORS.norm_act_depthwise if registered else reference.norm_act_depthwise
    out, mean, variance = form(*sample("norm_act_depthwise"), "hs")
    assert [each.requires_grad for each in (out, mean, variance)] == [True, False, False]


def test_batch_norms_backward_pass():
    """The docstring's formula, for a batch norm before the activation, against torch's own."""
    grad, z, _, _, weight, _ = launches.arguments(
        launches.Draw(5), "norm_act_depthwise_backward", (3, 5, 7, 11), torch.float64
    )
    norm = nn.BatchNorm2d(11, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    z = (z + 3).requires_grad_()
    out = launches.convolution(launches.activation(norm(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), "hs"), weight)
    wanted = torch.autograd.grad(out, (z, norm.weight, norm.bias), grad)

    variance, mean = torch.var_mean(z.detach(), (0, 1, 2), correction=0)
    root = (variance + norm.eps).sqrt()
    scale = norm.weight.detach() / root
    shift = norm.bias.detach() - mean * scale
    grad_u, _, sums = operators.norm_act_depthwise_backward(grad, z.detach(), scale, shift, weight, mean, "hs")
    places = 3 * 5 * 7
    by_formula = scale * (grad_u - sums[0] / places - (z.detach() - mean) * sums[1] / (places * root**2))
    for found, expected in zip((by_formula, sums[1] / root, sums[0]), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)  # float64 sums in another order


@pytest.mark.parametrize("operator", launches.MODULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_registration(operator, dtype):
    """Schema, fake and autograd registrations, and ahead-of-time dispatch, by torch's own check."""
    for seed in range(3):
        torch.library.opcheck(getattr(OPERATORS, operator).default, (*sample(operator, seed, dtype), "hs"))


class Both(nn.Module):
    """Both differentiable operators, one after the other."""

    def forward(self, x_BHWE, weight_E33, scale_E, shift_E):
        chosen = operators if dispatch.use_operators() else reference
        out_BHWE, mean_E, variance_E = chosen.norm_act_depthwise(x_BHWE, scale_E, shift_E, weight_E33, "hs")
        out_BHWE = (out_BHWE - mean_E) * (variance_E + 1e-5).rsqrt()
        y_BHWE, sum_BE = chosen.depthwise_act_pool(out_BHWE, weight_E33, shift_E, "relu6")
        return y_BHWE * sum_BE[:, None, None]


def both_arguments(batch=2):
    draw = launches.Draw(3)
    tokens_BNE = draw.values(batch, 1 + 15, 4)
    values = tokens_BNE, draw.values(4, 3, 3), draw.values(4), draw.values(4)
    x_BHWE = values[0].requires_grad_()[:, 1:].unflatten(1, (3, 5))
    return (x_BHWE, *(each.requires_grad_() for each in values[1:])), values


def targets(graph_module):
    return {str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"}


def test_compiled(triton_backend):
    """In one graph; its values and gradients are those of the reference."""
    found, wanted = [], []
    for results, on in ((found, True), (wanted, False)):
        dispatch.set_backend("triton" if on else "torch")
        given, leaves = both_arguments()
        module = Both()
        out = torch.compile(module, fullgraph=True, backend="aot_eager")(*given) if on else module(*given)
        results += [out, *torch.autograd.grad(out.square().sum(), leaves)]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)  # float64 sums in another order


def test_recompiled_for_another_backend(triton_backend):
    graphs = []
    compiled = torch.compile(Both(), fullgraph=True, backend=lambda graph, _: graphs.append(targets(graph)) or graph)
    for backend in ("triton", "torch"):
        dispatch.set_backend(backend)
        compiled(*both_arguments()[0])
    seen = [{name for name in graph if "localvit" in name} for graph in graphs]
    assert seen == [{"localvit.depthwise_act_pool.default", "localvit.norm_act_depthwise.default"}, set()]


@pytest.mark.parametrize("dynamic", [False, True])
def test_exported(triton_backend, dynamic):
    given = [each.detach() for each in both_arguments()[0]]
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)} if dynamic else None, None, None, None)
    program = torch.export.export(Both(), tuple(given), dynamic_shapes=shapes)
    assert {
        "localvit.depthwise_act_pool.default",
        "localvit.norm_act_depthwise.default",
    } <= targets(program.graph_module)
    given = [each.detach() for each in both_arguments(batch=5 if dynamic else 2)[0]]
    torch.testing.assert_close(program.module()(*given), Both()(*given), rtol=0, atol=0)
    dispatch.set_backend("torch")
    program = torch.export.export(Both(), tuple(given))
    assert not any("localvit" in name for name in targets(program.graph_module))


def test_meta_device():
    """As timm's and our own counts of a model's cost use it."""
    given = [each.detach().to("meta") for each in sample("norm_act_depthwise")]
    out, mean, variance = OPERATORS.norm_act_depthwise(*given, "hs")
    assert (out.shape, mean.shape, variance.shape) == (SIZE, SIZE[3:], SIZE[3:])


def test_triton_is_imported_only_where_a_kernel_runs(tmp_path):
    program = (
        "import sys, torch; from localvit import ops; "
        "torch.ops.localvit.depthwise_act_pool(torch.ones(1, 2, 2, 1), torch.ones(1, 3, 3), torch.ones(1), 'hs'); "
        "print(ops.backend(), [name for name in sys.modules if 'localvit.ops.triton.' in name])"
    )
    out, err = tmp_path / "out", tmp_path / "err"
    assert status_of(start(run_source, program, out=out, err=err)) == 0, err.read_text()
    assert out.read_text().strip() == "torch []"
