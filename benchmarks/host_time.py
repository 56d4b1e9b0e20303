"""How much of the host's time does each kernel of a fused locality module take, the module, and its training step?

    python benchmarks/host_time.py [--rounds 40] [--profile]

Needs no GPU: all runs on tensors of the CPU as it does on a GPU's, but for the kernels: each launch ends where
Triton's compiled launcher would be called. So this is the time of Python and of torch's allocations, without
that launcher and the driver (4 to 5 us a launch on a server). It is the least over rounds of the process's own time,
since other processes slow down the others. Launches of a training step are counted as well. Results are not computed.
"""

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from localvit.locality import LocalityFeedForward
from localvit.ops import dispatch, operators
from localvit.ops.triton.launch import Launch

BATCH, GRID, CHANNELS, HIDDEN = 2, (2, 2), 16, 64
CALLS = 100


class Nothing:
    """A compiled kernel that does nothing."""

    launches = 0

    def run(self, *arguments: Any) -> None:
        Nothing.launches += 1


@contextmanager
def without_kernels() -> Iterator[None]:
    """Operators run on the CPU's tensors as on a GPU's, and launch nothing."""

    def compiled(launch: Any, key: Any, tensors: Any) -> None:
        launch._compiled[key] = Nothing().run, (None, None, None, None, None)

    def no_stream(device: int) -> int:
        return 0

    def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
        return dtype in dispatch.KERNEL_DTYPES

    def runs_directly(x: Tensor) -> bool:
        return not torch.compiler.is_compiling()

    with (
        mock.patch.object(Launch, "_compile_and_run", compiled),
        # Functions, since a mock's call takes longer than an operator.
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", no_stream, create=True),
        mock.patch.object(dispatch, "_has_kernels", has_kernels),
        mock.patch.object(operators, "runs_directly", runs_directly),
    ):
        yield


def values(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16)


def inference_calls() -> dict[str, Callable[[], Any]]:
    """The kernels of a fused module, each by itself, and the module: tokens in and out."""
    from localvit.ops.triton import inference, pointwise, squeeze_excite

    tokens = values(BATCH, 1 + GRID[0] * GRID[1], CHANNELS)
    map_BHWE = values(BATCH, *GRID, HIDDEN)
    depthwise = values(HIDDEN, 1, 3, 3).to(memory_format=torch.channels_last)
    layers = values(4, HIDDEN), values(4), values(HIDDEN, 4), values(HIDDEN)
    expansion = values(HIDDEN, CHANNELS), values(HIDDEN), "hs", None, 1
    projection = values(CHANNELS, HIDDEN), values(CHANNELS), None, values(BATCH, HIDDEN), 0, 1
    folded = values(HIDDEN, CHANNELS), values(HIDDEN), depthwise, values(HIDDEN), values(CHANNELS, HIDDEN)
    module = operators.Module([*folded, values(CHANNELS), *layers], "hs", "hs", "se")
    fused: Any = LocalityFeedForward(CHANNELS, CHANNELS, reduction=CHANNELS).eval().fuse()
    return {
        "expansion": partial(pointwise.pointwise, tokens, *expansion),
        "depth-wise, gate's sums": partial(inference.depthwise_act_pool, map_BHWE, depthwise, values(HIDDEN), "hs"),
        "gate": partial(squeeze_excite.squeeze_excite, torch.randn(BATCH, HIDDEN), 4, *layers),
        "projection": partial(pointwise.pointwise, map_BHWE.flatten(1, 2), *projection),
        "the operator of all four": partial(operators.run, tokens, GRID, 1, module),
        "fused module": partial(fused.conv.to(torch.bfloat16).tokens, tokens, GRID, 1),
    }


def training_calls() -> dict[str, Callable[[], Any]]:
    """The locality module's forward pass, and its whole step, beside the step of a feed-forward without locality."""
    module = LocalityFeedForward(CHANNELS, CHANNELS, reduction=CHANNELS).train()
    plain = nn.Sequential(nn.Linear(CHANNELS, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, CHANNELS))
    tokens = torch.randn(BATCH, *GRID, CHANNELS, requires_grad=True)

    def step(run: Callable[[Tensor], Tensor]) -> None:
        forward(run).sum().backward()

    def forward(run: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return run(tokens)

    def local(tokens: Tensor) -> Tensor:
        return module(tokens.permute(0, 3, 1, 2))

    return {
        "training, forward pass": partial(forward, local),
        "training, step": partial(step, local),
        "the same of linear, GELU, linear": partial(step, plain),
    }


def microseconds(call: Callable[[], Any], rounds: int) -> float:
    """The process's own time of a call, in the quickest of the rounds."""
    times = []
    for _ in range(rounds + 2):
        started = time.process_time()
        for _ in range(CALLS):
            call()
        times.append(time.process_time() - started)
    return min(times) / CALLS * 1e6


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--profile", action="store_true", help="list the functions that take the most time, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| call | us | launches |\n|---|---|---|")
    with without_kernels():
        for grad, calls in ((False, inference_calls()), (True, training_calls())):
            with torch.set_grad_enabled(grad):
                for name, call in calls.items():
                    call()
                    before = Nothing.launches
                    call()
                    launches = Nothing.launches - before
                    print(f"| {name} | {microseconds(call, args.rounds):.1f} | {launches} |", flush=True)
                    if args.profile:
                        profiler = cProfile.Profile()
                        profiler.runcall(microseconds, call, 1)
                        pstats.Stats(profiler).sort_stats("tottime").print_stats(15)


if __name__ == "__main__":
    main()
