"""Measure how fast models run: all of them in turn, round by round, in one process.

The speed of a machine drifts over minutes, but hardly within a round. So ratios are taken within rounds, and every
number is a median over rounds with its quartiles.
"""

import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from time import perf_counter

import torch
import torch._dynamo.config

from localvit.bench.prepare import BenchModel, BenchOptions, Call
from localvit.bench.result import BatchResult, BenchResult, Latency, ModelResult, Quartiles
from localvit.checkpoints import versions

LATENCY_CALLS = 200
"""Least number of calls with one image that are timed for the latency; 2 of them lie above the 99th percentile."""
_WARM_UP_CALLS = 3
_SECONDS_PER_TIMING = 0.1  # short calls are timed in groups, because the clock itself takes time and jitters
_SECONDS_PER_GEMM = 0.25
_MAX_CALLS_PER_TIMING = 1000
_GEMM = ""  # not the name of any model


def measure(
    models: Sequence[BenchModel],
    options: BenchOptions,
    *,
    baseline: str | None = None,
    progress: Callable[[int], object] = lambda rounds: None,
) -> BenchResult:
    """Measure `models` in turn.

    Args:
        models: Models prepared with `options`, each with another name or runtime.
        options: What to measure.
        baseline: Name of the model to compare the others with, each in its own runtime if it is there.
        progress: Called with 1 after each round; there are `number_of_rounds(options)`.

    Raises:
        ValueError: If the baseline is not among the models. Errors of the models themselves pass through.
    """
    by_name = {model.title: model for model in models}
    if baseline is not None and all(model.name != baseline for model in models):
        raise ValueError(f"the baseline {baseline} is not among the models: {', '.join(by_name)}")
    compared_with = {name: _baseline_of(model, models, baseline) for name, model in by_name.items()}
    gemm, gemm_size = _gemm(options)
    batches: dict[str, list[BatchResult]] = {name: [] for name in by_name}
    gemm_rates: list[float] = []
    with _compile_for_each_batch_size():
        for batch_size in options.batch_sizes:
            calls = {name: model.call(batch_size) for name, model in by_name.items()}
            timed = {**calls, _GEMM: gemm}
            calls_per_round = {name: warm_up(call, options.device) for name, call in timed.items()}
            seconds = time_rounds(timed, calls_per_round, options, progress)
            rates = [gemm_size**3 / each for each in seconds[_GEMM]]
            gemm_rates += rates
            for name, model in by_name.items():
                batches[name].append(
                    BatchResult(
                        batch_size=batch_size,
                        calls_per_round=calls_per_round[name],
                        images_per_second=Quartiles.of([batch_size / each for each in seconds[name]]),
                        ratio=None
                        if (other := compared_with[name]) in (None, name)
                        else Quartiles.of(_ratios(seconds[other], seconds[name])),
                        share_of_gemm_rate=_share_of_gemm_rate(model, batch_size, rates, seconds[name]),
                        peak_memory_bytes=_peak_memory(model, calls[name]),
                    )
                )
        latencies = {} if options.train else _latencies(by_name, options, progress)
    return BenchResult(
        options=options,
        models=tuple(
            ModelResult(model=model, batches=tuple(batches[name]), latency=latencies.get(name))
            for name, model in by_name.items()
        ),
        baseline=baseline,
        gemm_multiply_adds_per_second=Quartiles.of(gemm_rates),
        gemm_size=gemm_size,
        hardware=_hardware(options.device),
        versions=versions(),
    )


def _baseline_of(model: BenchModel, models: Sequence[BenchModel], baseline: str | None) -> str | None:
    """Title of the baseline in the model's runtime, or in the first that it is in."""
    titles = {each.runtime: each.title for each in reversed(models) if each.name == baseline}
    return titles.get(model.runtime, next(reversed(titles.values()), None))


def number_of_rounds(options: BenchOptions) -> int:
    """How many rounds `measure` runs: `options.rounds` for each batch size, and as many again for the latency."""
    return options.rounds * (len(options.batch_sizes) + (not options.train))


def time_rounds(
    calls: Mapping[str, Call],
    calls_per_round: Mapping[str, int],
    options: BenchOptions,
    progress: Callable[[int], object],
) -> dict[str, list[float]]:
    """Seconds per call, for each name and round.

    Every other round runs in reverse order, so that no model always runs after the same other one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(options.rounds):
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            seconds[name].append(_seconds_per_call(calls[name], calls_per_round[name], options.device))
        progress(1)
    return seconds


def _ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    return [numerator / denominator for numerator, denominator in zip(numerators, denominators, strict=True)]


def _share_of_gemm_rate(
    model: BenchModel, batch_size: int, gemm_rates: Sequence[float], seconds: Sequence[float]
) -> Quartiles | None:
    if model.fused_multiply_adds is None:
        return None
    # For each matrix product of the forward pass, the backward pass has two.
    multiply_adds = model.fused_multiply_adds * batch_size * (3 if model.options.train else 1)
    return Quartiles.of(_ratios([multiply_adds / rate for rate in gemm_rates], seconds))


def _latencies(
    models: Mapping[str, BenchModel], options: BenchOptions, progress: Callable[[int], object]
) -> dict[str, Latency]:
    calls = {name: model.call(1) for name, model in models.items()}
    for call in calls.values():
        warm_up(call, options.device)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, call in calls.items():
            call()  # not timed: the caches hold data of another model
            for _ in range(math.ceil(LATENCY_CALLS / options.rounds)):
                seconds[name].append(_seconds_per_call(call, 1, options.device))
        progress(1)
    return {name: Latency.of(values) for name, values in seconds.items()}


def _seconds_per_call(call: Call, times: int, device: torch.device) -> float:
    """Average wall-clock seconds of consecutive calls, until the device has finished them."""
    _synchronize(device)
    started = perf_counter()
    for _ in range(times):
        call()
    _synchronize(device)
    return (perf_counter() - started) / times


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def warm_up(call: Call, device: torch.device) -> int:
    """Compile, allocate and choose algorithms. Returns the number of calls to time together."""
    for _ in range(_WARM_UP_CALLS):
        call()
    calls = _SECONDS_PER_TIMING / max(_seconds_per_call(call, 1, device), 1e-9)
    return min(max(math.ceil(calls), 1), _MAX_CALLS_PER_TIMING)


def _gemm(options: BenchOptions) -> tuple[Call, int]:
    """A product of square matrices, large enough to reach the highest rate of the device, and their size.

    Smaller where a device is slow in this dtype, such as a CPU without bfloat16 instructions, so that it stays short.
    """
    size, largest = 512, 8192 if options.device.type == "cuda" else 2048
    while True:
        left, right = (torch.randn(size, size, device=options.device, dtype=options.dtype) for _ in range(2))
        call = partial(torch.mm, left, right, out=torch.empty_like(left))
        call()
        if size == largest or 8 * _seconds_per_call(call, 1, options.device) > _SECONDS_PER_GEMM:
            return call, size
        size *= 2


def _peak_memory(model: BenchModel, call: Call) -> int | None:
    device = model.options.device
    if device.type != "cuda":  # elsewhere torch does not report the memory of one call
        return None
    _synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    _synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before + model.resident_bytes()


@contextmanager
def _compile_for_each_batch_size() -> Iterator[None]:
    """Raise the limit of recompilations, after which torch.compile would fall back to running a forward eagerly."""
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
