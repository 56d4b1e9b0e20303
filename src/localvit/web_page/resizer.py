"""Resizing and cropping as a model of its own, so that the page can show the image that the model is given.

Shapes: H and W height and width of the image, h and w those of the model's input, in pixels.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.export import Dim

from localvit.data.preprocessing import Preprocessing
from localvit.exporters.proof import drawn_images
from localvit.exporters.resizing import ResizeAndCrop
from localvit.inference.quiet import quiet
from localvit.inference.runtimes import OnnxRuntime

OPSET = 20


class _Resizer(nn.Module):
    """Images (1, 3, H, W) to (1, 3, h, w), both uint8."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.resize = ResizeAndCrop(preprocessing)

    def forward(self, images: Tensor) -> Tensor:
        return self.resize(images.float()).byte()


def write_resizer(preprocessing: Preprocessing, path: Path) -> None:
    """Write an ONNX file that resizes and crops one image of any size, exactly as evaluation does it.

    Raises ValueError for preprocessing that the graph cannot do (see `ResizeAndCrop`), and RuntimeError if the file
    gives other pixels than PIL.
    """
    height, width = preprocessing.input_size
    example = torch.zeros(1, 3, height + 37, width + 61, dtype=torch.uint8)
    with quiet():
        program = torch.export.export(
            _Resizer(preprocessing).eval(), (example,), dynamic_shapes={"images": {2: Dim.AUTO, 3: Dim.AUTO}}
        )
        onnx_program = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, input_names=["images"], output_names=["seen"], verbose=False
        )
        assert onnx_program is not None
        onnx_program.save(path, external_data=False)
    _prove(path, preprocessing)


def _prove(path: Path, preprocessing: Preprocessing) -> None:
    height, width = preprocessing.input_size
    runtime, expected = OnnxRuntime(path), preprocessing.resizing()
    for shape in ((2 * height + 3, 3 * width), (4 * height + 11, width + 5), (height // 2 + 1, width), (height, width)):
        image_1CHW = drawn_images(1, *shape)
        seen = np.asarray(expected(Image.fromarray(image_1CHW[0].transpose(1, 2, 0))))
        if not np.array_equal(runtime.run(image_1CHW)[0].transpose(1, 2, 0), seen):
            raise RuntimeError(f"{runtime.name} resizes an image of {shape[1]} x {shape[0]} pixels otherwise than PIL")
