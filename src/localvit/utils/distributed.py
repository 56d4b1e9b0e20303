"""Helpers for torch.distributed that also work in a single process."""

import logging
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The place of this process among those that a launcher such as torchrun started."""

    rank: int
    """Rank of the process, from 0."""
    world_size: int
    """Number of processes."""
    local_rank: int
    """Rank among the processes of this machine."""
    restarts: int
    """How often torchrun has restarted the processes."""


def read_launch() -> tuple[Launch | None, str | None]:
    """What the launcher's environment variables say.

    They count only together, and if they agree: a leftover RANK=1 must not turn a single process into the second one of
    a group, which saves nothing.

    Returns:
        The launch, or None for a process that was started alone; and why variables that are set do not count, if so.
    """
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ[name] for name in (*needed, "LOCAL_RANK") if os.environ.get(name)}
    text = ", ".join(f"{name}={value}" for name, value in given.items())
    if missing := [name for name in needed if name not in given]:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        is_alone = all(given.get(name, value) == value for name, value in alone.items())
        return None, None if is_alone else f"{text}, but not {', '.join(missing)}"
    rank, world_size, port = _number("RANK"), _number("WORLD_SIZE"), _number("MASTER_PORT")
    local_rank = _number("LOCAL_RANK") if "LOCAL_RANK" in given else rank
    if rank is None or world_size is None or local_rank is None or port is None or not rank < world_size:
        return None, f"{text}, which do not fit together"
    restarts = _number("TORCHELASTIC_RESTART_COUNT") or 0
    return Launch(rank=rank, world_size=world_size, local_rank=local_rank, restarts=restarts), None


def _number(name: str) -> int | None:
    """The value of an environment variable, if it is a whole number from 0."""
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else None


def rank() -> int:
    """Rank of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def processes_on_machine() -> int:
    """Number of processes on this machine, as far as the launcher says; otherwise of all."""
    return min(_number("LOCAL_WORLD_SIZE") or world_size(), world_size())


def is_main() -> bool:
    """Whether this is rank 0, which prints and writes files. Also correct before the process group exists."""
    if dist.is_initialized():
        return dist.get_rank() == 0
    launch, _ = read_launch()
    return launch is None or launch.rank == 0


def all_gather(value: T) -> list[T]:
    """The `value` of each rank, in order of rank, on all ranks. Values are pickled."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def run_on_all_ranks(work: Callable[[], T]) -> T:
    """Call `work` on all ranks, and return its result. If it raises on one rank, all ranks raise, so that none waits.

    Raises:
        Exception: whatever `work` raises on this rank.
        RuntimeError: with the message of the other rank, if `work` raised there.
    """
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    messages = all_gather(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for process, message in enumerate(messages):
        if message:
            raise RuntimeError(f"process {process} of {world_size()} failed: {message}")
    return result


def broadcast_from_rank0(work: Callable[[], T]) -> T:
    """Call `work` on rank 0 only, and return its result on all ranks. Raises on all ranks if `work` raises."""
    result: list[Any] = [run_on_all_ranks(lambda: work() if rank() == 0 else None)]
    if world_size() > 1:
        dist.broadcast_object_list(result)
    return result[0]


def check_same_on_all_ranks(values: Mapping[str, Any]) -> None:
    """Raise ValueError on all ranks unless each named value is the same on all of them.

    The message gives the name, both values and the rank. The names complete "the processes differ in".
    """
    by_rank = all_gather(dict(values))
    for name, expected in by_rank[0].items():
        for process, others in enumerate(by_rank):
            if others.get(name) != expected:
                raise ValueError(
                    f"the processes differ in {name}: {expected!r} on process 0, {others.get(name)!r} on process "
                    f"{process}; start all of them with the same flags, data and installation"
                )


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the process group of torchrun, if there is one, and destroy it on exit.

    Logs a warning if environment variables of a launcher are set that do not count (see `read_launch`).

    Objects that hold the group, such as DistributedDataParallel, must be deleted before the exit, so create them in a
    function called inside the context. Otherwise Python may destroy the group while it holds the GIL and deadlock with
    a gloo thread that needs the GIL to release its last tensor.
    """
    launch, ignored = read_launch()
    if ignored:
        logger.warning(
            f"running as a single process: the environment has {ignored}; unset these, or start with torchrun"
        )
    if launch is None or launch.world_size == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank_here, processes = next(rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # On one machine torchrun reuses the store after a restart, with the addresses of the dead processes in it.
        store = dist.PrefixStore(str(launch.restarts), store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank_here, world_size=processes)
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # the frames hold the group, too
        raise
    finally:
        dist.destroy_process_group()
