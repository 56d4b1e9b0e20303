"""Launching a Triton kernel with little time on the host.

Triton looks at each argument of each launch to find the compiled kernel: 50 microseconds and more for a dozen
arguments, longer than many of the kernels here run. Here each kernel's module makes one `Launch` for maps of one shape,
with all that does not change from call to call, and finds it again by the shape (`functools.cache`). It keeps the
compiled kernel and calls its launcher with addresses in place of tensors, which it would ask the driver about.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import JITFunction


class Options(NamedTuple):
    """How a kernel is compiled; None leaves it to Triton."""

    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None

    @property
    def given(self) -> dict[str, int]:
        """As keyword arguments of a launch or a compilation."""
        return {name: value for name, value in self._asdict().items() if value is not None}


DEFAULT = Options()


class Launch:
    """A kernel with everything but its tensors, called with these: runs on the device of the first.

    Triton's hooks around a launch, which its profiler Proton uses, see the first launch only.

    Args:
        kernel: a function decorated with `triton.jit`.
        programs: their number, one-dimensional.
        numbers: integers and floats that follow the tensors.
        constants: compile-time arguments, which follow the numbers.
        options: of the compilation.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        numbers: tuple[int | float, ...],
        constants: tuple[Any, ...],
        options: Options = DEFAULT,
    ) -> None:
        self.kernel = kernel
        self.programs = programs
        self.numbers = numbers
        self.constants = constants
        self.options = options
        self._compiled: dict[tuple[Any, ...], tuple[Callable[..., None], tuple[Any, ...]]] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        first: Any = tensors[0]
        device = first.get_device()
        if device >= 0 and device != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                return self(*tensors)
        addresses = [None if each is None else each.data_ptr() for each in tensors]
        dtypes = [None if each is None else each.dtype for each in tensors]
        # Triton compiles for dtypes, for arguments that are None, and for addresses that are multiples of 16.
        key = (device, *dtypes, *[address and address % 16 for address in addresses])
        if (compiled := self._compiled.get(key)) is None:
            return self._compile_and_run(key, tensors)
        run, given = compiled
        stream = torch._C._cuda_getCurrentRawStream(device)
        run(self.programs, 1, 1, stream, *given, *addresses, *self.numbers, *self.constants)
        return None

    def _compile_and_run(self, key: tuple[Any, ...], tensors: tuple[Tensor | None, ...]) -> None:
        compiled = self.kernel[(self.programs,)](*tensors, *self.numbers, *self.constants, **self.options.given)
        if isinstance(self.kernel, JITFunction):  # and not interpreted
            self._compiled[key] = compiled.run, (compiled.function, compiled.packed_metadata, None, None, None)


def ceil_div(value: int, divisor: int) -> int:
    """The quotient rounded up; as Triton's `cdiv`, which takes as long as a launch when the host calls it."""
    return -(-value // divisor)


def power_of_2(value: int) -> int:
    """The next power of two, or the value if it is one."""
    return 1 << (value - 1).bit_length()
