"""Timing on a GPU: medians of calls in turn, replays of CUDA graphs, and where the device's time goes.

Times are of the host's clock between two synchronizations, so a call that waits for the host is seen to wait.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]

WARM_UP_CALLS = 3


@dataclass(frozen=True)
class Timing:
    """What one call costs."""

    milliseconds: float
    """Median by the host's clock."""
    device_milliseconds: float
    """Sum over its kernels."""
    launches: float
    peak_mebibytes: float
    """Memory of tensors, at most."""

    @property
    def busy(self) -> float:
        """The share of the time in which the device computes; well below 1, the call waits for the host."""
        return min(self.device_milliseconds / self.milliseconds, 1.0)


def in_turn(calls: Mapping[str, Call], *, rounds: int = 5, calls_per_round: int = 3) -> dict[str, Timing]:
    """Measure calls in turn, so that a drift of the machine meets all of them."""
    peaks = {}
    for name, call in calls.items():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(WARM_UP_CALLS):
            call()
        torch.cuda.synchronize()
        peaks[name] = torch.cuda.max_memory_allocated() / 2**20
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            for _ in range(calls_per_round):
                call()
            torch.cuda.synchronize()
            times[name].append((time.perf_counter() - started) * 1e3 / calls_per_round)
    return {
        name: Timing(statistics.median(times[name]), *kernels_of(call), peaks[name]) for name, call in calls.items()
    }


def kernels_of(call: Call) -> tuple[float, float]:
    """The device's milliseconds and the number of kernels of one call."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        call()
        torch.cuda.synchronize()
    events = [each for each in profiler.key_averages() if each.device_type == torch.autograd.DeviceType.CUDA]
    return sum(each.self_device_time_total for each in events) / 1e3, sum(each.count for each in events)


def captured(call: Call) -> tuple[object, Call]:
    """A call captured as a CUDA graph: what has to be kept as long as it is replayed, and the replay.

    The graph reads what the call refers to, such as weights and the state of an optimizer, but does not keep it.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return (graph, call), graph.replay
