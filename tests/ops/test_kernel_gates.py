"""Gates that the kernels' training step computes: what autograd gives of their layers, and which gates are known."""

import pytest
import torch
from torch import nn

from localvit.locality import EfficientChannelAttention, SqueezeExcite
from localvit.ops.kernel_gates import KNOWN, LayersGate, gate_of, known_gate


@pytest.mark.parametrize("channels", [3, 37, 701])  # of kernel sizes 1, 3 and 5
@pytest.mark.parametrize("hard", [False, True])
def test_eca_equals_its_layers(hard, channels):
    torch.manual_seed(channels)
    gate = EfficientChannelAttention(channels, hard=hard, dtype=torch.float64)
    mean_BE = 3 * torch.randn(5, channels, dtype=torch.float64)
    grad_TBE = torch.randn(2, 5, channels, dtype=torch.float64)
    mean_BE.requires_grad_()
    scale_BE = gate.scale(mean_BE)
    wanted = torch.autograd.grad(scale_BE, [mean_BE, gate.conv.weight], grad_TBE.sum(0))
    name, parameters = known_gate(gate)
    assert name == ("ecah" if hard else "eca")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # which must not round anything
        torch.testing.assert_close(KNOWN[name].factors(5 * mean_BE, 5, parameters), scale_BE, rtol=1e-12, atol=1e-12)
        grad_mean_BE, (grad_weight,) = KNOWN[name].backward(mean_BE, parameters, grad_TBE)
    torch.testing.assert_close(grad_mean_BE, wanted[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_weight, wanted[1], rtol=1e-12, atol=1e-12)


def test_wide_squeeze_and_excitation_equals_its_layers():
    """Wider than what a kernel computes."""
    torch.manual_seed(0)
    gate = SqueezeExcite(145, 2, dtype=torch.float64)
    mean_BE = 3 * torch.randn(5, 145, dtype=torch.float64)
    grad_TBE = torch.randn(2, 5, 145, dtype=torch.float64)
    mean_BE.requires_grad_()
    scale_BE = gate.scale(mean_BE)
    wanted = torch.autograd.grad(scale_BE, [mean_BE, *gate.parameters()], grad_TBE.sum(0))
    name, parameters = known_gate(gate)
    assert (name, len(parameters[1])) == ("se", 72)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # which must not round anything
        factors_BE = KNOWN[name].factors(5 * mean_BE, 5, parameters)
        torch.testing.assert_close(factors_BE, scale_BE, rtol=1e-12, atol=1e-12)
        grad_mean_BE, gradients = KNOWN[name].backward(mean_BE, parameters, grad_TBE)
    for found, each in zip((grad_mean_BE, *gradients), wanted, strict=True):
        torch.testing.assert_close(found, each, rtol=1e-12, atol=1e-12)


class Doubled(EfficientChannelAttention):
    """Other factors of the same layers."""

    def scale(self, mean_BE):
        return super().scale(mean_BE) * 2


def with_hook(gate):
    gate.conv.register_forward_hook(lambda module, inputs, output: 2 * output)


def with_bias(gate):
    gate.conv = nn.Conv1d(1, 1, 3, padding=1)


def shifted(gate):
    gate.conv = nn.Conv1d(1, 1, 3, padding=2, bias=False)


def dilated(gate):
    gate.conv = nn.Conv1d(1, 1, 3, padding=1, dilation=2, bias=False)


def circular(gate):
    gate.conv = nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular", bias=False)


def with_tanh(gate):
    gate.gate = nn.Tanh()


CHANGES = [with_hook, with_bias, shifted, dilated, circular, with_tanh]


@pytest.mark.parametrize("change", CHANGES, ids=lambda each: each.__name__)
def test_changed_gates_run_as_they_are(change):
    gate = EfficientChannelAttention(37, hard=False)
    assert known_gate(gate)[0] == "eca"
    change(gate)
    assert known_gate(gate) is None
    assert type(gate_of(gate)[0]) is LayersGate


def test_gates_of_subclasses_run_as_they_are():
    assert known_gate(Doubled(37, hard=False)) is None
    assert known_gate(SqueezeExcite(37, 4))[0] == "se"
