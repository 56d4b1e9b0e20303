"""The graph that is exported: a model between its preprocessing and its softmax, traced by torch.export.

Shapes: B batch, H and W height and width in pixels, M classes.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from localvit.data.preprocessing import Preprocessing
from localvit.exporters.registry import Format
from localvit.exporters.resizing import ResampleByWeights, ResizeAndCrop
from localvit.inference.fusion import fuse, fuse_last_block
from localvit.inference.quiet import quiet
from localvit.inference.runtimes import AXES, input_shape_of
from localvit.models.positions import absolute_grids, img_size_of
from localvit.utils.wrappers import is_quantized, is_sharded, unwrap


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of a model, without wrappers, on the CPU, in float32 and in evaluation mode.

    Raises ValueError for a quantized or sharded model, and one without values.
    """
    model = unwrap(model)
    entries = model.state_dict()
    if is_sharded(entries) or is_quantized(entries):
        raise ValueError(
            f"{type(model).__name__} has sharded or quantized weights: export the model as it was before that"
        )
    if any(value.is_meta for value in entries.values()):
        raise ValueError(
            f"{type(model).__name__} is on the meta device, where it has no values: load its weights first"
        )
    return copy.deepcopy(model).cpu().float().eval()


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returns: a tensor, or an object of transformers.

    Raises ValueError for anything else, such as the features of a model without a head.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        what = (
            f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(output).__name__}"
        )
        raise ValueError(f"the model returns {what}, not logits (batch, classes): only classifiers can be exported")
    return logits


class ClassifierGraph(nn.Module):
    """Images to logits or probabilities (B, M); which steps it does itself is said by `settings.parts`."""

    mean: Tensor
    std: Tensor
    temperature = 1.0
    """What logits are divided by before the softmax."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, settings: Format) -> None:
        super().__init__()
        self.model = model
        self.parts, self.scale = settings.parts, 255.0 if settings.input_type == "uint8" else 1.0
        self.resize = ResizeAndCrop(preprocessing) if "resize" in self.parts else None
        for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        images = images.float()
        if self.resize is not None:
            pixels = images if self.scale == 255 else (images * 255).round()  # PIL resizes 8-bit images
            images = self.resize(pixels) / 255
        elif "preprocessing" in self.parts:
            images = images / self.scale
        if "preprocessing" in self.parts:
            images = (images - self.mean) / self.std
        logits = logits_of(self.model(images))
        if "softmax" not in self.parts:
            return logits
        return (logits if self.temperature == 1 else logits / self.temperature).softmax(1)


def build_graph(model: nn.Module, preprocessing: Preprocessing, settings: Format) -> ClassifierGraph:
    """The graph of a model that `plain_copy` returned. The model is changed.

    Where the size of its images is fixed, its position embeddings become those of that size, so that the graph does not
    resample them for each batch.
    """
    if settings.dynamic != "size":
        _fix_positions(model, preprocessing.input_size)
    if settings.fuse:
        model = fuse(model, inplace=True)
    else:
        fuse_last_block(model)
    return ClassifierGraph(model, preprocessing, settings).eval()


def _fix_positions(model: Any, size: tuple[int, int]) -> None:
    if absolute_grids(model) and img_size_of(model) != size and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=size)


def trace(graph: ClassifierGraph, settings: Format, size: tuple[int, int], multiple: int) -> ExportedProgram:
    """The graph as a program of torch.export, whose input is open where the settings say so.

    The example has another size than the model's own where the size is open: while torch traces, a model must not take
    a shortcut that holds for its own size only. It is larger, because torch takes a side of 1, such as the number of
    windows in a small map, for one that is always 1.

    Raises ValueError, with torch's reason, for a model that cannot be traced.
    """
    whole = "resize" in settings.parts
    height, width = size
    if settings.dynamic == "size":
        height, width = 2 * height + multiple, 2 * width + 2 * multiple
    elif whole:
        height, width = height + 37, width + 61
    is_uint8 = settings.has_uint8 and settings.input_type == "uint8" and "preprocessing" in settings.parts
    example = torch.zeros(1 if settings.dynamic == "none" else 2, 3, height, width)
    open_dims: dict[int, Any] = {}
    if settings.dynamic != "none":
        open_dims[0] = Dim.AUTO
    if settings.dynamic == "size" or whole:
        open_dims |= {2: Dim.AUTO, 3: Dim.AUTO}
    try:
        with quiet(), ResampleByWeights():
            program = torch.export.export(
                graph,
                (example.byte() if is_uint8 else example,),
                dynamic_shapes={"images": open_dims or None},
            )
    except Exception as error:  # torch raises many types for what it cannot trace
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"torch.export cannot trace {type(graph.model).__name__}: {reason.strip()[:300]}") from error
    _check_open(program, open_dims, type(graph.model).__name__)
    return program


def _check_open(program: ExportedProgram, open_dims: dict[int, Any], name: str) -> None:
    """Raise ValueError if tracing has fixed a dimension that was to stay open."""
    shape = input_shape_of(program)
    fixed = [AXES[dim] for dim in open_dims if shape[dim] is not None]
    if fixed:
        raise ValueError(
            f"{name} computes for one {' and '.join(fixed)} only: export it with less left open (--dynamic "
            f"{'none' if 'batch' in fixed else 'batch'})"
        )
