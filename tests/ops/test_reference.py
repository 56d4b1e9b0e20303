"""The reference: what torch's functions compute in float64, on every layout and dtype, and clear errors."""

import pytest
import samples
import torch
from launches import Draw, close
from samples import OPERATOR_SAMPLES, SAMPLES, as_tuple, expected, sample

from localvit.ops import reference
from localvit.ops.activations import ACTIVATIONS

GRIDS = [(2, 5, 7, 11), (1, 1, 1, 1), (3, 1, 5, 2), (2, 7, 1, 3), (1, 13, 3, 17)]


def tensors_of(given):
    flat = [each for one in given for each in (one if isinstance(one, list) else [one])]
    return [each for each in flat if isinstance(each, torch.Tensor)]


def compare(operator, given, dtype):
    found = as_tuple(getattr(reference, operator)(*given))
    for number, (one, wanted) in enumerate(zip(found, expected(operator, given), strict=True)):
        close(f"result {number}", one, wanted, dtype)
    return found


@pytest.mark.parametrize("name", [*SAMPLES, *OPERATOR_SAMPLES])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_torchs_functions(name, dtype):
    for seed in range(3):
        compare(*sample(name, Draw(seed), dtype), dtype)


@pytest.mark.parametrize("size", GRIDS, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_grids(size, act):
    for seed in range(3):  # each with another layout of the map
        compare("depthwise_act_pool", samples.depthwise_act_pool(Draw(seed), torch.float64, act, size), torch.float64)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    """The map in its dtype, sums of a map in float32."""
    found = compare(*sample(name, Draw(2), dtype), dtype)
    assert [each.dtype for each in found] == [dtype, torch.float32][: len(found)]


def test_only_the_map_in_half_precision():
    """As autocast gives it: the map in bfloat16, parameters in float32."""
    x, *parameters = samples.depthwise_act_pool(Draw(2), torch.float32, "hs")
    with torch.autocast("cpu", torch.bfloat16):
        y, total = reference.depthwise_act_pool(x.bfloat16(), *parameters)
        in_float32, _ = reference.depthwise_act_pool(x, *parameters)
    assert (y.dtype, total.dtype, in_float32.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_sums_do_not_overflow_half_precision():
    x = torch.full((1, 40, 50, 3), 100.0, dtype=torch.float16)
    weight = torch.zeros(3, 3, 3, dtype=torch.float16)
    weight[:, 1, 1] = 1
    _, total = reference.depthwise_act_pool(x, weight, torch.zeros(3, dtype=torch.float16), "hs")
    assert torch.equal(total, torch.full((1, 3), 200_000.0))
    # The gate's means are back within range.
    identity, zeros = torch.eye(3, dtype=torch.float16), torch.zeros(3, dtype=torch.float16)
    gate = reference.squeeze_excite(total, 2000, identity / 100, zeros, identity, zeros)
    torch.testing.assert_close(gate, torch.full_like(gate, 1 / 6 + 0.5), rtol=2**-10, atol=0)


@pytest.mark.parametrize("name", [*SAMPLES, *OPERATOR_SAMPLES])
def test_arguments_are_left_as_they_are(name):
    operator, given = sample(name, Draw(4), torch.float32)
    tensors = tensors_of(given)
    before = [each.clone() for each in tensors]
    getattr(reference, operator)(*given)
    assert all(torch.equal(one, other) for one, other in zip(tensors, before, strict=True))


BAD = [
    ("depthwise_act_pool hs", {3: lambda act: "gelu"}, "act='gelu' is not known; choose one of hs, relu6"),
    ("depthwise_act_pool hs", {0: lambda x: x[0]}, r"\(batch, height, width, channels\)"),
    ("depthwise_act_pool hs", {1: lambda weight: weight[:-1]}, "weight of a map of 4 channels"),
    ("depthwise_act_pool hs", {1: lambda weight: weight[..., :2]}, "not .*2"),
    ("depthwise_act_pool hs", {2: lambda bias: bias[:1]}, r"bias has shape \(1,\); .* 4 channels"),
    ("pointwise expansion", {3: lambda act: "gelu"}, "act='gelu' is not known; choose one of hs, relu6, or None"),
    ("pointwise expansion", {0: lambda x: x[0]}, r"\(batch, rows, channels\), not \(7, 4\)"),
    ("pointwise expansion", {1: lambda weight: weight[:, 1:]}, r"weight has shape \(7, 3\); .* must be \(7, 4\)"),
    ("pointwise expansion", {2: lambda bias: bias[1:]}, r"bias has shape \(6,\); .* must be \(7,\)"),
    ("pointwise projection", {4: lambda gate: gate[:2]}, r"gate has shape \(2, 4\); .* must be \(3, 4\)"),
]


@pytest.mark.parametrize(("name", "spoil", "message"), BAD, ids=lambda each: each if isinstance(each, str) else "")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_arguments(name, spoil, message, device):
    operator, given = sample(name, Draw(0), torch.float32)
    given = [each.to(device) if isinstance(each, torch.Tensor) else each for each in given]
    for position, change in spoil.items():
        given[position] = change(given[position])
    with pytest.raises(ValueError, match=message):
        getattr(reference, operator)(*given)


BAD_MODULES = [
    ({1: lambda height: 4}, r"tokens of shape \(2, 17, 4\) do not fill the 4 x 5 grid behind 2 prefix tokens: .* 22,"),
    ({0: lambda x: x[0]}, r"tokens of shape \(17, 4\) do not fill"),
    ({4: lambda given: [given[0][:, 1:], *given[1:]]}, r"weight has shape \(7, 3, 1, 1\)"),
    ({4: lambda given: [*given[:2], given[2][1:], *given[3:]]}, "depth-wise weight of a map of 7 channels"),
    ({4: lambda given: [*given[:5], given[5][1:], *given[6:]]}, r"bias has shape \(5,\); .* must be \(6,\)"),
    ({5: lambda act: "gelu"}, "act='gelu' is not known; choose one of hs, relu6"),
    ({6: lambda act: "gelu"}, "act='gelu' is not known; choose one of hs, relu6"),
    ({7: lambda gate: "cbam"}, "gate='cbam' is not known; choose one of se, eca, ecah, or None"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_MODULES, ids=lambda each: each if isinstance(each, str) else "")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_arguments_of_the_operator(spoil, message, device):
    _, given = sample("hs, hs, se", Draw(0), torch.float32)
    for position, change in spoil.items():
        given = [*given[:position], change(given[position]), *given[position + 1 :]]
    given = [
        [each.to(device) for each in one] if isinstance(one, list) else one.to(device) if torch.is_tensor(one) else one
        for one in given
    ]
    with pytest.raises(ValueError, match=message):
        torch.ops.localvit.feed_forward(*given)
