import logging

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
