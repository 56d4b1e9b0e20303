"""Files and folders that appear whole or not at all, their sizes and their hashes."""

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


def put_in_place(written: Path, path: Path) -> None:
    """Rename a written file or folder to `path`, instead of what is there, which stays if that fails.

    A folder that was there is moved into the folder of `written`, for the caller to delete.
    """
    if not path.is_dir():
        written.replace(path)
        return
    replaced = path.replace(written.with_name(f"replaced.{path.name}"))
    try:
        written.replace(path)
    except OSError:
        replaced.replace(path)
        raise


def check_writable(path: Path, *, folder: bool = False) -> None:
    """Raise OSError if `path` cannot be written, so that a command can stop before hours of work.

    It may be a file that is there, or, with `folder`, a folder. A missing folder around it is created.
    """
    try:
        if path.is_dir() and not folder:
            raise IsADirectoryError("it is a folder")
        if path.is_file() and folder:
            raise NotADirectoryError("it is a file, and a folder is to be written")
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror or error}): choose another path") from error


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in _files_in(path))


def sha256_of(path: Path) -> str:
    """The hash of a file's contents, in hexadecimal.

    Of a folder, the hash of the lines that `sha256sum` prints for its files, by their sorted paths in it.
    """
    if path.is_dir():
        lines = [f"{sha256_of(file)}  {file.relative_to(path).as_posix()}\n" for file in _files_in(path)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files_in(folder: Path) -> list[Path]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())
