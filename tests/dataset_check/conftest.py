"""A data set without problems, which the tests modify."""

from pathlib import Path

import pytest
from data_sets import GOOD, save, scene


@pytest.fixture
def root(tmp_path) -> Path:
    """A data set without problems."""
    for number, path in enumerate(GOOD):
        save(tmp_path / "data" / f"{path}.png", scene(number))
    return tmp_path / "data"
