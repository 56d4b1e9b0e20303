"""A value that belongs to one forward pass: each thread has its own, and so does each nested call."""

import threading
from typing import Any


class PerCall(threading.local):
    """Holds a value for the forward pass in progress. A module keeps one as a plain attribute.

    A value that a module writes in its forward must not be a plain attribute of the module: other threads would read
    it, and the replicas of `nn.DataParallel`, whose attributes are copied before their forward, would not. All of
    them share this object, and every thread sees its own `value`. `begin` and `end` enclose a call that may be made
    while another one is in progress in the same thread. Copied or unpickled, it starts empty.
    """

    def __init__(self) -> None:  # Runs in each thread.
        self.value: Any = None
        self.outer: tuple[Any, ...] = ()
        """Values of the calls in progress around this one, outermost first."""

    def begin(self, value: Any = None) -> None:
        """Start a call with this value. What was set before is back after `end`."""
        self.outer = (*self.outer, self.value)
        self.value = value

    def end(self) -> None:
        """End the call that `begin` started."""
        if self.outer:
            self.value = self.outer[-1]
            self.outer = self.outer[:-1]

    def __reduce__(self) -> tuple[type["PerCall"], tuple[()]]:
        return type(self), ()
