"""Launching a Triton kernel with little time on the host.

Triton looks at each argument of each launch to find the compiled kernel: 50 microseconds and more for a dozen
arguments, longer than many of the kernels here run. Here the compiled kernel is found by the sizes and dtypes of the
first launch.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import JITFunction


class Options(NamedTuple):
    """How a kernel is compiled; None leaves it to Triton."""

    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None


DEFAULT = Options()

_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any, programs: int, arguments: tuple[Any, ...], constants: tuple[Any, ...], options: Options = DEFAULT
) -> None:
    """Run `programs` programs of a kernel on the device of its first argument.

    Args:
        kernel: a function decorated with `triton.jit`.
        programs: their number, one-dimensional.
        arguments: the kernel's tensors (or None), then integers and floats, in its order.
        constants: its compile-time arguments, which follow.
        options: of the compilation.
    """
    device = arguments[0].device.index
    if device is not None and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, programs, arguments, constants, options)
    # Triton compiles for dtypes, for addresses and integers that are multiples of 16, and for ones.
    facts = [(each.dtype, each.data_ptr() % 16) if isinstance(each, Tensor) else each for each in arguments]
    key = (id(kernel), device, constants, options, *facts)
    if (compiled := _compiled.get(key)) is not None:
        compiled[(programs, 1, 1)](*arguments, *constants)
        return None
    given = {name: value for name, value in options._asdict().items() if value is not None}
    compiled = kernel[(programs,)](*arguments, *constants, **given)
    if isinstance(kernel, JITFunction):  # and not interpreted
        _compiled[key] = compiled
    return None


def ceil_div(value: int, divisor: int) -> int:
    """The quotient rounded up; as Triton's `cdiv`, which takes as long as a launch when the host calls it."""
    return -(-value // divisor)


def power_of_2(value: int) -> int:
    """The next power of two, or the value if it is one."""
    return 1 << (value - 1).bit_length()
