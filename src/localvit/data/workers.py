"""Worker processes that decode images: how they start and stop without tracebacks."""

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.util import get_temp_dir
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from torch.utils.data import DataLoader

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
STOP_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
"""Signals that ask a program to stop: Ctrl-C, a scheduler's stop, a terminal that closes, and the advance warnings of
SLURM, LSF and Grid Engine."""

_GRACE_SECONDS = 10.0
_LONGEST_SOCKET_PATH = 103
"""Bytes in the path of a socket on macOS; Linux allows 107."""
_SOCKET_NAME = "/pymp-xxxxxxxx/listener-xxxxxxxx"
"""What multiprocessing adds to the folder for temporary files."""


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


def _prepare_socket_folder() -> None:
    """Create the folder of the sockets through which worker processes send batches.

    The workers inherit it. If each created its own, an error would end a thread of the worker only, and the program
    would wait for its batch without end. Where the usual folder has too long a path for a socket, the system's is used.

    Raises OSError if no folder can be used.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows, which uses pipes
        return
    usual = tempfile.gettempdir()
    candidates = [folder for folder in (usual, "/tmp", "/var/tmp") if _fits(folder + _SOCKET_NAME)]
    if candidates:
        before, tempfile.tempdir = tempfile.tempdir, next(filter(_is_writable, candidates), candidates[0])
        try:
            Path(get_temp_dir()).mkdir(mode=0o700, exist_ok=True)  # again, if a cleaner of old files removed it
        finally:
            tempfile.tempdir = before
    if not candidates or not _fits(get_temp_dir() + _SOCKET_NAME.removeprefix("/pymp-xxxxxxxx")):
        raise OSError(
            f"the folder for temporary files, {usual}, has too long a path for the sockets of worker processes: set "
            "TMPDIR to a shorter one, or use --workers 0"
        )


def _fits(socket: str) -> bool:
    return len(os.fsencode(socket)) <= _LONGEST_SOCKET_PATH


def _is_writable(folder: str) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def iterate_batches(loader: DataLoader) -> Iterator[Any]:
    """Iterate over a loader. Raises RuntimeError, with advice, if a worker process dies.

    Raises OSError if worker processes have no folder for their sockets.
    """
    if loader.num_workers:
        _prepare_socket_folder()
    try:
        with _stop_signals_blocked():
            batches = iter(loader)
        yield from batches
    except RuntimeError as error:
        if "exited unexpectedly" in str(error) or ("worker" in str(error) and "killed" in str(error)):
            raise RuntimeError(
                "a worker process that decodes images died (out of memory or of shared memory, /dev/shm, or killed); "
                "try fewer --workers"
            ) from error
        raise
