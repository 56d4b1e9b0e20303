"""A model traced with the size left open computes other sizes too."""

import pytest
import torch
from small import ONE_OF_EACH, image_size, small_model
from torch import nn
from torch.export import Dim


def assert_sizes_are_open(model: nn.Module, traced_at: int, own: int) -> None:
    """Traced at one size, the model computes what it computes itself at its own size and at one that is not square."""
    sizes = {"x": {2: Dim.AUTO, 3: Dim.AUTO}}
    traced = torch.export.export(model, (torch.zeros(2, 3, traced_at, traced_at),), dynamic_shapes=sizes).module()
    for height, width in ((own, own), (2 * own, own + 32)):
        images = torch.randn(2, 3, height, width)
        with torch.inference_mode():
            torch.testing.assert_close(traced(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in ONE_OF_EACH if "pvt" in name or "tnt" in name])
def test_positions_follow_the_size_of_a_traced_model(name):
    torch.manual_seed(0)
    assert_sizes_are_open(small_model(name).eval(), image_size(name), image_size(name))


@pytest.mark.parametrize("traced_at", [96, 100])  # maps of whole windows, and others
def test_windows_follow_the_size_of_a_traced_model(traced_at):
    torch.manual_seed(0)
    [name] = [name for name in ONE_OF_EACH if "swin" in name]
    model = small_model(name, depths=(2,), num_heads=(1,), window_size=3).eval()
    assert_sizes_are_open(model, traced_at, image_size(name))
