"""The Triton kernels on fresh random maps, against float64: what a GPU runs, and what a process that interprets them.

Shapes: B batch, P prefix tokens, H and W the grid, E channels.
"""

import importlib

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

MODULES = {
    "depthwise_act_pool": "inference",
    "norm_act_depthwise": "training",
    "norm_act_depthwise_backward": "training_backward",
}

# Ranges of batch, height, width, channels. Tiles have up to 14 rows, 8 or 16 columns, and 32 to 128 channels.
GRIDS = {
    "one position": ((1, 3), (1, 1), (1, 1), (1, 9)),
    "1 x N": ((2, 2), (1, 1), (2, 12), (3, 20)),
    "N x 1": ((2, 2), (2, 8), (1, 1), (3, 20)),
    "one image": ((1, 1), (2, 8), (2, 8), (5, 40)),
    "images": ((2, 3), (2, 7), (2, 7), (5, 40)),
    "several tiles of rows and channels": ((1, 1), (15, 18), (9, 13), (65, 70)),
    "several tiles of columns": ((1, 2), (2, 4), (17, 22), (3, 7)),
}
LARGE = ((3, 9), (15, 40), (15, 40), (129, 400))
GUARD = 256


class Guarded(TorchDispatchMode):
    """Whatever is allocated without values is NaN, and so is what lies before and behind it."""

    def __init__(self):
        super().__init__()
        self.memories = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function not in (torch.ops.aten.new_empty.default, torch.ops.aten.empty.memory_format) or not out.numel():
            return out
        memory = torch.full((out.numel() + 2 * GUARD,), torch.nan, dtype=out.dtype, device=out.device)
        self.memories.append(memory)
        return memory[GUARD:-GUARD].view(out.shape)

    def check(self, what):
        assert len(self.memories) >= 2, f"nothing was allocated: {what}"
        for memory in self.memories:
            around = torch.cat([memory[:GUARD], memory[-GUARD:]])
            assert around.isnan().all(), f"written beyond its end: {what}"
            assert not memory[GUARD:-GUARD].isnan().any(), f"not written everywhere: {what}"


class Draw:
    """Random sizes and values; a seed gives the same ones on every device."""

    def __init__(self, seed, device="cpu"):
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device

    def number(self, low, high):
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def values(self, *shape, dtype=torch.float64):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device, dtype)

    def map(self, batch, height, width, channels, dtype):
        """A map in the layout of one of three hosts; memory that is not the map's is NaN."""
        kind = self.number(0, 2)
        if kind == 0:
            return self.values(batch, height, width, channels, dtype=dtype)
        if kind == 1:
            return self.values(batch, width, height, channels, dtype=dtype).transpose(1, 2)
        prefix = self.number(1, 3)
        x_BNE = self.values(batch, prefix + height * width, channels, dtype=dtype)
        x_BNE[:, :prefix] = torch.nan
        return x_BNE[:, prefix:].unflatten(1, (height, width))


def arguments(draw, operator, size, dtype):
    """What an operator takes, less the activation. Values keep off the activations' kinks."""
    channels = size[-1]
    weight = draw.values(*((channels, 3, 3), (channels, 1, 3, 3))[draw.number(0, 1)], dtype=dtype)
    if operator == "depthwise_act_pool":
        return draw.map(*size, dtype), weight, draw.values(channels, dtype=dtype)
    z = draw.map(*size, dtype)
    scale = draw.values(channels, dtype=dtype)
    shift = (1 + draw.values(channels).tanh() / 3).to(dtype)  # 0.7 to 1.3
    u = z.double() * scale.double() + shift.double()
    kinks = torch.tensor([-3.0, 0.0, 3.0, 6.0], dtype=torch.float64, device=z.device)
    # The derivative jumps there: rounding decides on which side a value lies, and both are right.
    z[((u[..., None] - kinks).abs() < 1e-3).any(-1)] = 0
    if operator == "norm_act_depthwise":
        return z, scale, shift, weight
    return draw.map(*size, dtype), z, scale, shift, weight, draw.values(channels, dtype=dtype)


def activation(u, act):
    return F.hardswish(u) if act == "hs" else F.relu6(u)


def convolution(map_BHWE, weight, bias=None):
    channels = map_BHWE.shape[-1]
    weight_E133 = weight.reshape(channels, 1, 3, 3)
    return F.conv2d(map_BHWE.permute(0, 3, 1, 2), weight_E133, bias, padding=1, groups=channels).permute(0, 2, 3, 1)


