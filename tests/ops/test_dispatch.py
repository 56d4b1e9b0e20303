"""The faster paths compute what the layers compute, or step aside; and the switch between backends."""

import copy
from importlib.util import find_spec, module_from_spec
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from launches import autograd_steps
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations

from localvit import LocalityFeedForward, ops
from localvit.locality import ACTS, SqueezeExcite
from localvit.ops import dispatch
from localvit.ops.stages import stages_of

CLOSE = {"rtol": 1e-10, "atol": 1e-11}
"""float64, whose sums the paths take in other orders."""


class Layers(nn.Sequential):
    """The same layers, which run one by one: only a plain nn.Sequential takes a faster path."""


def module(**arguments):
    torch.manual_seed(0)
    made = LocalityFeedForward(6, 6, reduction=2, expand_ratio=3, dtype=torch.float64, **arguments)
    with torch.no_grad():
        for entry in (*made.parameters(), *made.buffers()):
            if entry.is_floating_point():
                entry.add_(0.3 * torch.randn_like(entry).abs())
    return made


def image(batch=3):
    return 2 * torch.randn(batch, 6, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def recomputes(out):
    return "_NormActConvBackward" in autograd_steps(out)


class FakeQuantized(nn.Conv2d):
    """A convolution whose weight is rounded on the way, as quantization-aware training does it."""

    def forward(self, x):
        return self._conv_forward(x, (self.weight * 8).round() / 8, self.bias)


class LowRank(nn.Conv2d):
    """A convolution with a trained low-rank update beside its weight."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.update = nn.Parameter(torch.full_like(self.weight, 0.1))

    def forward(self, x):
        return super().forward(x) + self._conv_forward(x, self.update, None)


class OtherGate(SqueezeExcite):
    """A gate that overrides what is done with the factors."""

    def forward(self, map_BEHW):
        return map_BEHW + self.scale(map_BEHW.mean((2, 3)))[:, :, None, None]


class RandomNorm(nn.BatchNorm2d):
    """A norm that adds something of its own."""

    def forward(self, x):
        return super().forward(x) + 1


def replaced_by(kind):
    def change(conv, index):
        old = conv[index]
        conv[index] = kind(
            *(old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, old.dilation, old.groups),
            bias=False,
            dtype=torch.float64,
        )
        with torch.no_grad():
            conv[index].weight.copy_(old.weight)

    return change


def swap(layer):
    def change(conv, index):
        conv[index] = layer()

    return change


def with_bias(conv, index):
    conv[index].bias = nn.Parameter(torch.full((conv[index].out_channels,), 0.7, dtype=torch.float64))


def dilated(conv, index):
    conv[index].dilation = conv[index].padding = (2, 2)


def reflecting(conv, index):
    old = conv[index]
    new = nn.Conv2d(18, 18, 3, padding=1, groups=18, bias=False, padding_mode="reflect", dtype=torch.float64)
    new.weight = old.weight
    conv[index] = new


def parametrized(conv, index):
    parametrizations.weight_norm(conv[index])


def with_dropout(conv, index):
    conv[index].fc.insert(2, nn.Dropout(0.0))


def own_forward(conv, index):
    conv[index].forward = lambda x: 2 * x


def with_a_layer_more(conv, index):
    conv.append(nn.Dropout(0.0))


# Layers of the module: 0 conv, 1 norm, 2 activation, 3 conv, 4 norm, 5 activation, 6 gate, 7 conv, 8 norm.
CHANGES = {
    "GELU": (swap(nn.GELU), 2),
    "GELU, second": (swap(nn.GELU), 5),
    "ReLU6 of another range": (swap(lambda: nn.Hardtanh(0.0, 3.0)), 2),
    "LeakyReLU": (swap(nn.LeakyReLU), 5),
    "fake quantization, pointwise": (replaced_by(FakeQuantized), 0),
    "fake quantization, depth-wise": (replaced_by(FakeQuantized), 3),
    "fake quantization, projection": (replaced_by(FakeQuantized), 7),
    "low-rank update": (replaced_by(LowRank), 7),
    "bias": (with_bias, 0),
    "bias, depth-wise": (with_bias, 3),
    "dilation": (dilated, 3),
    "reflection padding": (reflecting, 3),
    "weight norm": (parametrized, 0),
    "group norm": (swap(lambda: nn.GroupNorm(3, 18, dtype=torch.float64)), 4),
    "norm of a subclass": (swap(lambda: RandomNorm(18, dtype=torch.float64)), 1),
    "no last norm": (swap(nn.Identity), 8),
    "gate of a subclass": (swap(lambda: OtherGate(18, 2, dtype=torch.float64)), 6),
    "no gate": (swap(nn.Identity), 6),
    "dropout in the gate": (with_dropout, 6),
    "own forward": (own_forward, 5),
    "a layer more": (with_a_layer_more, 0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_layers_run_as_they_are(name):
    change, index = CHANGES[name]
    changed = module().train()
    change(changed.conv, index)
    layers = Layers(*changed.conv)
    map_BCHW = image()
    statistics = copy.deepcopy(changed.state_dict())
    out = changed(map_BCHW)
    assert not recomputes(out)
    changed.load_state_dict(statistics)
    torch.testing.assert_close(out, map_BCHW + layers(map_BCHW), rtol=0, atol=0)
    changed.eval()
    torch.testing.assert_close(changed(map_BCHW), map_BCHW + layers(map_BCHW), rtol=0, atol=0)
    torch.testing.assert_close(changed.fuse()(map_BCHW), map_BCHW + layers(map_BCHW), **CLOSE)


def test_the_unchanged_module_does_take_the_faster_paths():
    """The negative control of the test above."""
    assert recomputes(module().train()(image()))
    assert type(module().eval().fuse()) is ops.FusedFeedForward


HOOKS = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]


@pytest.mark.parametrize("name", ["conv", "conv.3", "conv.6", "conv.6.fc.0"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_on_a_layer_see_it_run_once(hook, name):
    hooked, seen = module().train(), []
    layer = hooked.get_submodule(name)
    getattr(layer, f"register_{hook}")(lambda *_: seen.append(hook))
    out = hooked(image().requires_grad_())
    out.sum().backward()
    assert seen == [hook]
    seen.clear()
    hooked.eval().fuse()(image().requires_grad_()).sum().backward()
    assert seen == [hook]


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_on_all_modules_see_every_layer_run(hook):
    seen = set()
    trained = module().train()
    handle = getattr(torch_module, f"register_module_{hook}")(lambda layer, *_: seen.add(layer) or None)
    try:
        trained(image().requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert set(trained.conv) <= seen
    assert recomputes(trained(image()))


@pytest.mark.parametrize("statistics", ["cumulative", "none", "frozen"])
def test_norms_of_other_statistics_run_as_they_are(statistics):
    changed = module().train()
    norm = changed.conv[4]
    if statistics == "cumulative":
        norm.momentum = None
    elif statistics == "none":
        changed.conv[4] = nn.BatchNorm2d(18, track_running_stats=False, dtype=torch.float64)
    else:
        norm.eval()
    layers = Layers(*copy.deepcopy(changed.conv))
    map_BCHW = image()
    out = changed(map_BCHW)
    assert not recomputes(out)
    torch.testing.assert_close(out, map_BCHW + layers(map_BCHW), rtol=0, atol=0)
    changed.eval()
    if statistics == "frozen":
        changed.conv[4].train()  # one norm of a module in evaluation mode
    assert changed.fuse()(map_BCHW).isfinite().all()
    if statistics != "cumulative":
        assert changed.fuse() is changed


def test_a_single_value_per_channel_is_refused_as_torch_refuses_it():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module().train()(torch.randn(1, 6, 1, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module(stride=2).train()(torch.randn(1, 6, 2, 2, dtype=torch.float64))


def test_function_transforms_see_the_layers():
    trained = module().train()
    parameters = {name: value.detach() for name, value in trained.named_parameters()}
    map_BCHW = image()

    def loss(values):
        return torch.func.functional_call(copy.deepcopy(trained), values, (map_BCHW,)).square().mean()

    gradients = torch.func.grad(loss)(parameters)
    (trained(map_BCHW).square().mean()).backward()
    for name, value in trained.named_parameters():
        torch.testing.assert_close(gradients[name], value.grad, **CLOSE)


def test_forward_mode_differentiation_sees_the_layers():
    trained = module().train()
    map_BCHW, direction = image(), image(batch=3).flip(0)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(trained(forward_ad.make_dual(map_BCHW, direction))).tangent
    step = 1e-6
    there, back = (trained(map_BCHW + sign * step * direction) for sign in (1, -1))
    # A central difference: its error is step^2, and 1e-16 / step from rounding.
    torch.testing.assert_close(tangent, (there - back) / (2 * step), rtol=1e-6, atol=1e-6)


def test_a_subclass_of_the_module_is_not_folded():
    class Doubled(LocalityFeedForward):
        def forward(self, map_BCHW):
            return 2 * super().forward(map_BCHW)

    made = Doubled(6, 6, reduction=2, dtype=torch.float64).eval()
    torch.testing.assert_close(made.fuse()(image()), made(image()), rtol=0, atol=0)


@pytest.mark.parametrize("backend", get_args(dispatch.Backend))
def test_backends_give_the_same(backend):
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    expected = module().train()
    map_BCHW = image()
    out = map_BCHW + Layers(*copy.deepcopy(expected.conv))(map_BCHW)
    before = ops.backend()
    with ops.use_backend(backend):
        assert ops.backend() == backend
        found = module().train()(map_BCHW)
    assert recomputes(found) == (backend != "layers")
    torch.testing.assert_close(found, out, **CLOSE)
    assert ops.backend() == before


def test_a_context_ends_where_its_block_raises():
    with pytest.raises(KeyError), ops.use_backend("layers"):
        raise KeyError
    assert ops.backend() == "auto"


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend='cuda' is not known; choose one of auto, layers, torch, triton"):
        ops.set_backend("cuda")
    assert ops.backend() == "auto"


def test_triton_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("localvit.ops.dispatch.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install triton"):
        ops.set_backend("triton")
    assert ops.backend() == "auto"


def test_the_environment_sets_the_backend(monkeypatch):
    """Where it is read, when the module is imported: a copy of it is."""
    spec = find_spec("localvit.ops.dispatch")
    monkeypatch.setenv("LOCALVIT_BACKEND", "layers")
    imported = module_from_spec(spec)
    spec.loader.exec_module(imported)
    assert imported.backend() == "layers"
    monkeypatch.setenv("LOCALVIT_BACKEND", "fast")
    with pytest.raises(ValueError, match="LOCALVIT_BACKEND='fast' is not known"):
        spec.loader.exec_module(module_from_spec(spec))


FORMS = {
    "as the paper has it": ({}, True),
    "depth-wise first": ({"dp_first": True}, False),
    "no depth-wise convolution": ({"wo_dp_conv": True}, False),
    "stride": ({"stride": 2}, False),
    "larger neighborhood": ({"kernel_size": 5}, False),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", ["bfloat16", "autocast"])
def test_only_the_papers_form_trains_by_the_kernels(act, form, way, monkeypatch):
    """The rule alone, where no GPU is: the kernels read depth-wise 3x3 convolutions between 1x1 convolutions."""
    monkeypatch.setattr(dispatch, "_has_kernels", lambda device, dtype: dtype in dispatch.KERNEL_DTYPES)
    arguments, fits = FORMS[form]
    made = module(act=act, **arguments).to(torch.bfloat16 if way == "bfloat16" else torch.float32)
    map_BCHW = image().to(made.conv[0].weight.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        assert dispatch.fits_kernels(stages_of(made.conv), map_BCHW) == (torch.bfloat16 if fits else None)
        assert dispatch.fits_kernels(stages_of(made.conv), map_BCHW.double()) is None
    if way == "bfloat16":
        assert dispatch.fits_kernels(stages_of(made.conv), map_BCHW.float()) is None
    else:
        assert dispatch.fits_kernels(stages_of(made.conv), map_BCHW) is None


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_statistics_between_other_values_are_not_written_by_the_kernels(name, monkeypatch):
    """Such as each second value of a vector: kernels write values that lie one behind the other."""
    monkeypatch.setattr(dispatch, "_has_kernels", lambda device, dtype: dtype in dispatch.KERNEL_DTYPES)
    made = module().to(torch.bfloat16)
    setattr(made.conv[4], name, torch.ones(2 * made.conv[4].num_features)[::2])
    assert dispatch.fits_kernels(stages_of(made.conv), image().bfloat16()) is None


def test_norms_over_several_processes_train_by_the_kernels_or_layer_by_layer(monkeypatch):
    made = nn.SyncBatchNorm.convert_sync_batchnorm(module().to(torch.bfloat16))
    map_BCHW = image().bfloat16()
    assert dispatch.training_path(made.conv, map_BCHW) is None
    monkeypatch.setattr(dispatch, "_has_kernels", lambda device, dtype: dtype in dispatch.KERNEL_DTYPES)
    stages, dtype = dispatch.training_path(made.conv, map_BCHW)
    assert stages == stages_of(made.conv)
    assert dtype == torch.bfloat16
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert dispatch.training_path(made.conv, map_BCHW) is None


GPU = {"name": "H100", "major": 9, "minor": 0, "shared_memory_per_block_optin": 227 * 1024}
MISSING = {
    "AMD": ({}, {"hip": "6.2"}, "they are made for NVIDIA GPUs"),
    "no Triton": ({}, {"triton": False}, "Triton is not installed"),
    "old": (
        {"name": "V100", "major": 7},
        {},
        "V100 has compute capability 7.0 and 227 KB of shared memory for a block",
    ),
    "older": (
        {"name": "T4", "major": 7, "minor": 5, "shared_memory_per_block_optin": 64 * 1024},
        {},
        "T4 has compute capability 7.5 and 64 KB of shared memory for a block; they need 8.0 and 81 KB",
    ),
    "small": (
        {"major": 8, "minor": 6, "shared_memory_per_block_optin": 64 * 1024},
        {},
        "8.6 and 64 KB",
    ),
    "99 KB": ({"name": "RTX 4090", "major": 8, "minor": 9, "shared_memory_per_block_optin": 99 * 1024}, {}, None),
    "nothing": ({}, {}, None),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_the_kernels_need_of_a_gpu_is_logged_once(name, monkeypatch, caplog):
    """Where it is missing, plain torch runs."""
    properties, machine, message = MISSING[name]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(**GPU | properties))
    monkeypatch.setattr(torch.version, "hip", machine.get("hip"))
    monkeypatch.setattr(dispatch, "find_spec", lambda package: machine.get("triton", True) or None)
    dispatch._missing_for_kernels.cache_clear()
    try:
        with caplog.at_level("INFO", logger="localvit"):
            found = [dispatch._has_kernels(torch.device("cuda", 3), torch.bfloat16) for _ in range(3)]
    finally:
        dispatch._missing_for_kernels.cache_clear()
    assert found == [message is None] * 3
    assert len(caplog.messages) == (message is not None)
    assert message is None or message in caplog.text


def test_stages_are_read_in_order():
    stages = stages_of(module().conv)
    assert [(stage.act, stage.gate is None, stage.conv.groups) for stage in stages.stages] == [
        ("hs", True, 18),
        ("hs", False, 1),
    ]
    assert stages_of(nn.Sequential()) is None
    assert stages_of(nn.Sequential(nn.Conv2d(3, 3, 1, bias=False))) is None
