"""Standard output and standard error as a command uses them: closed, full, without a reader, in any encoding.

Results go to standard output, messages and progress to standard error. What cannot be written to standard error is
dropped, because the work matters more. A reader of standard output that goes away needs no more results, as `head`
does, which ends a command that only prints them.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO


class OutputClosed(Exception):
    """The reader of standard output went away. What is printed afterwards is dropped."""


class _Stream:
    """A text stream in which characters that its encoding lacks are written as backslash escapes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._attempt(self._stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Any, *arguments: str) -> None:
        raise NotImplementedError

    def _discard(self) -> None:
        """Let all that is written from now on, also by libraries and worker processes, go nowhere."""
        with suppress(OSError, ValueError):  # a stream of a test has no descriptor
            descriptor = self._stream.fileno()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)


class _Output(_Stream):
    """Standard output. Raises OutputClosed if nobody reads it, and OSError if it cannot be written."""

    def _attempt(self, action: Any, *arguments: str) -> None:
        try:
            action(*arguments)
        except BrokenPipeError as error:
            self._discard()
            raise OutputClosed from error
        except OSError as error:
            self._discard()
            raise OSError(f"standard output cannot be written: {error.strerror or error}") from error


class _Messages(_Stream):
    """Standard error. Drops what cannot be written."""

    def _attempt(self, action: Any, *arguments: str) -> None:
        try:
            action(*arguments)
        except BlockingIOError:
            pass  # its reader is slow, and may catch up
        except (OSError, ValueError):
            self._discard()


@contextmanager
def standard_streams() -> Iterator[None]:
    """Replace `sys.stdout` and `sys.stderr` by streams as described above, for the duration of the context."""
    _open_closed_descriptors()
    before = sys.stdout, sys.stderr
    with Path(os.devnull).open("w", encoding="utf-8") as null:
        output, messages = _Output(before[0] or null), _Messages(before[1] or null)
        sys.stdout, sys.stderr = output, messages  # type: ignore[assignment]
        try:
            yield
        finally:
            with suppress(OutputClosed, OSError):
                output.flush()  # Python would print a traceback if this failed at its exit
            messages.flush()
            sys.stdout, sys.stderr = before


def _open_closed_descriptors() -> None:
    """Open the standard descriptors that are closed, so that no file gets their numbers, and with them messages."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


@contextmanager
def flushed_output() -> Iterator[None]:
    """Flush standard output at the end of the context, so that errors appear there, and not at Python's exit."""
    try:
        yield
    except SystemExit:  # after --help
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def printable(text: str) -> str:
    """One line of text with control characters and invalid UTF-8 escaped, so that it cannot affect a terminal."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def printable_lines(text: str) -> str:
    """The same for text of several lines."""
    return "\n".join(map(printable, text.split("\n")))
