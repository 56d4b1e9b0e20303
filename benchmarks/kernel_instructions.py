"""How long should the depth-wise kernels take on a GPU, by their machine code? Needs no GPU.

    python benchmarks/kernel_instructions.py

Compiles each depth-wise kernel for LocalViT-T's maps, 256 images, reads the loop over rows in its machine code, and
predicts its time on an H100 as the longest of three:

- issue: the loop's instructions, at four of a warp in a cycle, the most that a multiprocessor issues. "A value" is how
  many of them compute one value of the map;
- wait: each warp waits for a row for as long as memory takes to answer, shared by the rows that it has asked for.
  Registers say how many warps a multiprocessor runs at a time. Memory is taken to answer in 1.12 microseconds: so long
  took a row in both kernels of the forward pass when they were measured, with one row ahead (0.078 and 0.098 ms);
- copy: what a copy of as many bytes takes, at the 2.75 TB/s measured there.
"""

import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from compiled_kernels import instructions, resources, source_of
from triton.backends.compiler import GPUTarget

from localvit.ops.triton import inference, training, training_backward
from localvit.ops.triton.launch import Launch

BATCH, GRID, CHANNELS = 256, 14, 768
MULTIPROCESSORS, GIGAHERTZ, REGISTERS = 132, 1.755, 65536
"""Of an H100 (SXM); the registers of a multiprocessor."""
COPY_BYTES_PER_SECOND, SECONDS_TO_ANSWER = 2.75e12, 1.12e-6
ROWS_AHEAD = 2
"""Of the maps, in all kernels."""


class Kernel(NamedTuple):
    """A call of a kernel."""

    call: Callable[[], object]
    maps: int
    """Maps that it reads and writes."""


def kernels() -> dict[str, Kernel]:
    """The depth-wise kernels, by the names that `kernels_speed.py` prints."""
    map_BHWE = torch.empty(BATCH, GRID, GRID, CHANNELS, dtype=torch.bfloat16)
    norm_4E, weight_E33, slopes_3E = torch.empty(4, CHANNELS), torch.empty(CHANNELS, 3, 3), torch.empty(3, CHANNELS)
    after = map_BHWE, map_BHWE, norm_4E, slopes_3E
    before = map_BHWE, norm_4E, weight_E33, "hs"
    pooled = partial(inference.depthwise_act_pool, map_BHWE, weight_E33, norm_4E[0], "hs")
    gradients = partial(training_backward.norm_act_depthwise_backward, *after, *before)
    return {
        "depth-wise, gate's sums": Kernel(pooled, 2),
        "norm, depth-wise, statistics": Kernel(partial(training.norm_act_depthwise, *before), 2),
        "gradients of depth-wise": Kernel(gradients, 4),
    }


def recorded(call: Callable[[], object]) -> tuple[Launch, tuple[Any, ...]]:
    """The launch that a call would make, and its tensors."""
    found: list[tuple[Launch, tuple[Any, ...]]] = []

    def record(launch: Launch, *tensors: Any) -> None:
        found.append((launch, tensors))

    with mock.patch.object(Launch, "__call__", record):
        call()
    return found[0]


def longest_loop(lines: list[str]) -> list[str]:
    """The instructions between a label and the last jump back to it, of the loop that has the most."""
    labels = {found[1]: number for number, line in enumerate(lines) if (found := re.match(r"\s*(\.L\w+):", line))}
    loops = [
        lines[labels[found[1]] : number + 1]
        for number, line in enumerate(lines)
        if (found := re.search(r"\bBRA\b.*`\((\.L\w+)\)", line)) and labels[found[1]] < number
    ]
    return max(([line for line in loop if "/*" in line] for loop in loops), key=len)


def main() -> None:
    """Compile and print one table."""
    print("| kernel | registers | a value | issue, ms | wait, ms | copy, ms |\n|---|---|---|---|---|---|")
    for name, (call, maps) in kernels().items():
        launch, tensors = recorded(call)
        source = source_of(launch.kernel, (*tensors, *launch.numbers), launch.constants)
        with tempfile.TemporaryDirectory() as folder:
            cubin = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options.given).asm["cubin"]
            registers = resources(cubin, Path(folder))["REG"]
            loop = longest_loop(instructions(cubin, Path(folder)))
        threads = 32 * launch.options.num_warps
        warps = REGISTERS // (-(-registers // 8) * 8 * threads) * launch.options.num_warps
        pairs, channels = launch.constants[-2:]
        values_of_a_thread = 2 * pairs * channels / threads
        # One row more than a map has: the one before the loop.
        rows = launch.programs * launch.options.num_warps * (GRID + 1)
        issuing = rows * len(loop) / (4 * MULTIPROCESSORS * GIGAHERTZ * 1e9)
        waiting = rows / (MULTIPROCESSORS * warps) * SECONDS_TO_ANSWER / ROWS_AHEAD
        copying = maps * 2 * BATCH * GRID * GRID * CHANNELS / COPY_BYTES_PER_SECOND
        times = " | ".join(f"{1000 * seconds:.3f}" for seconds in (issuing, waiting, copying))
        print(f"| {name} | {registers} | {len(loop) / values_of_a_thread:.0f} | {times} |")


if __name__ == "__main__":
    main()
