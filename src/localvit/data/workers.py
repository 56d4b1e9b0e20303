"""Worker processes that decode images: how they start and stop without tracebacks."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from torch.utils.data import DataLoader

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
STOP_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
"""Signals that ask a program to stop: Ctrl-C, a scheduler's stop, a terminal that closes, and the advance warnings of
SLURM, LSF and Grid Engine."""

_GRACE_SECONDS = 10.0


@contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Block the stop signals until the worker processes have started and run `init_worker`."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def init_worker(worker: int) -> None:
    """Leave stopping a worker process to its parent, and print no traceback if the parent is gone.

    For `DataLoader(worker_init_fn=...)`. Without it, an interrupted worker prints a traceback. If a scheduler stops the
    worker and its parent at the same time, the worker keeps running for a while, because the parent needs it to finish
    the current step and save.
    """

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if not issubclass(kind, ConnectionError | EOFError):
            sys.__excepthook__(kind, error, traceback)

    def exit_later(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))
        signal.setitimer(signal.ITIMER_REAL, _GRACE_SECONDS)

    sys.excepthook = hook
    if hasattr(signal, "pthread_sigmask"):
        for number in STOP_SIGNALS:
            signal.signal(number, exit_later if number == signal.SIGTERM else signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def iterate_batches(loader: DataLoader) -> Iterator[Any]:
    """Iterate over a loader. Raises RuntimeError, with advice, if a worker process dies."""
    try:
        with _stop_signals_blocked():
            batches = iter(loader)
        yield from batches
    except RuntimeError as error:
        if "exited unexpectedly" in str(error) or ("worker" in str(error) and "killed" in str(error)):
            raise RuntimeError(
                "a worker process that decodes images died (out of memory, or killed); try fewer --workers"
            ) from error
        raise
