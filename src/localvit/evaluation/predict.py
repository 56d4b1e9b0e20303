"""Predict the classes of images, one after another, in bounded memory.

Shapes: B batch size, M classes of the model, K top classes returned.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from localvit.data.classes import readable_class_names
from localvit.data.folders import PathImages
from localvit.data.images import ImageSequence
from localvit.data.preprocessing import Preprocessing
from localvit.inference.runner import InferenceOptions, LoadedModel, ModelSource, Runner, load_model


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The top classes of one image, or why there are none."""

    file: str
    """Path of the image, or its position in a data set."""
    classes: tuple[int, ...] = ()
    """Indices of the top classes, best first."""
    class_names: tuple[str, ...] = ()
    """Their names: words for ImageNet's synsets, numbers if the model has no class names."""
    probabilities: tuple[float, ...] = ()
    """Their softmax probabilities, from 0 to 1."""
    abstained: bool = False
    """Whether the best probability is below the one that was asked for, so that the classes should not be used."""
    error: str | None = None
    """Why there is no prediction: the image is unreadable, or the model's output for it is not finite."""

    def __str__(self) -> str:
        best = (
            f"{name} {100 * probability:.1f} %"
            for name, probability in zip(self.class_names, self.probabilities, strict=True)
        )
        return f"{self.file}: {self.error or ', '.join(best)}{' (abstained)' if self.abstained else ''}"


def predict(
    model: ModelSource,
    images: str | Path | Iterable[str | Path] | ImageSequence,
    preprocessing: Preprocessing | None = None,
    options: InferenceOptions | None = None,
    *,
    class_names: Iterable[str] | None = None,
    topk: int = 5,
    calibrated: bool = False,
    abstain_below: float | None = None,
) -> Iterator[Prediction]:
    """Predict the top classes of each image, in the order of the images.

    Images are decoded as the predictions are consumed, so only the batches being processed are in memory.

    Args:
        model: A checkpoint file, a model's name (with its released weights), a `LoadedModel`, or a module in evaluation
            mode. A module runs as it is, on the device it is on; `fuse` and `compile` of the options do not apply.
        images: A file, folder or glob pattern, several of them, or any `ImageSequence`.
        preprocessing: By default the one stored in the checkpoint, or the model's `pretrained_cfg`.
        options: Batch size, device, precision; by default the best available device, or the module's.
        class_names: Names of the model's classes; by default those stored in the checkpoint.
        topk: Number of classes per image; all classes if there are fewer.
        calibrated: Divide logits by the temperature in the checkpoint (`localvit eval --fit-temperature`), so that
            probabilities agree with the accuracy.
        abstain_below: Mark predictions whose best probability is below this one as abstained.

    Yields:
        A `Prediction` for each image. An unreadable image has an error instead of classes.

    Raises:
        DataError: No path leads to an image.
        ValueError: `topk` is below 1, `abstain_below` is not from 0 to 1, `calibrated` is asked for and the model has
            no temperature, or the model cannot run (see `Runner.of`).
        RuntimeError: A worker process died.
    """
    if topk < 1:
        raise ValueError(f"topk={topk} must be at least 1")
    if abstain_below is not None and not 0 <= abstain_below <= 1:
        raise ValueError(f"abstain_below={abstain_below} must be a probability from 0 to 1")
    if calibrated and isinstance(model, str | Path):
        model = load_model(model)
    temperature = _temperature(model) if calibrated else 1.0
    if not isinstance(images, ImageSequence):
        images = PathImages(images)
    names = None if class_names is None else list(class_names)
    found = _predict(Runner.of(model, preprocessing, options, names), images, topk, temperature)
    if abstain_below is None:
        return found
    return (replace(each, abstained=not each.error and each.probabilities[0] < abstain_below) for each in found)


def _temperature(model: ModelSource) -> float:
    calibration = model.calibration if isinstance(model, LoadedModel) else None
    if calibration is None:
        name = model.description if isinstance(model, LoadedModel) else "a module"
        raise ValueError(
            f"{name} has no temperature to calibrate its probabilities with: fit one to held-out images with "
            "localvit eval --fit-temperature FILE, and predict with that file"
        )
    return calibration.temperature


@torch.inference_mode()
def _predict(runner: Runner, images: ImageSequence, topk: int, temperature: float) -> Iterator[Prediction]:
    for indices, images_BCHW, failed in runner.load_batches(images, range(len(images))):
        done = {}
        for index, reason in failed:
            file = images.name(index)
            done[index] = Prediction(file=file, error=reason.removeprefix(f"{file}: "))
        if images_BCHW is not None:
            probabilities_BM = (runner.logits(images_BCHW).cpu().double() / temperature).softmax(1)
            names = readable_class_names(runner.class_names, probabilities_BM.shape[1])
            finite_B = probabilities_BM.isfinite().all(1)
            best_BK, classes_BK = probabilities_BM.topk(min(topk, probabilities_BM.shape[1]), dim=1)
            for index, finite, best, classes in zip(indices, finite_B, best_BK, classes_BK, strict=True):
                done[index] = (
                    _prediction(images.name(index), classes.tolist(), best.tolist(), names)
                    if finite
                    else Prediction(file=images.name(index), error="the model's output is not finite")
                )
        for index in sorted(done):
            yield done[index]


def _prediction(file: str, classes: list[int], probabilities: list[float], names: list[str]) -> Prediction:
    return Prediction(
        file=file,
        classes=tuple(classes),
        class_names=tuple(names[index] for index in classes),
        probabilities=tuple(probabilities),
    )
