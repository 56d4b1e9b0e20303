"""Freed memory stays with the process, which shows in the page faults of later allocations."""

import ctypes
import os
import subprocess
import sys

import pytest

MEGABYTES = 12
ROUNDS = 20
PROGRAM = f"""
import ctypes, resource, sys
from localvit_cli.allocator import keep_freed_memory

if "keep" in sys.argv:
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def use_and_free():
    # Three blocks at once, freed in order, like the feature maps of a forward pass.
    blocks = [libc.malloc({MEGABYTES} << 20) for _ in range(3)]
    for block in blocks:
        ctypes.memset(block, 1, {MEGABYTES} << 20)
    for block in blocks:
        libc.free(block)

use_and_free()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({ROUNDS}):
    use_and_free()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

pytestmark = pytest.mark.skipif(
    not (sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")), reason="the C library is not glibc"
)


def faults(*arguments, **environment):
    bare = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, env=bare | environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_freed_memory_is_reused():
    pages = ROUNDS * 3 * MEGABYTES * 2**20 // os.sysconf("SC_PAGESIZE")
    assert faults("keep") < pages / 20
    assert faults() > pages / 2


def test_malloc_settings_in_the_environment_have_priority():
    assert faults("keep", MALLOC_MMAP_THRESHOLD_="65536") > faults("keep") * 10
