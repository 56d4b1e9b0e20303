"""Files that appear whole or not at all, and their hashes."""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `path` at the end of the block.

    If the block raises, the previous file stays. A missing folder is created. The content is flushed to disk before the
    file is renamed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        temporary.touch()
        default_mode = temporary.stat().st_mode  # some writers make their files readable by the owner only
        yield temporary
        temporary.chmod(default_mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno == errno.ENOSPC and error.filename is None:
            error.filename = str(path)  # writing to an open file does not name it
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise OSError if `atomic_write(path)` would fail, so that a command can stop before hours of work.

    A missing folder is created.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror or error}): choose another path") from error


def sha256_of(path: Path) -> str:
    """The hash of a file's contents, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
