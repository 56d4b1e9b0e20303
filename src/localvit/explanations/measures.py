"""What locality does to a trained model: how far it looks, and what it loses without its neighbors.

Shapes: B images, M attention heads, H and W an image in pixels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from localvit.data.classes import match_classes
from localvit.data.images import DataError, Images, ImageSequence
from localvit.explanations.attention import attention_maps
from localvit.explanations.cam import logits_of
from localvit.explanations.distance import (
    attention_distance,
    center_of,
    field_distance,
    mean_field,
    receptive_fields,
    share_nearby,
    uniform_distance,
)
from localvit.explanations.layers import Size, layers_of
from localvit.explanations.neighbors import local_layers, without_neighbors
from localvit.inference.runner import InferenceOptions, ModelSource, Runner
from localvit.utils.wrappers import unwrap

NUM_PROBES = 100
"""Images for attention distances and receptive fields, which change little with more."""


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How far the attention of one layer reaches."""

    layer: str
    pixels: tuple[float, ...]
    """Mean attention distance of each head, in pixels of the input."""
    uniform: float
    """That of attention to all patches (of a window) equally."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """The effective receptive field of one block's output at the center patch."""

    block: str
    squared_HW: Tensor
    """The mean squared gradient with respect to each pixel (`receptive_fields`)."""
    distance: float
    """Mean distance from the center patch, in pixels, weighted by the size of the gradient."""
    share_center: float
    """Share of the squared gradient in the center patch itself."""
    share_3x3: float
    """Share of the squared gradient in the center patch and its eight neighbors."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Accuracy with the neighbors of some locality modules set to zero."""

    without: tuple[str, ...]
    """Names of these modules; none for the model as trained."""
    correct: int
    change: float
    """Change of the accuracy by this, from 0 to 1, on the same images."""
    standard_error: float
    """Of the change, over images."""


@dataclass(frozen=True, kw_only=True)
class LocalityMeasures:
    """How far a model looks, and what the neighbors of its depth-wise convolutions contribute."""

    name: str
    """The model's."""
    num_images: int
    """Images that accuracy was measured on; 0 without labels."""
    num_probes: int
    """Images for reaches and fields."""
    image_size: Size
    local_layers: tuple[str, ...]
    """Names of the locality modules with a depth-wise convolution."""
    reaches: tuple[Reach, ...]
    fields: tuple[Field, ...]
    fields_without: tuple[Field, ...]
    """With all neighbors zero; empty for a model without locality."""
    accuracies: tuple[Accuracy, ...]
    """As trained, without the neighbors of one module after another, and of all; empty without labels."""


