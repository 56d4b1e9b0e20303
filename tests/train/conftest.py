import pytest
from tiny import write_some_digits


@pytest.fixture(scope="session")
def tiny_digits(tmp_path_factory):
    # 3 x 13 = 39 images are two batches of 14 and a rest.
    return write_some_digits(tmp_path_factory.mktemp("digits"), classes=3, train=13, val=3)
