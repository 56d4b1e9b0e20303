"""The reference: what torch's functions compute in float64, on every layout and dtype, and clear errors."""

import launches
import pytest
import torch

from localvit.ops import reference
from localvit.ops.activations import ACTIVATIONS

GRIDS = [(2, 5, 7, 11), (1, 1, 1, 1), (3, 1, 5, 2), (2, 7, 1, 3), (1, 13, 3, 17)]


@pytest.mark.parametrize("operator", launches.MODULES)
@pytest.mark.parametrize("size", GRIDS, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_torchs_functions(operator, size, act, dtype):
    for seed in range(3):  # each with another layout of the map
        given = launches.arguments(launches.Draw(seed), operator, size, dtype)
        found = getattr(reference, operator)(*given, act)
        wanted = launches.expected(operator, given, act)
        launches.check_close(found, wanted, dtype, size[0] * size[1] * size[2], f"{operator}, seed {seed}")


@pytest.mark.parametrize("operator", launches.MODULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(operator, dtype):
    """The map in its dtype, sums in float32; off by as much as the activated map, rounded before it is convolved."""
    given = launches.arguments(launches.Draw(2), operator, (2, 5, 7, 11), dtype)
    found = getattr(reference, operator)(*given, "hs")
    wanted = launches.expected(operator, given, "hs")
    assert [each.dtype for each in found] == [dtype, *[torch.float32] * (len(found) - 1)]
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other).abs().max() <= 4 * torch.finfo(dtype).eps * other.abs().max()


def test_only_the_map_in_half_precision():
    """As autocast gives it: the map in bfloat16, parameters in float32."""
    x, *parameters = launches.arguments(launches.Draw(2), "depthwise_act_pool", (2, 5, 7, 11), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, total = reference.depthwise_act_pool(x.bfloat16(), *parameters, "hs")
        in_float32, _ = reference.depthwise_act_pool(x, *parameters, "hs")
    assert (y.dtype, total.dtype, in_float32.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_sums_do_not_overflow_half_precision():
    x = torch.full((1, 40, 50, 3), 100.0, dtype=torch.float16)
    weight = torch.zeros(3, 3, 3, dtype=torch.float16)
    weight[:, 1, 1] = 1
    _, total = reference.depthwise_act_pool(x, weight, torch.zeros(3, dtype=torch.float16), "hs")
    assert torch.equal(total, torch.full((1, 3), 200_000.0))


def test_arguments_are_left_as_they_are():
    for operator in launches.MODULES:
        given = launches.arguments(launches.Draw(4), operator, (2, 5, 7, 11), torch.float32)
        before = [each.clone() for each in given]
        getattr(reference, operator)(*given, "relu6")
        assert all(torch.equal(one, other) for one, other in zip(given, before, strict=True))


BAD = [
    ("depthwise_act_pool", lambda given: [*given, "gelu"], "act='gelu' is not known; choose one of hs, relu6"),
    ("depthwise_act_pool", lambda given: [given[0][0], *given[1:], "hs"], r"\(batch, height, width, channels\)"),
    ("depthwise_act_pool", lambda given: [given[0], given[1][:-1], given[2], "hs"], "weight of a map of 7 channels"),
    ("depthwise_act_pool", lambda given: [given[0], given[1][..., :2], given[2], "hs"], "not .*2"),
    ("depthwise_act_pool", lambda given: [*given[:2], given[2][:1], "hs"], r"bias has shape \(1,\); .* 7 channels"),
    ("norm_act_depthwise", lambda given: [given[0], given[1][:3], *given[2:], "hs"], r"scale has shape \(3,\)"),
    ("norm_act_depthwise", lambda given: [*given[:2], given[2][None], given[3], "hs"], r"shift has shape \(1, 7\)"),
    (
        "norm_act_depthwise_backward",
        lambda given: [given[0][:1], *given[1:], "hs"],
        r"gradient has shape \(1, 3, 5, 7\)",
    ),
    ("norm_act_depthwise_backward", lambda given: [*given[:5], given[5][1:], "hs"], r"center has shape \(6,\)"),
]


@pytest.mark.parametrize(("operator", "spoil", "message"), BAD, ids=lambda each: each if isinstance(each, str) else "")
@pytest.mark.parametrize("registered", [False, True])
def test_bad_arguments(operator, spoil, message, registered):
    form = getattr(torch.ops.localvit if registered else reference, operator)
    with pytest.raises(ValueError, match=message):
        form(*spoil(launches.arguments(launches.Draw(0), operator, (2, 3, 5, 7), torch.float32)))
