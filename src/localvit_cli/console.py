"""Messages and progress for the person who runs a command, on standard error."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from localvit_cli.streams import printable_lines

_LOGGERS = ("localvit", "localvit_cli")
_SECONDS_BETWEEN_LINES = 10

logger = logging.getLogger(__name__)


class Advance(Protocol):
    """Adds to the count of finished items; `note` is a short status text, such as the current epoch."""

    def __call__(self, done: int, note: str = "") -> None: ...


class _Handler(logging.Handler):
    """Prints messages as plain lines, with "warning: " or "error: " before those levels, from the first process only.

    `sys.stderr` is looked up for each message, because the progress bar replaces it while it is shown.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if not _is_first_process():
            return
        try:
            level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
            print(printable_lines(f"{level}{self.format(record)}"), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """Print what localvit logs, from level INFO on, to standard error for the duration of the context."""
    handler = _Handler()
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.addHandler(handler)
        each.setLevel(logging.INFO)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.removeHandler(handler)
            each.setLevel(level)


def _is_first_process() -> bool:
    # Imports torch, for which `localvit --help` must not wait. Whatever has something to log has imported it already.
    from localvit.utils.distributed import is_main

    return is_main()


@contextmanager
def progress(title: str, total: int | None, unit: str = "images", *, processes: int = 1) -> Iterator[Advance]:
    """Show progress: a bar with rate and time left on a terminal, otherwise a line every 10 seconds.

    Args:
        title: What is being done, such as "train".
        total: Number of items to do, by all processes; None if it is unknown.
        unit: What the items are.
        processes: Number of processes that share the items, if each counts its own.

    Yields a function to call with the number of items finished since the last call.
    """
    if not _is_first_process():
        yield lambda done, note="": None
    elif sys.stderr.isatty():
        with _bar(title, total, unit) as advance:
            yield _for_all(advance, total, processes)
    else:
        yield _for_all(_lines(title, total, unit), total, processes)


def _for_all(advance: Advance, total: int | None, processes: int) -> Advance:
    """Count each item of this process for all of them: every process has the same number, up to one."""
    finished = 0

    def advance_all(done: int, note: str = "") -> None:
        nonlocal finished
        before, finished = finished, finished + done * processes
        finished = finished if total is None else min(finished, total)
        if finished > before or not done:  # processes with shares of different sizes reach the total early
            advance(finished - before, note)

    return advance_all


@contextmanager
def _bar(title: str, total: int | None, unit: str) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}"),
        TextColumn("{task.fields[note]}"),
        BarColumn(bar_width=8),  # narrow, so that everything fits into 80 columns
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    # rich would send what is printed to a redirected standard output to the terminal instead.
    same_terminal = sys.stdout.isatty()
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=same_terminal) as bar:
        task = bar.add_task(title, total=total, rate="", note="")

        def advance(done: int, note: str = "") -> None:
            bar.update(task, advance=done, note=note)
            if speed := bar.tasks[0].speed:
                bar.update(task, rate=f"{_rate_text(speed)} {unit}/s")

        yield advance


def _lines(title: str, total: int | None, unit: str) -> Advance:
    started = last_line = time.monotonic()
    finished = 0

    def advance(done: int, note: str = "") -> None:
        nonlocal finished, last_line
        finished += done
        now = time.monotonic()
        if now - last_line >= _SECONDS_BETWEEN_LINES or finished == total:
            last_line = now
            rate = finished / max(now - started, 1e-9)
            task = f"{title} {note}".rstrip()
            if total is None:
                logger.info(f"{task}: {finished:,} {unit}, {_rate_text(rate)}/s")
                return
            left = (total - finished) / max(rate, 1e-9)
            logger.info(f"{task}: {finished:,} of {total:,} {unit}, {_rate_text(rate)}/s, {left:,.0f} s left")

    return advance


def _rate_text(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
