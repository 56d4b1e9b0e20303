"""The adapter: neutral at the start, a depth-wise convolution of the image tokens only, in every precision."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from localvit.surgery.adapter import (
    GATES,
    NORMS,
    Adapter,
    LocalityAdapter,
    accept_state_dicts_without_adapters,
    attach,
    check_attachable,
    detach,
    refuse_state_dicts_without_adapters,
)
from localvit.tokens.grid import Grid
from localvit.tokens.layouts import TokenSequence

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
"""float64 sums of at most some hundred terms of order one."""


def adapter(channels=13, grid_size=(5, 7), num_prefix_tokens=2, **options):
    torch.manual_seed(3)
    return LocalityAdapter(channels, TokenSequence(Grid(grid_size), num_prefix_tokens), Adapter(**options)).double()


def hidden(batch=3, count=2 + 5 * 7, channels=13, seed=0):
    return torch.randn(batch, count, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaken(module):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
    return module


@pytest.mark.parametrize("gate", [None, *GATES])
@pytest.mark.parametrize("norm", [None, *NORMS])
def test_starts_neutral_bit_exactly(gate, norm):
    module = adapter(gate=gate, norm=norm)
    assert module.is_neutral
    for training in (True, False):
        assert torch.equal(module.train(training)(hidden()), hidden())
    assert not shaken(module).is_neutral
    module.make_neutral()
    assert torch.equal(module.eval()(hidden()), hidden())


@pytest.mark.parametrize(("kernel_size", "dilation"), [(1, 1), (3, 1), (5, 1), (3, 2)])
def test_adds_the_convolution_of_the_image_tokens(kernel_size, dilation):
    module = shaken(adapter(kernel_size=kernel_size, dilation=dilation))
    x_BNE = hidden()
    out_BNE = module(x_BNE)
    assert torch.equal(out_BNE[:, :2], x_BNE[:, :2])
    # Each output pixel is the sum over the kernel of weight times the neighbor, written out.
    weight = module.conv.weight[:, 0]
    reach = kernel_size // 2
    for row, column in ((0, 0), (2, 3), (4, 6)):
        expected = x_BNE[:, 2 + row * 7 + column].clone()
        for i in range(kernel_size):
            for j in range(kernel_size):
                y, x = row + (i - reach) * dilation, column + (j - reach) * dilation
                if 0 <= y < 5 and 0 <= x < 7:
                    expected += weight[:, i, j] * x_BNE[:, 2 + y * 7 + x]
        torch.testing.assert_close(out_BNE[:, 2 + row * 7 + column], expected, **CLOSE)


@pytest.mark.parametrize("gate", GATES)
def test_gate_scales_the_image_tokens_by_twice_its_sigmoid(gate):
    module = shaken(adapter(gate=gate))
    x_BNE = hidden()
    map_BEHW = module.layout.to_map(x_BNE)
    mean_BE = map_BEHW.mean((2, 3))
    if gate == "se":
        first, _, second, _ = module.gate.fc
        scale = F.hardsigmoid(F.linear(F.linear(mean_BE, first.weight, first.bias).relu(), second.weight, second.bias))
    else:
        kernel = module.gate.conv.weight
        logits = F.conv1d(mean_BE[:, None], kernel, padding=kernel.shape[-1] // 2)[:, 0]
        scale = F.hardsigmoid(logits) if gate == "ecah" else logits.sigmoid()
    expected = 2 * scale[:, None] * x_BNE[:, 2:] + module.conv(map_BEHW).flatten(2).transpose(1, 2)
    torch.testing.assert_close(module(x_BNE)[:, 2:], expected, **CLOSE)


def test_norms_normalize_what_the_convolution_reads():
    x_BNE = hidden() * 5 + 3
    image = x_BNE[:, 2:]
    by_channel = (image - image.mean((0, 1))) / (image.var((0, 1), correction=0) + 1e-5).sqrt()
    by_token = (image - image.mean(2, keepdim=True)) / (image.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    for norm, normalized in (("batchnorm", by_channel), ("layernorm", by_token)):
        module = shaken(adapter(norm=norm)).train()
        expected = image + module.conv(normalized.mT.unflatten(2, (5, 7))).flatten(2).mT
        torch.testing.assert_close(module(x_BNE)[:, 2:], expected, **CLOSE)


@pytest.mark.parametrize("gate", [None, *GATES])
def test_gradients_reach_all_last_weights_in_the_first_step_and_the_squeeze_in_the_second(gate):
    module = adapter(gate=gate)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    late = {"gate.fc.0.weight", "gate.fc.0.bias"} if gate == "se" else set()
    for step in range(2):
        optimizer.zero_grad()
        module(hidden()).pow(3).sum().backward()
        without = {name for name, parameter in module.named_parameters() if not parameter.grad.any()}
        assert without == (late if step == 0 else set())
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "kernel_size=4 must be odd"),
        ({"kernel_size": -1}, "kernel_size=-1 must be odd"),
        ({"dilation": 0}, "dilation=0 must be at least 1"),
        ({"gate": "hs+se"}, "gate='hs\\+se' is not known; choose one of se, eca, ecah"),
        ({"norm": "batch"}, "norm='batch' is not known; choose one of batchnorm, layernorm"),
        ({"gate": "se", "reduction": 14}, "reduction=14"),
    ],
)
def test_bad_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        adapter(**options)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02), (torch.float16, 2e-3)])
def test_lower_precision(dtype, tolerance):
    # 2^-24, 2^-9 and 2^-11 of the output's size, times a few operations.
    module = shaken(adapter(gate="se"))
    expected = module(hidden())
    out = copy.deepcopy(module).to(dtype)(hidden().to(dtype))
    assert out.dtype == dtype
    assert (out.double() - expected).norm() <= tolerance * expected.norm()


def test_autocast_on_single_precision_weights():
    module = shaken(adapter()).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(hidden().bfloat16())
    assert (out.double() - module(hidden().float()).double()).norm() <= 0.02 * out.double().norm()


def test_sliced_and_strided_tokens_give_the_same():
    module = shaken(adapter(gate="se"))
    wide = torch.randn(3, 60, 26, dtype=torch.float64)
    sliced = wide[:, 3:40, ::2]
    torch.testing.assert_close(module(sliced), module(sliced.contiguous()), **CLOSE)


def test_attach_and_detach_leave_the_projection_as_it_was():
    projection = nn.Linear(13, 4).double()
    x_BNE, expected = hidden(), None
    expected = projection(x_BNE)
    before = dict(projection.state_dict())
    attach(projection, shaken(adapter()))
    assert not torch.allclose(projection(x_BNE), expected)
    detach(projection)
    assert torch.equal(projection(x_BNE), expected)
    assert projection.state_dict().keys() == before.keys()
    assert "forward" not in vars(projection)
    assert not projection._forward_pre_hooks
    projection.forward = projection.forward
    with pytest.raises(ValueError, match=r"another library has wrapped the forward of mlp.fc2 \(Linear\)"):
        check_attachable(projection, "mlp.fc2")


def test_a_state_dict_with_some_of_the_adapters_is_refused():
    host = nn.Sequential(nn.Linear(13, 13), nn.Linear(13, 13)).double()
    original = {key: value.clone() for key, value in host.state_dict().items()}
    for projection in host:
        attach(projection, shaken(adapter()))
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*0\.locality\.conv\.weight"):
        host.load_state_dict(original, strict=True)
    accept_state_dicts_without_adapters(host)
    kept = {key: value.clone() for key, value in host.state_dict().items()}
    host.load_state_dict(original, strict=True)
    assert all(torch.equal(value, kept[key]) for key, value in host.state_dict().items())
    partial = {key: value for key, value in kept.items() if not key.startswith("1.locality")}
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*1\.locality\.conv\.weight"):
        host.load_state_dict(partial, strict=True)
    refuse_state_dicts_without_adapters(host)
    with pytest.raises(RuntimeError, match="Missing key"):
        host.load_state_dict(original, strict=True)
