"""The programs in benchmarks/ keep up with the package: what they import is there."""

import runpy
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))
OWN = {"localvit", *(path.stem for path in FILES)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_it_imports_is_there(path):
    try:
        found = runpy.run_path(str(path))
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] in OWN:
            raise
        pytest.skip(f"needs {error.name}, which is not installed")
    assert found["__doc__"]
