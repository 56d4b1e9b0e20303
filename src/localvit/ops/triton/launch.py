"""Launching a Triton kernel with little time on the host.

Triton looks at each argument of each launch to find the compiled kernel: 50 microseconds and more for a dozen
arguments, longer than many of the kernels here run. Here the compiled kernel is found by the sizes and dtypes of the
first launch, and its launcher called with addresses in place of tensors, which it would ask the driver about.
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

    Triton's hooks around a launch, which its profiler Proton uses, see the first launch only.

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
    values: list[Any] = []
    key: list[Any] = [id(kernel), device, constants, options]
    # Triton compiles for dtypes, for addresses and integers that are multiples of 16, and for ones.
    for each in arguments:
        if isinstance(each, Tensor):
            address = each.data_ptr()
            values.append(address)
            key += (each.dtype, address % 16)
        else:
            values.append(each)
            key.append(each)
    if (compiled := _compiled.get(found := tuple(key))) is not None:
        stream = torch._C._cuda_getCurrentRawStream(device)
        compiled.run(
            programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *values, *constants
        )
        return None
    given = {name: value for name, value in options._asdict().items() if value is not None}
    compiled = kernel[(programs,)](*arguments, *constants, **given)
    if isinstance(kernel, JITFunction):  # and not interpreted
        _compiled[found] = compiled
    return None


def ceil_div(value: int, divisor: int) -> int:
    """The quotient rounded up; as Triton's `cdiv`, which takes as long as a launch when the host calls it."""
    return -(-value // divisor)


def power_of_2(value: int) -> int:
    """The next power of two, or the value if it is one."""
    return 1 << (value - 1).bit_length()
