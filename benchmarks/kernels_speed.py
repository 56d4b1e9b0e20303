"""How close do the Triton kernels of `localvit.ops.triton` come to the speed of a device copy?

    python benchmarks/kernels_speed.py [--models localvit_tiny localvit_small] [--batch-size 256] [--rounds 20]
        [--tiles]

For the maps of each model's locality modules, each kernel is measured beside a device copy of as many bytes as the
kernel has to move (each input and output once). Both are captured in CUDA graphs, to leave out launch times, over
several sets of tensors, so that no input is in the cache. The graphs run in turn, round by round, between CUDA events.
The share of the copy's speed is the median over rounds. Results are not checked here: run `pytest tests/ops -k gpu` on
the same GPU first.

With `--tiles`, each kernel is measured with several sizes of tiles instead: the fastest should stand in
`localvit.ops.triton`.
"""

import argparse
import contextlib
import inspect
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import localvit
from localvit.inference.cost import locality_report

SETS = 3
"""Number of sets of tensors. One for localvit_tiny, batch 256, bfloat16 has at least 150 MB; caches have up to 126."""


class Operator(NamedTuple):
    """A kernel on one set of tensors, and the bytes that it has to move."""

    call: Callable[[], Any]
    size: int


TILES = [
    *((64, 64, inner, 4, 3, registers) for inner in (32, 64) for registers in (None, 128)),
    *((64, 32, 64, 4, stages, None) for stages in (3, 4)),
    *((64, 128, inner, 4, 3, registers) for inner in (32, 64) for registers in (None, 128)),
    *((128, 32, 32, 8, 3, 128), (128, 64, 32, 4, 3, None), (128, 64, 64, 8, 3, None), (128, 64, 32, 8, 4, 128)),
    *((rows, 128, inner, 8, 3, registers) for rows in (64, 128) for inner in (32, 64) for registers in (None, 128)),
    *((128, 128, 32, 4, 4, None), (64, 256, 32, 4, 4, None), (64, 256, 32, 8, 4, None), (64, 256, 64, 8, 3, None)),
    *((128, 256, 64, 8, 3, None), (128, 256, 32, 8, 3, None), (128, 256, 32, 8, 4, None)),
    *((256, 64, 32, 8, 3, None), (256, 128, 32, 8, 3, None)),
]
"""Rows, columns and inner size of a tile, warps, stages and registers: what `--tiles` tries for matrix products."""
AREAS = [
    *((values, 4, registers) for values in (256, 512) for registers in (80, 96, 128, 168, None)),
    *((1024, 8, 128), (512, 8, 64), (512, 8, 96), (512, 8, 128), (256, 2, 128), (128, 2, 128), (128, 4, 96)),
]
"""Values of a tile, warps and registers, for the depth-wise convolution."""


class Sizes(NamedTuple):
    """A locality module's maps: grid, channels outside, hidden channels."""

    height: int
    width: int
    channels: int
    hidden: int


def sizes_of(name: str) -> list[Sizes]:
    """The maps of a model's locality modules, without duplicates."""
    model = localvit.create_model(name, device="meta")
    modules: dict[str, Any] = dict(model.named_modules())
    parts = [(part, modules[part.name].conv[0].in_channels) for part in locality_report(model)]
    return sorted({Sizes(*part.grid_size, channels, part.channels) for part, channels in parts})


def operators(batch: int, sizes: Sizes, dtype: torch.dtype, act: str) -> dict[str, Operator]:
    """Every kernel of inference and training, on fresh random tensors."""
    from localvit.ops.triton import batch_norm, inference, pointwise, pointwise_backward, training, training_backward

    height, width, channels, hidden = sizes
    positions = height * width

    def values(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=of)

    tokens_BNC, map_BHWE, other_BHWE, third_BHWE = (
        values(batch, 1 + positions, channels),
        *(values(batch, height, width, hidden) for _ in range(3)),
    )
    outer_BHWC, gate_BE = values(batch, height, width, channels), values(batch, hidden, of=torch.float32)
    widening_EC, narrowing_CE = values(hidden, channels), values(channels, hidden)
    depthwise_E133 = values(hidden, 1, 3, 3).to(memory_format=torch.channels_last)
    norm_4E, slopes_3E = values(4, hidden, of=torch.float32), values(3, hidden, of=torch.float32)
    small, large = outer_BHWC.nbytes, map_BHWE.nbytes
    rows_BSE, rows_BSC = map_BHWE.flatten(1, 2), outer_BHWC.flatten(1, 2)
    return {
        "expansion": Operator(
            partial(pointwise.pointwise, tokens_BNC, widening_EC, values(hidden), act, skipped=1), small + large
        ),
        "depth-wise, gate's sums": Operator(
            partial(inference.depthwise_act_pool, map_BHWE, depthwise_E133, values(hidden), act), 2 * large
        ),
        "projection": Operator(
            partial(
                *(pointwise.pointwise, rows_BSE, narrowing_CE, values(channels), None, gate_BE.to(dtype)),
                num_prefix_tokens=1,
            ),
            small + large,
        ),
        "expansion, statistics": Operator(
            partial(pointwise.pointwise_with_statistics, rows_BSC, widening_EC), small + large
        ),
        "norm, depth-wise, statistics": Operator(
            partial(training.norm_act_depthwise, map_BHWE, norm_4E, depthwise_E133, act), 2 * large
        ),
        "norm, gate's means": Operator(partial(batch_norm.channel_means, map_BHWE, norm_4E, act), large),
        "norm, gate, projection": Operator(
            partial(pointwise.normalized_pointwise, rows_BSE, narrowing_CE, norm_4E, act, gate_BE), small + large
        ),
        "gradients of projection": Operator(
            partial(
                *(pointwise_backward.projection_gradients, outer_BHWC, map_BHWE, norm_4E, narrowing_CE, act, gate_BE)
            ),
            small + large,
        ),
        "gradient of second norm": Operator(
            partial(
                *(pointwise_backward.normalized_gradient, outer_BHWC, map_BHWE, norm_4E, narrowing_CE, act),
                *(gate_BE, gate_BE),
            ),
            small + 2 * large,
        ),
        "gradients of depth-wise": Operator(
            partial(
                *(training_backward.norm_act_depthwise_backward, map_BHWE, other_BHWE, norm_4E, slopes_3E),
                *(third_BHWE, norm_4E, depthwise_E133, act),
            ),
            4 * large,
        ),
        "gradients of expansion": Operator(
            partial(
                *(pointwise_backward.expansion_gradients, map_BHWE, other_BHWE, norm_4E, slopes_3E, widening_EC),
                torch.float32,
            ),
            3 * large + 2 * small,
        ),
    }


