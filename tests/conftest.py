"""What every test runs under."""

import atexit
import gc
import os
import shutil
import tempfile

import pytest
import torch

from localvit_cli.allocator import keep_freed_memory

# Test processes that compile the same code at once must not read each other's half-written files.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="localvit-inductor-")
atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

gc.disable()  # while the tests' modules are imported

# As every command does, and so does the first test that runs one: new pages for each map take a tenth of the time.
keep_freed_memory()


def pytest_collection_finish():
    """What is imported by now stays, and need not be searched for garbage again and again."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def few_threads():
    """Two cores serve several test processes."""
    torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Escape what is not Unicode in captured output, such as names of files: pytest-xdist could not send it."""
    report = yield
    report.sections = [
        (title, text.encode(errors="backslashreplace").decode(errors="replace")) for title, text in report.sections
    ]
    return report
