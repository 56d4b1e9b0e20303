"""How near are the Triton kernels of `localvit.ops.kernels` to a device copy?

    python benchmarks/kernels_speed.py [--models localvit_tiny localvit_small] [--batch-size 256] [--rounds 50]

For the maps of each model's depth-wise convolutions: each operator's kernel, its plain form, that form compiled, and a
device copy of as many bytes as the operator has to move (every tensor that it takes or gives, once). Each is captured
in a CUDA graph, so that no launch is waited for, over several sets of tensors, so that none is found in the cache; the
graphs run in turn, round by round, between CUDA events. The share of the copy's speed is the median over rounds. Run
`pytest tests/kernels` on the same GPU first: this looks at no number that the kernels give.
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
from localvit.ops import kernels
from localvit.ops import reference as plain

SETS = 4
"""Sets of tensors. One of localvit_tiny's at batch 256 in bfloat16 is 150 MB or more; caches have up to 126."""
GOAL = 0.70
"""Of a copy's speed, for the inference kernel."""


def maps(name: str) -> list[tuple[int, int, int]]:
    """Height, width and channels of the maps that a model's depth-wise convolutions see, each once."""
    model = localvit.create_model(name, device="meta")
    return sorted({(*part.grid_size, part.channels) for part in locality_report(model)})


def draw(batch: int, size: tuple[int, int, int], dtype: torch.dtype) -> dict[str, tuple[Tensor, ...]]:
    """What each operator takes, less the activation: maps in `dtype`, what training keeps in float32."""
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


def copy_of(size: int) -> Callable[[], Tensor]:
    """A copy that moves `size` bytes, half of them read and half written."""
    source = torch.randint(256, (size // 2,), device="cuda", dtype=torch.uint8)
    return partial(torch.empty_like(source).copy_, source)


def captured(calls: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """The calls, one after the other, as one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls * 3:  # compiles, and makes room
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def milliseconds(graph: torch.cuda.CUDAGraph) -> float:
    """Of one of its calls."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / SETS


@torch.no_grad()
def measure(operator: str, sets: list[tuple[Tensor, ...]], act: str, rounds: int) -> list[str]:
    """Rows of the table."""
    forms = {
        "kernel": getattr(torch.ops.localvit, operator),
        "plain": getattr(plain, operator),
        "plain, compiled": torch.compile(getattr(plain, operator), dynamic=False),
    }
    size = sum(tensor.nbytes for tensor in (*sets[0], *forms["plain"](*sets[0], act)))
    graphs = {name: captured([partial(form, *given, act) for given in sets]) for name, form in forms.items()}
    graphs["copy"] = captured([copy_of(size) for _ in sets])
    for graph in graphs.values():
        milliseconds(graph)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            times[name].append(milliseconds(graph))
    rows = []
    for name, of_rounds in times.items():
        median = statistics.median(of_rounds)
        shares = [copy / own for copy, own in zip(times["copy"], of_rounds, strict=True)]
        low, share, high = statistics.quantiles(shares, n=4)
        cells = [name, f"{median:.3f}", f"{size / median / 1e9:.2f}", f"{share:.0%}", f"{low:.0%} to {high:.0%}"]
        rows.append(f"| {operator} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    """Measure and print one table for each map; exits with 1 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["localvit_tiny", "localvit_small"])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--act", choices=plain.ACTS, default="hs")
    parser.add_argument("--rounds", type=int, default=50)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("the kernels run on a GPU, and torch sees none here: nothing was measured")
    kernels.use(True)
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    print(f"{device}, batch {asked.batch_size}, {asked.dtype}, {asked.act}")
    print(f"The goal is {GOAL:.0%} of a copy's speed for depthwise_act_pool.")
    for name in asked.models:
        for size in maps(name):
            print(f"\n{name}: maps of {size[0]} x {size[1]} places and {size[2]} channels\n")
            print("| operator | form | ms | TB/s | of a copy | middle half of rounds |\n|---|---|---|---|---|---|")
            drawn = [draw(asked.batch_size, size, getattr(torch, asked.dtype)) for _ in range(SETS)]
            for operator in drawn[0]:
                rows = measure(operator, [each[operator] for each in drawn], asked.act, asked.rounds)
                print("\n".join(rows), flush=True)


if __name__ == "__main__":
    main()
