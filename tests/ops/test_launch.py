"""A kernel's launches, with a compiled kernel that notes what it is given in place of Triton's."""

from types import SimpleNamespace

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


def test_each_gpu_has_its_own_tiles(monkeypatch):
    """Of two in one process, the one with less shared memory (RTX 4090) takes smaller ones."""
    from localvit.ops.triton import pointwise, rows

    def properties(index):
        kilobytes, major, minor = [(227, 9, 0), (99, 8, 9), (163, 8, 0)][index]
        return SimpleNamespace(shared_memory_per_block_optin=kilobytes * 1024, major=major, minor=minor)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    cached = rows.has_large_shared_memory, rows.overwrites_operands, pointwise.launch_for
    for each in cached:
        each.cache_clear()

    def block(device, act, columns, blocks=None):
        shapes = (3, 5, 256), (1280, 256, 1), (columns, 256), None, None
        return pointwise.launch_for(*shapes, 0, 0, act, None, blocks, device).constants[-3:]

    try:
        narrowing = [block(device, act, 256) for act in (None, "hs") for device in (0, 1, 2)]
        widening = [block(device, None, 512) for device in (0, 1, 2)]
        chosen = block(1, None, 256, pointwise.NARROWING)
    finally:
        for each in cached:
            each.cache_clear()
    large, small = (128, 256, 64), (128, 256, 32)
    assert narrowing == [large, small, large] * 2
    assert widening == [(128, 128, 32)] * 3
    assert chosen == large
