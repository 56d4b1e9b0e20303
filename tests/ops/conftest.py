"""A process that interprets the Triton kernels, shared by the tests of the operators."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import launches
import pytest


@pytest.fixture(scope="session")
def interpreted():
    """Runs a function in a process of its own, for Triton must know before its import that it is to interpret."""
    pytest.importorskip("triton", reason="Triton is not installed")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            try:
                pool.submit(launches.begin).result()
            except Exception as error:
                if "only 0-dimensional arrays can be converted" in str(error):
                    pytest.skip("this Triton's interpreter is older than this NumPy, and cannot run a loop on it")
                raise
        yield lambda function, *args: pool.submit(function, *args).result()
