"""Programs run on a pseudo terminal."""

import os
import subprocess
import sys

import pytest


def run_on_terminal(program: str, *, columns: int, outputs: tuple[str, ...] = ("stdout", "stderr")) -> tuple[str, str]:
    """Run Python source on a terminal that many columns wide; skips the test where there are no pseudo terminals.

    Args:
        program: Python source.
        columns: Width of the terminal.
        outputs: Which of "stdout" and "stderr" are the terminal; the other one is a pipe.

    Returns:
        What the terminal got, and what the pipe got.
    """
    pty = pytest.importorskip("pty")
    termios = pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    streams = {name: theirs if name in outputs else subprocess.PIPE for name in ("stdout", "stderr")}
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", program], **streams, text=True, env=environment)
    os.close(theirs)
    shown = b""
    while chunk := _read(ours):
        shown += chunk
    os.close(ours)
    out, err = process.communicate()
    text = shown.decode().replace("\r\n", "\n")
    assert process.returncode == 0, (text, out, err)
    return text, out or err or ""


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # how Linux reports that the other end is closed
        return b""