def copy_of(size: int) -> Callable[[], Tensor]:
    """A copy that moves `size` bytes: half of them are read, half written."""
    source = torch.randint(256, (size // 2,), device="cuda", dtype=torch.uint8)
    return partial(torch.empty_like(source).copy_, source)


def captured(calls: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """Capture the calls, one after the other, in one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compile and allocate before capturing
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


class Share(NamedTuple):
    """What was measured of a kernel."""

    milliseconds: float
    terabytes_per_second: float
    of_copy: float


def measure(sets: list[Operator], rounds: int) -> Share:
    """Measure one kernel, on several sets of tensors, beside a copy."""
    size = sets[0].size
    kernel, copy = captured([each.call for each in sets]), captured([copy_of(size) for _ in sets])
    times = [(milliseconds(kernel), milliseconds(copy)) for _ in range(rounds + 2)][2:]
    median = statistics.median(own for own, _ in times)
    return Share(median, size / median / 1e9, statistics.median(other / own for own, other in times))


def measure_tiles(
    name: str, batch: int, dtype: torch.dtype, act: str, rounds: int, line: Callable[[str], object]
) -> None:
    """Measure every kernel with each size of its tiles, the fastest first."""
    from triton.runtime.errors import OutOfResources

    from localvit.ops.triton.rows import Blocks
    from localvit.ops.triton.tiles import Area

    choices = {"blocks": [Blocks(*tile) for tile in TILES], "area": [Area(*tile) for tile in AREAS]}
    for sizes in sizes_of(name):
        sets = [operators(batch, sizes, dtype, act) for _ in range(SETS)]
        for kernel, operator in sets[0].items():
            for option in choices.keys() & inspect.signature(operator.call).parameters.keys():
                found = []
                for choice in choices[option]:
                    tiled = [
                        each[kernel]._replace(call=partial(each[kernel].call, **{option: choice})) for each in sets
                    ]
                    with contextlib.suppress(OutOfResources):
                        found.append((measure(tiled, rounds).milliseconds, choice))
                for milliseconds_of_tile, choice in sorted(found, key=lambda each: each[0])[:5]:
                    line(f"{kernel}: {milliseconds_of_tile:.3f} ms with {choice}")


HEADER = "| kernel | maps | ms | TB/s | share of a copy |\n|---|---|---|---|---|"


def measure_model(
    name: str, batch: int, dtype: torch.dtype, act: str, rounds: int, line: Callable[[str], object]
) -> list[dict[str, Any]]:
    """Measure every kernel on the maps of a model; gives each row of a table to `line`, and returns them."""
    rows = []
    for sizes in sizes_of(name):
        sets = [operators(batch, sizes, dtype, act) for _ in range(SETS)]
        for kernel in sets[0]:
            share = measure([each[kernel] for each in sets], rounds)
            maps = f"{sizes.height} x {sizes.width}, {sizes.channels} and {sizes.hidden} channels"
            cells = f"{share.milliseconds:.3f} | {share.terabytes_per_second:.2f} | {share.of_copy:.0%}"
            line(f"| {kernel} | {maps} | {cells} |")
            rows.append({"kernel": kernel, "model": name, **sizes._asdict(), **share._asdict()})
    return rows


def main() -> None:
    """Measure and print one table per model; the exit status is 1 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["localvit_tiny", "localvit_small"])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--act", choices=["hs", "relu6"], default="hs")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tiles", action="store_true", help="try sizes of tiles")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("the kernels need a CUDA GPU, and torch finds none: nothing was measured")
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    print(f"{device}, batch {args.batch_size}, {args.dtype}, {args.act}")
    for name in args.models:
        print(f"\n{name}\n\n{HEADER}")
        with torch.no_grad():
            run = measure_tiles if args.tiles else measure_model
            run(name, args.batch_size, getattr(torch, args.dtype), args.act, args.rounds, partial(print, flush=True))


if __name__ == "__main__":
    main()
