"""`localvit eval --explain`: what the model looks at in the mistakes that the report lists."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from localvit.data.images import Images
from localvit.evaluation.evaluate import Evaluation
from localvit.evaluation.report.mistakes import ExplainedImage, worst_mistakes
from localvit.explanations import class_overlays, layers_of
from localvit.inference.runner import InferenceOptions, LoadedModel
from localvit_cli import UsageError

if TYPE_CHECKING:
    from localvit_cli.eval import Eval

BATCH_SIZE = 8
"""Gradients need several times the memory of an evaluation, and there are few images."""


def check_explainable(command: "Eval", loaded: LoadedModel) -> None:
    """Raise UsageError, before the evaluation, if mistakes are to be explained of a model that cannot be."""
    if not command.explain:
        return
    try:
        layers_of(loaded.model)
    except ValueError as error:
        raise UsageError(f"--explain: {error}") from error


def explain_mistakes(
    loaded: LoadedModel, evaluation: Evaluation, images: Images, options: InferenceOptions
) -> dict[int, ExplainedImage]:
    """The class activation maps of the mistakes that the report lists, by their position in the evaluation."""
    position_of = {evaluation.paths[position]: position for position in worst_mistakes(evaluation)}
    classes, positions = {}, {}
    for index in range(len(images)):
        if (position := position_of.get(images.name(index))) is not None:
            true, predicted = evaluation.labels_N[position], evaluation.top_classes_NK[position, 0]
            classes[index], positions[index] = (int(true), int(predicted)), position
    # The model as it was trained, in float32: in half precision small gradients would become zero.
    options = replace(
        options,
        dtype=torch.float32,
        fuse=False,
        compile=False,
        workers=0,
        batch_size=min(options.images_per_batch, BATCH_SIZE),
    )
    found = class_overlays(loaded, images, classes, options)
    return {
        positions[index]: ExplainedImage(image=image, true_map=true, predicted_map=predicted)
        for index, (image, true, predicted) in found.items()
    }
