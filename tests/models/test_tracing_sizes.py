"""A model traced at its own image size with the size left open computes other sizes too."""

import pytest
import torch
from small import ONE_OF_EACH, image_size, small_model
from torch.export import Dim


@pytest.mark.parametrize("name", [name for name in ONE_OF_EACH if "pvt" in name or "tnt" in name])
def test_positions_follow_the_size_of_a_traced_model(name):
    torch.manual_seed(0)
    model, own = small_model(name).eval(), image_size(name)
    sizes = {"x": {2: Dim.AUTO, 3: Dim.AUTO}}
    traced = torch.export.export(model, (torch.zeros(2, 3, own, own),), dynamic_shapes=sizes).module()
    for height, width in ((own, own), (2 * own, own + 32)):
        images = torch.randn(2, 3, height, width)
        with torch.inference_mode():
            torch.testing.assert_close(traced(images), model(images), rtol=1e-4, atol=1e-5)
