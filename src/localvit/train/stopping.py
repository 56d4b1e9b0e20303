"""Asking a run to end: the signals that mean it, noted, so that the run can save itself first."""

import signal
import threading
from types import FrameType

from localvit.data.workers import STOP_SIGNALS


class Stopped(Exception):
    """The run has ended on a signal, with its state saved."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_status = 128 + number
        """What shells report of a process that the signal ended."""


class StopRequest:
    """Notes SIGINT, SIGTERM and SIGUSR1 (SLURM's usual warning) while it is entered; a second one acts as ever."""

    def __init__(self) -> None:
        self.number = 0
        """The signal that came; 0 while none did."""
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # Python hears signals nowhere else
            self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, self._before[number])  # type: ignore[arg-type]
