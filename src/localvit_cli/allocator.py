"""How the C library keeps memory between uses, which decides how fast large maps come on the CPU."""

import ctypes
import os
import sys
from typing import Any

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next allocation; does nothing with another C library.

    By default it gives maps of some megabytes back to the system at once and has each new one zeroed page by page,
    which takes a quarter of a forward's time (`docs/performance.md`). MALLOC_TRIM_THRESHOLD_, MALLOC_TOP_PAD_ and
    MALLOC_MMAP_THRESHOLD_ in the environment are left in force.
    """
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    libc.mallopt(_MMAP_THRESHOLD, 2**30) or libc.mallopt(_MMAP_THRESHOLD, 2**25)  # an older glibc's largest
    libc.mallopt(_TRIM_THRESHOLD, _LARGEST)
    libc.mallopt(_TOP_PAD, 2**26)
