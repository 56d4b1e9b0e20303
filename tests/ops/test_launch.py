"""A kernel's launches, with a compiled kernel that notes what it is given in place of Triton's."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from localvit.ops.triton import launch
from localvit.ops.triton.launch import Launch, Options


class Kernel:
    """In place of Triton's: notes the arguments of each compilation, and of each launch after it."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.compilations, self.launches = [], []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.compilations.append((grid, arguments, options)) or self

    def run(self, *arguments):
        self.launches.append(arguments)


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launch, "JITFunction", Kernel)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: f"stream of {device}", raising=False)
    return Kernel()


def test_the_second_launch_passes_addresses(kernel):
    """The compiled launcher's arguments, in its order: grid, stream, function, hooks, and the kernel's own."""
    x, y = torch.zeros(8), torch.zeros(8)
    run = Launch(kernel, 5, (8, 0.5), (16, "hs"), Options(2, maxnreg=96))
    run(x, None, y)
    assert kernel.compilations == [
        ((5,), (x, None, y, 8, 0.5, 16, "hs"), {"num_warps": 2, "num_stages": 3, "maxnreg": 96})
    ]
    assert kernel.launches == []
    run(x, None, y)
    assert len(kernel.compilations) == 1
    grid, given = (5, 1, 1), ("stream of -1", "function", "metadata", None, None, None)
    assert kernel.launches == [(*grid, *given, x.data_ptr(), None, y.data_ptr(), 8, 0.5, 16, "hs")]


def test_what_triton_compiles_for_is_compiled_again(kernel):
    """Dtypes, addresses that are not multiples of 16, and arguments that are None: each once."""
    memory = torch.zeros(64)
    run = Launch(kernel, 1, (), ())
    kinds = [(memory[:8], memory), (memory[1:9], memory), (memory[:8].half(), memory), (memory[:8], None)]
    for _ in range(2):
        for tensors in kinds:
            run(*tensors)
    assert len(kernel.compilations) == len(kernel.launches) == len(kinds)
    run(memory[16:24], memory)  # another address, but again a multiple of 16
    assert len(kernel.compilations) == len(kinds)


def test_maps_of_one_shape_share_a_launch():
    from localvit.ops.triton.pointwise import WIDENING, launch_for

    def found(batch, act):
        return launch_for((batch, 5, 7), (35, 7, 1), (11, 7), None, None, 0, 0, None, act, WIDENING, -1)

    assert found(3, "hs") is found(3, "hs")
    assert found(3, "hs") is not found(4, "hs")
    assert found(3, "hs") is not found(3, "relu6")
