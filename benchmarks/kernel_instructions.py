"""What limits the depth-wise kernels on a GPU: instructions, or memory that is asked for too late? Needs no GPU.

    python benchmarks/kernel_instructions.py

Compiles each depth-wise kernel for LocalViT-T's maps, 256 images, and reads the loop over rows in its machine code.

- "Least time" is that of the loop's instructions at four of a warp in a cycle, the most that an H100's multiprocessor
  issues.
- "On their way" are the bytes of new rows that a multiprocessor has asked for at a time: those that each thread loads
  ahead, for as many threads as its registers hold. Half of the columns that a thread loads are also loaded by its
  neighbor, from the cache, and are not counted.
- "Needed" are the bytes that must be on their way to run at the speed of a copy, by Little's law: what a multiprocessor
  reads of a copy's 2.75 TB/s, times a microsecond. That is about what memory takes to answer under load: not measured.
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
from localvit.ops.triton.tiles import Area

BATCH, GRID, CHANNELS = 256, 14, 768
MULTIPROCESSORS, GIGAHERTZ, REGISTERS = 132, 1.755, 65536
"""Of an H100 (SXM); the registers of a multiprocessor."""
COPY_BYTES_PER_SECOND, SECONDS_TO_ANSWER = 2.75e12, 1e-6


class Kernel(NamedTuple):
    """A call of a kernel."""

    call: Callable[[], object]
    area: Area
    maps: int
    """Maps that it reads; it writes one."""
    ahead: int
    """Those of which it loads a row ahead."""


def kernels() -> dict[str, Kernel]:
    """The depth-wise kernels, by the names that `kernels_speed.py` prints."""
    map_BHWE = torch.empty(BATCH, GRID, GRID, CHANNELS, dtype=torch.bfloat16)
    norm_4E, weight_E33, slopes_3E = torch.empty(4, CHANNELS), torch.empty(CHANNELS, 3, 3), torch.empty(3, CHANNELS)
    after = map_BHWE, map_BHWE, norm_4E, slopes_3E
    before = map_BHWE, norm_4E, weight_E33, "hs"
    pooled = partial(inference.depthwise_act_pool, map_BHWE, weight_E33, norm_4E[0], "hs")
    gradients = partial(training_backward.norm_act_depthwise_backward, *after, *before)
    return {
        "depth-wise, gate's sums": Kernel(pooled, inference.AREA, 1, 1),
        "norm, depth-wise, statistics": Kernel(partial(training.norm_act_depthwise, *before), training.AREA, 1, 1),
        "gradients of depth-wise": Kernel(gradients, training_backward.AREA, 3, 2),
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
    print("| kernel | registers | warps | instructions of a value | least time, ms | on their way, KB | needed, KB |")
    print("|---|---|---|---|---|---|---|")
    for name, (call, area, maps, ahead) in kernels().items():
        launch, tensors = recorded(call)
        source = source_of(launch.kernel, (*tensors, *launch.numbers), launch.constants)
        options = {option: value for option, value in launch.options._asdict().items() if value is not None}
        with tempfile.TemporaryDirectory() as folder:
            cubin = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]
            registers = resources(cubin, Path(folder))["REG"]
            loop = longest_loop(instructions(cubin, Path(folder)))
        threads = 32 * area.num_warps
        warps = REGISTERS // (-(-registers // 8) * 8 * threads) * area.num_warps
        values = 2 * area.values / threads
        issued = BATCH * GRID * GRID * CHANNELS / values * len(loop) / 32
        milliseconds = issued / (4 * MULTIPROCESSORS * GIGAHERTZ * 1e6)
        on_their_way = warps * 32 * values * 2 * ahead / 1024
        needed = COPY_BYTES_PER_SECOND * maps / (maps + 1) / MULTIPROCESSORS * SECONDS_TO_ANSWER / 1024
        print(
            f"| {name} | {registers} | {warps} | {len(loop) / values:.0f} | {milliseconds:.3f} | {on_their_way:.0f} | "
            f"{needed:.0f} |"
        )


if __name__ == "__main__":
    main()
