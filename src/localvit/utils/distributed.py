"""The few words of torch.distributed that the package needs, true in a single process too."""

import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process speaks and writes for all; true to torchrun's word before the processes have met, too."""
    return int(os.environ.get("RANK", "0")) == 0


def gather(value: Any) -> list[Any]:
    """Every process's `value`, in order of rank, on every process. Values are pickled between one's own processes."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def together(work: Callable[[], Any]) -> Any:
    """What `work` returns here; where it raises on any process, all of them stop, and none waits for another.

    Raises what `work` raises here, or RuntimeError with what it raised elsewhere.
    """
    failure: Exception | None = None
    result = None
    try:
        result = work()
    except Exception as error:
        failure = error
    told = gather(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for process, words in enumerate(told):
        if words:
            raise RuntimeError(f"process {process} of {world_size()} failed: {words}")
    return result


def broadcast_from_rank0(work: Callable[[], Any]) -> Any:
    """What `work` returns on the first process, which alone calls it, on every process."""
    told = [together(lambda: work() if rank() == 0 else None)]
    if world_size() > 1:
        dist.broadcast_object_list(told)
    return told[0]


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Raise ValueError on every process, naming what differs and where, unless all processes hold the same facts."""
    everyone = gather(dict(facts))
    for name in everyone[0]:
        for process, theirs in enumerate(everyone):
            if theirs.get(name) != everyone[0][name]:
                raise ValueError(
                    f"the processes disagree about {name}: {everyone[0][name]!r} on process 0, {theirs.get(name)!r} on "
                    f"process {process}; start them all with the same flags, data and installation"
                )


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, if it did; leave them at the end.

    Whatever holds the group, like DistributedDataParallel, must be gone by then, so it belongs to a function called
    inside: were it the last to let go of the group, it would do so under Python's lock, which a thread of gloo may be
    waiting for to let go of its last tensor, while it is itself waited for.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank_here, processes = next(rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # torchrun keeps one store over its restarts of one machine's processes, with the addresses of the dead in it.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank_here, world_size=processes)
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold it too
        raise
    finally:
        dist.destroy_process_group()
