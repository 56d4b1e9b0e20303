"""Running the Triton kernels on fresh random tensors, and what their results are compared with.

Shapes: B batch, P prefix tokens, H and W the grid, E channels.
"""

from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")

GUARD = 256
HALF = (torch.bfloat16, torch.float16)
aten = torch.ops.aten
EMPTY = (aten.new_empty.default, aten.empty.memory_format, aten.empty_like.default)


class Guarded(TorchDispatchMode):
    """Whatever is allocated without values is NaN, and so is what lies before and behind it."""

    def __init__(self):
        super().__init__()
        self.memories = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function not in EMPTY or not out.numel():
            return out
        self.memories.append(torch.full((out.numel() + 2 * GUARD,), torch.nan, dtype=out.dtype, device=out.device))
        return self.memories[-1][GUARD:-GUARD].view(out.shape)

    def check(self):
        assert self.memories, "nothing was allocated"
        for memory in self.memories:
            around = torch.cat([memory[:GUARD], memory[-GUARD:]])
            assert around.isnan().all(), "written beyond a result's end"
            assert not memory[GUARD:-GUARD].isnan().any(), "not written everywhere"


def launched(function, *arguments, **options):
    """The results of a function that runs a kernel, whose memory is checked."""
    with Guarded() as guarded:
        found = function(*arguments, **options)
    guarded.check()
    return found


class Draw:
    """Random sizes and values; a seed gives the same ones on every device. Memory around the values is NaN."""

    def __init__(self, seed, device="cpu"):
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device

    def number(self, low, high):
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def one_of(self, *choices):
        return choices[self.number(0, len(choices) - 1)]

    def prime(self, low, high):
        return self.one_of(*(n for n in range(low, high + 1) if all(n % divisor for divisor in range(2, n))))

    def values(self, *shape, dtype=torch.float64):
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        memory = torch.full((drawn.numel() + 2 * GUARD,), torch.nan, dtype=dtype, device=self.device)
        memory[GUARD:-GUARD] = drawn.flatten()
        return memory[GUARD:-GUARD].view(shape)

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

    def norm(self, channels, dtype):
        """A batch norm's vectors (4, E): mean, inverse deviation, scale, and a shift of 0.7 to 1.3."""
        norm_4E = self.values(4, channels, dtype=sums_dtype(dtype))
        norm_4E[3] = 1 + norm_4E[3].tanh() / 3
        return norm_4E


def sums_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def off_the_kinks(z, norm_4E):
    """Change z where a normalized value is close to a kink of an activation.

    The derivative jumps there: rounding decides on which side a value lies, and both are right.
    """
    u = normalized(z, norm_4E)
    kinks = torch.tensor([-3.0, 0.0, 3.0, 6.0], dtype=torch.float64, device=z.device)
    z[((u[..., None] - kinks).abs() < 1e-3).any(-1)] = 0
    return z


def normalized(z, norm_4E):
    return z.double() * norm_4E[2].double() + norm_4E[3].double()


def activation(u, act):
    if act is None:
        return u
    return F.hardswish(u) if act == "hs" else F.relu6(u)


def convolution(map_BHWE, weight, bias=None):
    channels = map_BHWE.shape[-1]
    weight_E133 = weight.reshape(channels, 1, 3, 3)
    return F.conv2d(map_BHWE.permute(0, 3, 1, 2), weight_E133, bias, padding=1, groups=channels).permute(0, 2, 3, 1)


def close(what, found, wanted, dtype):
    """Compare with float64, with room for sums of rounded products and one rounding of the result in `dtype`."""
    assert found.shape == wanted.shape, f"{what} has shape {tuple(found.shape)}"
    # Sums of up to some thousand terms err by some dozen roundings of the largest. In half precision they are in
    # float32: what counts is a rounding of each operand, and that of the result (downwards by the interpreter).
    room = (2 if dtype in HALF else 40) * torch.finfo(dtype).eps
    wanted = wanted.detach().double()
    error = (found.double() - wanted).abs()
    wrong = ~(error <= room * (wanted.abs() + wanted.abs().amax()))
    assert not wrong.any(), f"{what}: {int(wrong.sum())} of {wrong.numel()} values, off by up to {float(error.max())}"


@contextmanager
def little_shared_memory():
    """The kernels' launches are those of a GPU with less shared memory than the largest tiles need."""
    from localvit.ops.triton import feed_forward, pointwise

    caches = pointwise.launch_for, feed_forward._steps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pointwise, "has_large_shared_memory", lambda device: False)
        for each in caches:
            each.cache_clear()
        try:
            yield
        finally:
            for each in caches:
                each.cache_clear()


def part_of_another(tensor):
    """The tensor as a part of a larger one, with NaN between its values."""
    return torch.stack((tensor, torch.full_like(tensor, torch.nan)), -1)[..., 0]


def autograd_steps(out):
    """The names of all steps that autograd recorded for a result."""
    seen, nodes = set(), [out.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [parent for parent, _ in node.next_functions]
    return [type(each).__name__ for each in seen]


def begin():
    """The first thing that a process of its own does: see that Triton interprets there, and can."""
    import triton

    from localvit.ops.triton.inference import depthwise_act_pool

    assert triton.knobs.runtime.interpret
    torch.set_num_threads(1)
    depthwise_act_pool(torch.ones(1, 1, 1, 1), torch.ones(1, 3, 3), torch.ones(1), "hs")
