"""How close do the Triton kernels of `localvit.ops.triton` come to the speed of a device copy?

    python benchmarks/kernels_speed.py [--models localvit_tiny localvit_small] [--batch-size 256] [--rounds 50]

For the input maps of each model's depth-wise convolutions, four things are measured per operator: its kernel, its
reference in plain torch, that reference compiled, and a device copy of as many bytes as the operator has to move (each
input and output once). Each is captured in a CUDA graph, to leave out launch times, over several sets of tensors, so
that no input is in the cache. The graphs run in turn, round by round, between CUDA events. The share of the copy's
speed is the median over rounds. Results are not checked here: run `pytest tests/ops` on the same GPU first.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import localvit
from localvit.inference.cost import locality_report
from localvit.ops import reference, set_backend
from localvit.ops.activations import ACTIVATIONS

SETS = 4
"""Number of sets of tensors. One for localvit_tiny, batch 256, bfloat16 has at least 150 MB; caches have up to 126."""
GOAL = 0.70
"""Intended share of the copy's speed, for the inference kernel."""


def maps(name: str) -> list[tuple[int, int, int]]:
    """Height, width and channels of the inputs of a model's depth-wise convolutions, without duplicates."""
    model = localvit.create_model(name, device="meta")
    return sorted({(*part.grid_size, part.channels) for part in locality_report(model)})


def random_inputs(batch: int, size: tuple[int, int, int], dtype: torch.dtype) -> dict[str, tuple[Tensor, ...]]:
    """The tensors that each operator takes: maps in `dtype`, and in float32 what training keeps in float32."""
    channels = size[2]

    def map_BHWE() -> Tensor:
        return torch.randn(batch, *size, device="cuda", dtype=dtype)

    def values_E() -> Tensor:
        return torch.randn(channels, device="cuda")

    z_BHWE, weight_E33 = map_BHWE(), torch.randn(channels, 3, 3, device="cuda")
    scale_E, shift_E, center_E = values_E(), values_E(), values_E()
    return {
        "depthwise_act_pool": (z_BHWE, weight_E33.to(dtype), shift_E.to(dtype)),
        "norm_act_depthwise": (z_BHWE, scale_E, shift_E, weight_E33),
        "norm_act_depthwise_backward": (map_BHWE(), z_BHWE, scale_E, shift_E, weight_E33, center_E),
    }


def copy_bytes(size: int) -> Callable[[], Tensor]:
    """A copy that moves `size` bytes: half of them are read, half written."""
    source = torch.randint(256, (size // 2,), device="cuda", dtype=torch.uint8)
    return partial(torch.empty_like(source).copy_, source)


def captured(calls: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """Capture the calls, one after the other, in one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls * 3:  # compile and allocate before capturing
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def milliseconds(graph: torch.cuda.CUDAGraph) -> float:
    """Time of one call of the graph."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / SETS


@torch.no_grad()
def measure(operator: str, sets: list[tuple[Tensor, ...]], act: str, rounds: int) -> list[str]:
    """Measure one operator; returns rows of the table."""
    variants = {
        "kernel": getattr(torch.ops.localvit, operator),
        "reference": getattr(reference, operator),
        "reference, compiled": torch.compile(getattr(reference, operator), dynamic=False),
    }
    size = sum(tensor.nbytes for tensor in (*sets[0], *variants["reference"](*sets[0], act)))
    graphs = {name: captured([partial(variant, *inputs, act) for inputs in sets]) for name, variant in variants.items()}
    graphs["copy"] = captured([copy_bytes(size) for _ in sets])
    for graph in graphs.values():
        milliseconds(graph)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            times[name].append(milliseconds(graph))
    rows = []
    for name, milliseconds_per_round in times.items():
        median = statistics.median(milliseconds_per_round)
        shares = [copy / own for copy, own in zip(times["copy"], milliseconds_per_round, strict=True)]
        low, share, high = statistics.quantiles(shares, n=4)
        cells = [name, f"{median:.3f}", f"{size / median / 1e9:.2f}", f"{share:.0%}", f"{low:.0%} to {high:.0%}"]
        rows.append(f"| {operator} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    """Measure and print one table per map; the exit status is 1 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["localvit_tiny", "localvit_small"])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--act", choices=ACTIVATIONS, default="hs")
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("the kernels need a CUDA GPU, and torch finds none: nothing was measured")
    set_backend("triton")
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    print(f"{device}, batch {args.batch_size}, {args.dtype}, {args.act}")
    print(f"The goal for depthwise_act_pool is {GOAL:.0%} of the speed of a copy.")
    for name in args.models:
        for size in maps(name):
            print(f"\n{name}: maps of {size[0]} x {size[1]} patches and {size[2]} channels\n")
            print("| operator | variant | ms | TB/s | share of copy speed | quartiles |\n|---|---|---|---|---|---|")
            sets = [random_inputs(args.batch_size, size, getattr(torch, args.dtype)) for _ in range(SETS)]
            for operator in sets[0]:
                rows = measure(operator, [each[operator] for each in sets], args.act, args.rounds)
                print("\n".join(rows), flush=True)


if __name__ == "__main__":
    main()
