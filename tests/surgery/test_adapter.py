"""The adapter: neutral at the start, a depth-wise convolution of the image tokens only, in every precision."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from localvit.surgery.adapter import GATES, NORMS, Adapter, LocalityAdapter
from localvit.surgery.projection import (
    LocalizedProjection,
    accept_state_dicts_without_locality,
    check_projection,
    localized_projections,
    refuse_state_dicts_without_locality,
    remove_locality,
    replace_modules,
)
from localvit.tokens.grid import Grid
from localvit.tokens.layouts import TokenSequence

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
"""float64 sums of at most some hundred terms of order one."""


def localized(projection, channels=13, grid_size=(5, 7), num_prefix_tokens=2, **options):
    torch.manual_seed(3)
    locality = LocalityAdapter(channels, Adapter(**options))
    return LocalizedProjection(projection, locality, TokenSequence(Grid(grid_size), num_prefix_tokens)).double()


def adapted(**options):
    """Returns the hidden tokens with what locality adds."""
    return localized(nn.Identity(), **options)


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
    module = adapted(gate=gate, norm=norm)
    assert module.locality.is_neutral
    for training in (True, False):
        assert torch.equal(module.train(training)(hidden()), hidden())
    assert not shaken(module).locality.is_neutral
    module.locality.make_neutral()
    assert torch.equal(module.eval()(hidden()), hidden())


@pytest.mark.parametrize(("kernel_size", "dilation"), [(1, 1), (3, 1), (5, 1), (3, 2)])
def test_adds_the_convolution_of_the_image_tokens(kernel_size, dilation):
    module = shaken(adapted(kernel_size=kernel_size, dilation=dilation))
    x_BNE = hidden()
    out_BNE = module(x_BNE)
    assert torch.equal(out_BNE[:, :2], x_BNE[:, :2])
    # Each output pixel is the sum over the kernel of weight times the neighbor, written out.
    weight = module.locality.conv.weight[:, 0]
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
    module = shaken(adapted(gate=gate))
    x_BNE = hidden()
    map_BEHW = module.layout.to_map(x_BNE)
    mean_BE = map_BEHW.mean((2, 3))
    if gate == "se":
        first, _, second, _ = module.locality.gate.fc
        scale = F.hardsigmoid(F.linear(F.linear(mean_BE, first.weight, first.bias).relu(), second.weight, second.bias))
    else:
        kernel = module.locality.gate.conv.weight
        logits = F.conv1d(mean_BE[:, None], kernel, padding=kernel.shape[-1] // 2)[:, 0]
        scale = F.hardsigmoid(logits) if gate == "ecah" else logits.sigmoid()
    expected = 2 * scale[:, None] * x_BNE[:, 2:] + module.locality.conv(map_BEHW).flatten(2).transpose(1, 2)
    torch.testing.assert_close(module(x_BNE)[:, 2:], expected, **CLOSE)


def test_norms_normalize_what_the_convolution_reads():
    x_BNE = hidden() * 5 + 3
    image = x_BNE[:, 2:]
    by_channel = (image - image.mean((0, 1))) / (image.var((0, 1), correction=0) + 1e-5).sqrt()
    by_token = (image - image.mean(2, keepdim=True)) / (image.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    for norm, normalized in (("batchnorm", by_channel), ("layernorm", by_token)):
        module = shaken(adapted(norm=norm)).train()
        expected = image + module.locality.conv(normalized.mT.unflatten(2, (5, 7))).flatten(2).mT
        torch.testing.assert_close(module(x_BNE)[:, 2:], expected, **CLOSE)


def test_synchronized_batch_norm_takes_means_too():
    adapter = nn.SyncBatchNorm.convert_sync_batchnorm(LocalityAdapter(4, Adapter(norm="batchnorm")))
    assert adapter.part_with_means == "norm='batchnorm'"


@pytest.mark.parametrize("gate", [None, *GATES])
def test_gradients_reach_all_last_weights_in_the_first_step_and_the_squeeze_in_the_second(gate):
    module = adapted(gate=gate)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    late = {"locality.gate.fc.0.weight", "locality.gate.fc.0.bias"} if gate == "se" else set()
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
        adapted(**options)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02), (torch.float16, 2e-3)])
def test_lower_precision(dtype, tolerance):
    # 2^-24, 2^-9 and 2^-11 of the output's size, times a few operations.
    module = shaken(adapted(gate="se"))
    expected = module(hidden())
    out = copy.deepcopy(module).to(dtype)(hidden().to(dtype))
    assert out.dtype == dtype
    assert (out.double() - expected).norm() <= tolerance * expected.norm()


def test_autocast_on_single_precision_weights():
    module = shaken(adapted()).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(hidden().bfloat16())
    assert (out.double() - module(hidden().float()).double()).norm() <= 0.02 * out.double().norm()


def test_sliced_and_strided_tokens_give_the_same():
    module = shaken(adapted(gate="se"))
    wide = torch.randn(3, 60, 26, dtype=torch.float64)
    sliced = wide[:, 3:40, ::2]
    torch.testing.assert_close(module(sliced), module(sliced.contiguous()), **CLOSE)


def test_parameters_off_the_meta_device_start_neutral():
    """`to_empty` leaves whatever was in the memory; the file of the original has no values for the adapter."""
    options = {"gate": "se", "norm": "batchnorm", "reduction": 3}
    torch.full((10**6,), 7.0)  # So that recycled memory is not zero by chance.
    adapter = LocalityAdapter(13, Adapter(**options), device="meta").to_empty(device="cpu")
    assert adapter.is_neutral
    assert not adapter.eval()(torch.randn(2, 13, 3, 5)).any()
    bound = 1 / 13**0.5  # Of torch's own initialization of a linear layer.
    assert 0 < adapter.gate.fc[0].weight.abs().max() <= bound


class Norm(nn.Module):
    """A projection of a class of its own: it has submodules, a constant, a property and a method, and can fuse."""

    shift = 0.25

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(13, 4)
        self.bn = nn.BatchNorm1d(4)

    @property
    def scale(self):
        return 2 + self.shift

    def normalize(self, x_BNC):
        return self.bn(x_BNC.flatten(0, 1)).view(x_BNC.shape)

    def forward(self, x_BNC):
        return self.scale * self.normalize(self.linear(x_BNC))

    def fuse(self):
        factor = self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt()
        fused = nn.Linear(13, 4).double()
        with torch.no_grad():
            fused.weight.copy_(self.scale * factor[:, None] * self.linear.weight)
            fused.bias.copy_(self.scale * (factor * (self.linear.bias - self.bn.running_mean) + self.bn.bias))
        return fused


@pytest.mark.parametrize("make", [lambda: nn.Linear(13, 4), Norm])
def test_projects_the_tokens_with_locality(make):
    torch.manual_seed(0)
    projection = make().double()
    own, expected_keys = dict(projection.named_parameters()), list(projection.state_dict())
    handle = projection.register_forward_hook(lambda module, args, out: out + 1)
    module = localized(projection, kernel_size=5)
    nn.init.normal_(module.locality.conv.weight)
    tokens = adapted(kernel_size=5)
    tokens.locality.load_state_dict(module.locality.state_dict())
    for training in (False, True):
        module.train(training), projection.train(training)
        twin = copy.deepcopy(projection)  # Its batch norm counts this batch, too.
        torch.testing.assert_close(module(hidden()), twin(tokens(hidden())), **CLOSE)
    handle.remove()
    twin = copy.deepcopy(projection).eval()
    torch.testing.assert_close(module.eval()(hidden()), twin(tokens(hidden())), **CLOSE)
    assert all(dict(module.named_parameters())[name] is parameter for name, parameter in own.items())
    assert list(module.state_dict()) == [*expected_keys, "locality.conv.weight"]
    assert not isinstance(module, type(projection))
    plain = module.projection()
    assert type(plain) is type(projection)
    assert list(plain.state_dict()) == expected_keys
    assert torch.equal(plain(hidden()), twin(hidden()))
    folded = module.fuse()
    torch.testing.assert_close(folded(hidden()), module(hidden()), **CLOSE)
    assert (folded is module) == isinstance(projection, nn.Linear)


class Mixed(nn.Linear):
    def forward(self, x):
        return super().forward(x)


def wrapped():
    projection = nn.Linear(13, 4)
    projection.forward = partial(projection.forward)
    return projection


def taken():
    projection = nn.Linear(13, 4)
    projection.layout = "rows"
    return projection


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (wrapped, r"another library has wrapped the forward of mlp.fc2 \(Linear\): localize the model before it does"),
        (lambda: Mixed(13, 4), r"the forward of mlp.fc2 \(Mixed\) calls super\(\)"),
        (taken, r"mlp.fc2 \(Linear\) has an attribute layout of its own"),
    ],
)
def test_projections_that_cannot_be_localized(make, message):
    with pytest.raises(ValueError, match=message):
        check_projection(make(), "mlp.fc2")


def test_a_module_by_itself_cannot_be_localized():
    with pytest.raises(ValueError, match="is the model itself"):
        check_projection(nn.Linear(13, 4), "")


def test_replaced_at_every_place_and_back():
    first, second = nn.Linear(13, 13).double(), nn.Linear(13, 13).double()
    host = nn.Sequential(first, nn.Sequential(second, first))
    expected = host(hidden())
    replace_modules(host, {first: shaken(localized(first))})
    assert list(localized_projections(host)) == ["0"]
    assert host[0] is host[1][1]
    assert host[1][0] is second
    assert not torch.allclose(host(hidden()), expected)
    remove_locality(host)
    assert host[0] is host[1][1]
    assert torch.equal(host(hidden()), nn.Sequential(host[0], second, host[0])(hidden()))
    assert not localized_projections(host)


def test_a_state_dict_with_some_of_the_adapters_is_refused():
    host = nn.Sequential(nn.Linear(13, 13), nn.Linear(13, 13)).double()
    original = {key: value.clone() for key, value in host.state_dict().items()}
    replace_modules(host, {projection: shaken(localized(projection)) for projection in host})
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*0\.locality\.conv\.weight"):
        host.load_state_dict(original, strict=True)
    accept_state_dicts_without_locality(host)
    kept = {key: value.clone() for key, value in host.state_dict().items()}
    host.load_state_dict(original, strict=True)
    same = {key: torch.equal(value, kept[key]) for key, value in host.state_dict().items()}
    assert all(same[key] for key in same if ".locality." in key)
    partial = {key: value for key, value in kept.items() if not key.startswith("1.locality")}
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*1\.locality\.conv\.weight"):
        host.load_state_dict(partial, strict=True)
    refuse_state_dicts_without_locality(host)
    with pytest.raises(RuntimeError, match="Missing key"):
        host.load_state_dict(original, strict=True)
