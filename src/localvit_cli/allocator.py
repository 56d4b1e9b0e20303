"""Settings of the C library's memory allocator, which make large feature maps faster on the CPU."""

import ctypes
import os
import sys
from typing import Any

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # from glibc's malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next allocation. Does nothing with another C library.

    By default glibc returns blocks of some megabytes to the system at once, and the system zeroes each new one page by
    page, which takes a quarter of the time of a forward pass (see `docs/performance.md`). If the environment sets any
    MALLOC_ variable, nothing is changed.
    """
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    libc.mallopt(_MMAP_THRESHOLD, 2**30) or libc.mallopt(_MMAP_THRESHOLD, 2**25)  # the largest value of an older glibc
    libc.mallopt(_TRIM_THRESHOLD, _LARGEST)
    libc.mallopt(_TOP_PAD, 2**26)
