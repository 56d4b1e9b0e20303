"""What every test runs under."""

import pytest
import torch


@pytest.fixture(autouse=True)
def few_threads():
    """Two cores serve several test processes."""
    torch.set_num_threads(1)
