"""What every test runs under."""

import sys
from pathlib import Path

import pytest
import torch

import localvit  # noqa: F401  (before anything imports timm: see localvit._torchvision)

sys.path.insert(0, str(Path(__file__).parent / "golden"))


@pytest.fixture(autouse=True)
def few_threads():
    """Two cores serve several test processes."""
    torch.set_num_threads(1)
