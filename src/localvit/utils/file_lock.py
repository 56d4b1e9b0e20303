"""A lock on a file that only one process can hold, and that ends with its process, however it ends."""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

fcntl: Any = None
msvcrt: Any = None
try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

logger = logging.getLogger(__name__)

_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_held: set[int] = set()


def _close_in_child() -> None:
    """A forked child shares its parent's lock, and would keep it after the parent was killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock on `path` during the block. The file is created, and remains.

    On a file system without locks, a warning is logged instead.

    Raises:
        BlockingIOError: if the lock is held already, by this or another process.
        OSError: if the file cannot be created.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(descriptor)
    try:
        _lock(descriptor, path)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    try:
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            logger.warning(f"{path.parent} is on a file system without locks: start only one run in this folder")
        elif fcntl:
            raise
        else:
            raise BlockingIOError(error.errno, error.strerror) from error