def expected(operator, arguments, act):
    """What the operator's docstring says, in float64, by torch's functions and its autograd."""
    arguments = [argument.double() for argument in arguments]
    if operator == "depthwise_act_pool":
        x, weight, bias = arguments
        y = activation(convolution(x, weight, bias), act)
        return y, y.sum((1, 2))
    if operator == "norm_act_depthwise":
        z, scale, shift, weight = arguments
        out = convolution(activation(z * scale + shift, act), weight)
        return out, out.mean((0, 1, 2)), out.var((0, 1, 2), correction=0)
    grad, z, scale, shift, weight, center = arguments
    u = (z * scale + shift).requires_grad_()
    weight.requires_grad_()
    grad_u, grad_weight = torch.autograd.grad(convolution(activation(u, act), weight), (u, weight), grad)
    return grad_u, grad_weight, torch.stack([grad_u.sum((0, 1, 2)), (grad_u * (z - center)).sum((0, 1, 2))])


def check_close(found, wanted, dtype, positions, what):
    """The first is a map in `dtype`, the others sums."""
    # Sums are in float32 or float64, with one rounding per position.
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    # A map in half precision is rounded once more; by the interpreter downwards, so up to a unit of the last place.
    rounded = 0 if dtype in (torch.float64, torch.float32) else torch.finfo(dtype).eps
    tolerances = [(40 * eps + rounded, 40 * eps), *[(40 * eps, 10 * eps * positions)] * (len(wanted) - 1)]
    assert found[0].dtype == dtype
    for number, (one, other, (rtol, atol)) in enumerate(zip(found, wanted, tolerances, strict=True)):
        message = f"result {number} of {what}"
        torch.testing.assert_close(
            one.double(), other, rtol=rtol, atol=atol, msg=lambda text, message=message: f"{message}: {text}"
        )


def compare(operator, seed, ranges, device="cpu", dtypes=None):
    """Launch an operator's kernel in one dtype and float64, and compare with float64 by torch."""
    launch = getattr(importlib.import_module(f"localvit.ops.triton.{MODULES[operator]}"), operator)
    draw = Draw(seed, device)
    size = [draw.number(*ends) for ends in ranges]
    half = (torch.float32, torch.bfloat16, torch.float16)[draw.number(0, 2)]
    for dtype in dtypes or (torch.float64, half):
        act = ("hs", "relu6")[draw.number(0, 1)]
        given = arguments(draw, operator, size, dtype)
        what = f"{operator}, seed {seed}, map {size}, strides {given[0].stride()}, {dtype}, {act}"
        with Guarded() as guarded:
            found = launch(*given, act)
        guarded.check(what)
        check_close(found, expected(operator, given, act), dtype, size[0] * size[1] * size[2], what)


def far_mean(seed, device="cpu"):
    """The variance where the mean is thousands of standard deviations away, which squares in float32 do not survive."""
    from localvit.ops.triton.training import norm_act_depthwise

    draw = Draw(seed, device)
    z = 4000 + draw.values(2, 15, 9, 5, dtype=torch.float32)
    ones = torch.ones(5, device=device)
    weight = torch.zeros(5, 3, 3, device=device)
    weight[:, 1, 1] = 1
    _, mean, variance = norm_act_depthwise(z, ones, 0 * ones, weight, "hs")
    wanted_variance, wanted_mean = torch.var_mean(z.double(), (0, 1, 2), correction=0)
    # float32 rounds means near 4000 by up to 2 ** -13 of a standard deviation; differences of neighbors are exact.
    for found, wanted, rtol in ((mean, wanted_mean, 1e-6), (variance, wanted_variance, 1e-3)):
        torch.testing.assert_close(found.double(), wanted, rtol=rtol, atol=0, msg=lambda text: f"seed {seed}: {text}")


def not_a_number(operator, act, device="cpu"):
    """One NaN reaches its neighbors and its channel's sums, nothing else, and is not clamped away."""
    launch = getattr(importlib.import_module(f"localvit.ops.triton.{MODULES[operator]}"), operator)
    given = arguments(Draw(1, device), operator, (1, 4, 6, 3), torch.float32)
    given[0][0, 1, 2, 1] = torch.nan
    out, total, *_ = launch(*given, act)
    wanted = torch.zeros(1, 4, 6, 3, dtype=torch.bool, device=device)
    wanted[0, 0:3, 1:4, 1] = True
    assert torch.equal(out.isnan(), wanted)
    assert total.flatten().isnan().tolist() == [False, True, False]


def begin():
    """The first thing that a process of its own does: see that Triton interprets there, and can."""
    import triton

    from localvit.ops.triton.inference import depthwise_act_pool

    assert triton.knobs.runtime.interpret
    torch.set_num_threads(1)
    depthwise_act_pool(torch.ones(1, 1, 1, 1), torch.ones(1, 3, 3), torch.ones(1), "hs")
