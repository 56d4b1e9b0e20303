"""Programs run on a pseudo terminal."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from processes import run_source, start, status_of


def run_on_terminal(
    program: str, folder: Path, *, columns: int, outputs: tuple[str, ...] = ("out", "err")
) -> tuple[str, str]:
    """Run Python source on a terminal that many columns wide; skips the test where there are no pseudo terminals.

    Args:
        program: Python source.
        folder: An empty folder for its other output.
        columns: Width of the terminal.
        outputs: Which of "out" and "err" are the terminal; the other one is a file.

    Returns:
        What the terminal got, and what the file got.
    """
    pty = pytest.importorskip("pty")
    termios = pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    file = folder / "other output"
    file.touch()
    out, err = (os.ttyname(theirs) if name in outputs else file for name in ("out", "err"))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"TERM": "xterm"}
    process = start(run_source, program, out=out, err=err, environment=environment)
    with ThreadPoolExecutor() as pool:  # a terminal holds a few kB only
        reading = pool.submit(_read_all, ours)
        status = status_of(process)
        os.close(theirs)
        shown = reading.result()
    os.close(ours)
    text = shown.decode().replace("\r\n", "\n")
    assert status == 0, (text, file.read_text())
    return text, file.read_text()


def _read_all(terminal: int) -> bytes:
    shown = b""
    try:
        while chunk := os.read(terminal, 4096):
            shown += chunk
    except OSError:  # how Linux reports that the other end is closed
        pass
    return shown
