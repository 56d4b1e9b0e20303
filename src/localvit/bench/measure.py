"""How fast models run, measured so that they can be compared: all of them in turn, round by round, in one process.

The machine's speed drifts; within a round it hardly does. So every number is a median over rounds with its quartiles,
and ratios are taken within rounds.
"""

import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter

import torch
import torch._dynamo.config

from localvit.bench.prepare import BenchModel, BenchOptions, Call
from localvit.bench.result import BatchResult, Bench, Latency, ModelResult, Spread
from localvit.checkpoints.checkpoint import versions

LATENCY_CALLS = 200
"""At least so many calls of one image are timed for the latency; 2 of them lie above the 99th percentile."""
_WARM_UP_CALLS = 3
_SECONDS_A_TIMING = 0.1  # short calls are timed several together, against the clock's own cost and jitter
_MOST_CALLS_A_TIMING = 1000
_GEMM = ""  # names no model


def bench(
    models: Sequence[BenchModel],
    options: BenchOptions,
    *,
    baseline: str | None = None,
    progress: Callable[[int], object] = lambda rounds: None,
) -> Bench:
    """Measure `models`, all prepared with `options`, in turn.

    Args:
        models: of distinct names.
        options: what to measure.
        baseline: name of the one to compare the others with.
        progress: called after each round with 1; there are `number_of_rounds(options)`.

    Raises ValueError for a baseline that is not among the models, and what the models raise.
    """
    by_name = {model.name: model for model in models}
    if baseline is not None and baseline not in by_name:
        raise ValueError(f"the baseline {baseline} is not among the models: {', '.join(by_name)}")
    gemm, gemm_size = _gemm(options)
    gemm_multiply_adds = gemm_size**3
    batches: dict[str, list[BatchResult]] = {name: [] for name in by_name}
    gemm_rates: list[float] = []
    with _compiled_anew():
        for batch_size in options.batch_sizes:
            calls = {name: model.call(batch_size) for name, model in by_name.items()}
            calls_a_round = {name: _warm_up(call, options.device) for name, call in {**calls, _GEMM: gemm}.items()}
            seconds = in_turn({**calls, _GEMM: gemm}, calls_a_round, options, progress)
            rates = [gemm_multiply_adds / each for each in seconds[_GEMM]]
            gemm_rates += rates
            for name, model in by_name.items():
                own, multiply_adds = seconds[name], model.form_multiply_adds * batch_size * (3 if options.train else 1)
                floors = [multiply_adds / rate for rate in rates]
                batches[name].append(
                    BatchResult(
                        batch_size=batch_size,
                        calls_a_round=calls_a_round[name],
                        images_per_second=Spread.of([batch_size / each for each in own]),
                        ratio=None if baseline in (None, name) else Spread.of(_over(seconds[baseline], own)),
                        share_of_floor=Spread.of(_over(floors, own)),
                        peak_memory_bytes=_peak_memory(model, calls[name]),
                    )
                )
        latencies = {} if options.train else _latencies(by_name, options, progress)
    return Bench(
        options=options,
        models=tuple(
            ModelResult(model=model, batches=tuple(batches[name]), latency=latencies.get(name))
            for name, model in by_name.items()
        ),
        baseline=baseline,
        gemm_multiply_adds_per_second=Spread.of(gemm_rates),
        gemm_size=gemm_size,
        hardware=_hardware(options.device),
        versions=versions(),
    )


def number_of_rounds(options: BenchOptions) -> int:
    """How often `bench` reports progress: a round for each batch size and one for the latency, so many times."""
    return options.rounds * (len(options.batch_sizes) + (not options.train))


def in_turn(
    calls: Mapping[str, Call],
    calls_a_round: Mapping[str, int],
    options: BenchOptions,
    progress: Callable[[int], object],
) -> dict[str, list[float]]:
    """Seconds a call, by name and round. Every other round runs backwards, so that none always follows the same one."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(options.rounds):
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            seconds[name].append(_seconds(calls[name], calls_a_round[name], options.device))
        progress(1)
    return seconds


def _over(seconds: Sequence[float], own: Sequence[float]) -> list[float]:
    return [each / mine for each, mine in zip(seconds, own, strict=True)]


def _latencies(
    models: Mapping[str, BenchModel], options: BenchOptions, progress: Callable[[int], object]
) -> dict[str, Latency]:
    calls = {name: model.call(1) for name, model in models.items()}
    for call in calls.values():
        _warm_up(call, options.device)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, call in calls.items():
            call()  # not timed: it finds the caches full of another model
            for _ in range(math.ceil(LATENCY_CALLS / options.rounds)):
                seconds[name].append(_seconds(call, 1, options.device))
        progress(1)
    return {name: Latency.of(values) for name, values in seconds.items()}


def _seconds(call: Call, times: int, device: torch.device) -> float:
    """Wall-clock seconds a call, of so many one after the other, until the device has done them."""
    _wait(device)
    started = perf_counter()
    for _ in range(times):
        call()
    _wait(device)
    return (perf_counter() - started) / times


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _warm_up(call: Call, device: torch.device) -> int:
    """Compile, allocate and choose algorithms; returns how many calls to time together."""
    for _ in range(_WARM_UP_CALLS):
        call()
    wanted = _SECONDS_A_TIMING / max(_seconds(call, 1, device), 1e-9)
    return min(max(math.ceil(wanted), 1), _MOST_CALLS_A_TIMING)


def _gemm(options: BenchOptions) -> tuple[Call, int]:
    """A product of square matrices, large enough to show what the device can do, and their size."""
    size = 8192 if options.device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=options.device, dtype=options.dtype) for _ in range(2))
    out = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=out), size


def _peak_memory(model: BenchModel, call: Call) -> int | None:
    device = model.options.device
    if device.type != "cuda":  # nothing here tells what one call took, apart from the rest of the process
        return None
    _wait(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    _wait(device)
    return torch.cuda.max_memory_allocated(device) - before + model.held_bytes()


@contextmanager
def _compiled_anew() -> Iterator[None]:
    """Every model and batch size gets code of its own: torch.compile gives up on a forward after a few otherwise."""
    with torch._dynamo.config.patch(recompile_limit=1024, fail_on_recompile_limit_hit=True):
        yield


def _hardware(device: torch.device) -> dict[str, str | int]:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": device.type,
        "name": gpu or platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "machine": platform.machine(),
    }
