"""What a person is told while a command works: remarks and progress, on standard error."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from localvit.utils.distributed import is_main

_SECONDS_BETWEEN_LINES = 10


class Advance(Protocol):
    """Counts on by so many finished, with a few words on how it stands."""

    def __call__(self, done: int, note: str = "") -> None: ...


def say(message: str) -> None:
    """A line on standard error, from the first of the processes."""
    if is_main():
        print(message, file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: int, unit: str = "images") -> Iterator[Advance]:
    """A bar with rate and time left on a terminal, a line now and then elsewhere; yields a call that counts on."""
    if not is_main():
        yield lambda done, note="": None
    elif sys.stderr.isatty():
        with _bar(title, total, unit) as advance:
            yield advance
    else:
        yield _lines(title, total, unit)


@contextmanager
def _bar(title: str, total: int, unit: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        TextColumn("{task.fields[note]}"),
        BarColumn(bar_width=8),  # all of it fits into 80 columns
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, rate="", note="")

        def advance(done: int, note: str = "") -> None:
            bar.update(task, advance=done, note=note)
            if speed := bar.tasks[0].speed:
                bar.update(task, rate=f"{speed:,.0f} {unit}/s")

        yield advance


def _lines(title: str, total: int, unit: str) -> Advance:
    started = said = time.monotonic()
    finished = 0

    def advance(done: int, note: str = "") -> None:
        nonlocal finished, said
        finished += done
        now = time.monotonic()
        if now - said >= _SECONDS_BETWEEN_LINES or finished == total:
            said = now
            rate = finished / max(now - started, 1e-9)
            left = (total - finished) / max(rate, 1e-9)
            words = f"{title} {note}".rstrip()
            say(f"{words}: {finished:,} of {total:,} {unit}, {rate:,.0f}/s, {left:,.0f} s left")

    return advance
