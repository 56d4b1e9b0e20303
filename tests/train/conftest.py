import logging
from importlib.util import find_spec

import pytest
from tiny import write_some_digits


@pytest.fixture(autouse=True)
def log_level(caplog):
    """`caplog` records what localvit logs, from INFO on."""
    caplog.set_level(logging.INFO, logger="localvit")


@pytest.fixture(scope="session")
def tiny_digits(tmp_path_factory):
    # 3 x 13 = 39 images are two batches of 14, with 11 images left.
    return write_some_digits(tmp_path_factory.mktemp("digits"), classes=3, train=13, val=3)


@pytest.fixture(autouse=True)
def without_curves(monkeypatch, request):
    """Drawing curves.png takes longer than these epochs; test_trackers.py and tests/cli draw them."""
    if request.module.__name__ != "test_trackers" and find_spec("matplotlib") is not None:
        monkeypatch.setattr("localvit.train.curves.draw_curves", lambda log, path, title: path)
