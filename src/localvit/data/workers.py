"""Worker processes that prepare images: they start, stop and die without noise."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from torch.utils.data import DataLoader

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""What asks a program to end: Ctrl-C, a scheduler, and SLURM's usual warning ahead of time."""


_GRACE_SECONDS = 10.0


@contextmanager
def _stop_signals_held() -> Iterator[None]:
    """Hold back what asks a program to end until worker processes have started and `leave_quietly` has run in them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_quietly(worker: int) -> None:
    """Let a worker process leave its ending to its parent, and say nothing when the parent has gone.

    An interrupted worker would print a traceback. One that a scheduler ends at the same time as its parent would fail
    the parent, which wants to finish its step and save: it goes on a while before it leaves.
    """

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if not issubclass(kind, ConnectionError | EOFError):
            sys.__excepthook__(kind, error, traceback)

    def leave_later(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))
        signal.setitimer(signal.ITIMER_REAL, _GRACE_SECONDS)

    sys.excepthook = hook
    if hasattr(signal, "pthread_sigmask"):
        for number in STOP_SIGNALS:
            signal.signal(number, leave_later if number == signal.SIGTERM else signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def loaded(loader: DataLoader) -> Iterator[Any]:
    """The loader's batches. Raises RuntimeError, saying what to do, when a worker process dies."""
    try:
        with _stop_signals_held():
            loading = iter(loader)
        yield from loading
    except RuntimeError as error:
        if "exited unexpectedly" in str(error) or ("worker" in str(error) and "killed" in str(error)):
            raise RuntimeError(
                "a process that decodes images died (out of memory, or killed); try fewer --workers"
            ) from error
        raise
