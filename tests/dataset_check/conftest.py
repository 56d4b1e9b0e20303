"""A data set that the tests of its check begin with."""

from pathlib import Path

import pytest
from data_sets import GOOD, save, scene


@pytest.fixture
def root(tmp_path) -> Path:
    """A data set that nothing is wrong with."""
    for number, path in enumerate(GOOD):
        save(tmp_path / "data" / f"{path}.png", scene(number))
    return tmp_path / "data"