def measure_locality(
    model: ModelSource,
    images: ImageSequence,
    options: InferenceOptions | None = None,
    *,
    name: str | None = None,
    limit: int | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> LocalityMeasures:
    """Measure how far a model looks, and what the neighbors of its depth-wise convolutions contribute.

    The neighbors are set to zero at test time (`without_neighbors`). A model that was trained without them would have
    adapted: this shows what the trained model uses, not what it could not do without.

    Args:
        model: as in `localvit.predict`; a model without locality is measured as it is.
        images: images; if they are `Images` whose labels match the model's classes by name, accuracy is measured too.
        options: as in `localvit.predict`.
        name: what to call the model.
        limit: the number of images, taken at random with a fixed seed; by default all.
        done: called with the number of images of each batch that is finished.

    Raises:
        DataError: none of the images can be read.
        ValueError: for a model that is not supported (see `layers_of`), and a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1")
    runner = Runner.of(model, None, options)
    layers_of(runner.model)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:limit].tolist()
    label_of = _labels(images, runner)
    local = local_layers(runner.model)
    variants: list[tuple[str, ...]] = [(), *((layer,) for layer in local)]
    variants += [local] if len(local) > 1 else []
    models = [runner.model, *(without_neighbors(runner.model, layers) for layers in variants[1:])]
    right: list[list[Tensor]] = [[] for _ in models]
    probes: list[Tensor] = []
    for indices, images_BCHW in _batches(runner, images, chosen, done):
        if sum(map(len, probes)) < NUM_PROBES:
            probes.append(images_BCHW[: NUM_PROBES - sum(map(len, probes))])
        if label_of is None:
            if sum(map(len, probes)) >= NUM_PROBES:
                break
            continue
        labels_B = torch.tensor([label_of[index] for index in indices])
        with torch.inference_mode():
            for each, correct in zip(models, right, strict=True):
                correct.append(logits_of(unwrap(each)(images_BCHW)).argmax(1).cpu() == labels_B)
    if not probes:
        raise DataError("none of the images can be read")
    size = (probes[0].shape[-2], probes[0].shape[-1])
    return LocalityMeasures(
        name=name or type(unwrap(runner.model)).__name__,
        num_images=0 if label_of is None else sum(map(len, right[0])),
        num_probes=sum(map(len, probes)),
        image_size=size,
        local_layers=local,
        reaches=_reaches(runner.model, probes, size),
        fields=_fields(runner.model, probes, size),
        fields_without=_fields(models[-1], probes, size) if local else (),
        accuracies=() if label_of is None else _accuracies(variants, [torch.cat(each) for each in right]),
    )


def _labels(images: ImageSequence, runner: Runner) -> dict[int, int] | None:
    """The model's class of each image; None where the images have no labels that the model knows."""
    if not isinstance(images, Images):
        return None
    num_classes = int(getattr(unwrap(runner.model), "num_classes", 0))
    class_of = match_classes(images, runner.class_names, num_classes)
    return {index: class_of[label] for index, label in enumerate(images.labels)}


def _batches(
    runner: Runner, images: ImageSequence, chosen: list[int], done: Callable[[int], None]
) -> Iterator[tuple[list[int], Tensor]]:
    for indices, images_BCHW, failed in runner.load_batches(images, chosen):
        if images_BCHW is not None:
            yield indices, images_BCHW.to(runner.options.device)
        done(len(indices) + len(failed))


def _reaches(model: nn.Module, probes: list[Tensor], size: Size) -> tuple[Reach, ...]:
    totals: dict[str, Tensor] = {}
    uniform: dict[str, float] = {}
    for images_BCHW in probes:
        for each in attention_maps(model, images_BCHW):
            if not each.is_inner:
                totals[each.layer] = totals.get(each.layer, 0) + attention_distance(each, size).sum(0).cpu()
                uniform[each.layer] = uniform.get(each.layer) or uniform_distance(each, size)
    count = sum(map(len, probes))
    return tuple(
        Reach(layer=layer, pixels=tuple((total_M / count).tolist()), uniform=uniform[layer])
        for layer, total_M in totals.items()
    )


def _fields(model: nn.Module, probes: list[Tensor], size: Size) -> tuple[Field, ...]:
    parts = [receptive_fields(model, images_BCHW, seed=number) for number, images_BCHW in enumerate(probes)]
    found = []
    for block in layers_of(model).blocks:
        field_HW = mean_field([part[block.name] for part in parts], list(map(len, probes))).cpu()
        grid = block.grid(size).size
        found.append(
            Field(
                block=block.name,
                squared_HW=field_HW,
                distance=field_distance(field_HW, center_of(grid, size)),
                share_center=share_nearby(field_HW, grid, 0),
                share_3x3=share_nearby(field_HW, grid, 1),
            )
        )
    return tuple(found)


def _accuracies(variants: list[tuple[str, ...]], right: list[Tensor]) -> tuple[Accuracy, ...]:
    trained_N = right[0].double()
    found = []
    for without, right_N in zip(variants, right, strict=True):
        change_N = right_N.double() - trained_N
        error = float(change_N.std() / len(change_N) ** 0.5) if len(change_N) > 1 else 0.0
        found.append(
            Accuracy(without=without, correct=int(right_N.sum()), change=float(change_N.mean()), standard_error=error)
        )
    return tuple(found)
