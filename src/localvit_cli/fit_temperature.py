"""`localvit eval --fit-temperature`: fit a temperature to the evaluated images, and write the checkpoint with it."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from localvit.checkpoints import save_checkpoint
from localvit.checkpoints.rewriting import copy_with, has_own_header
from localvit.data.classes import IMAGENET_SUBSETS
from localvit.evaluation.evaluate import Evaluation
from localvit.evaluation.metrics import expected_calibration_error, reliability
from localvit.evaluation.temperature import Effect, calibrate, effect_of
from localvit.inference.calibration import CALIBRATION, Calibration
from localvit.inference.exported import ExportedModel
from localvit.inference.runner import LoadedModel
from localvit.utils.files import check_writable
from localvit_cli import UsageError

if TYPE_CHECKING:
    from localvit_cli.eval import Eval

logger = logging.getLogger(__name__)


def check_fit(command: "Eval", loaded: LoadedModel, num_trained_on: int) -> None:
    """Raise UsageError, before the evaluation, for what a temperature cannot be fitted to or written to."""
    path = command.fit_temperature
    if path is None:
        return
    if path.suffix != ".safetensors":
        raise UsageError(f"--fit-temperature {path} must end in .safetensors, because it is a checkpoint")
    if isinstance(loaded.model, ExportedModel):
        raise UsageError(
            f"{command.model} is an exported file: fit the temperature to the checkpoint, and export that again"
        )
    if num_trained_on:
        raise UsageError(
            "a temperature has to be fitted to images that the model was not trained on: leave out --include-trained"
        )
    if str(command.data_set).upper() in IMAGENET_SUBSETS:
        raise UsageError(f"{command.data_set} has images of some classes only: fit the temperature to images of all")
    if command.input_size:
        raise UsageError("the checkpoint would be used at another image size: leave out --input-size")
    check_writable(path)


def fit_and_save(command: "Eval", loaded: LoadedModel, evaluation: Evaluation) -> Calibration:
    """Fit a temperature to the images of an evaluation, and write the checkpoint with it.

    Raises ValueError if none can be fitted to them.
    """
    path = command.fit_temperature
    assert path is not None
    evaluation.check_finite()
    calibration = calibrate(evaluation)
    source = command.checkpoint or Path(command.model)
    record = {CALIBRATION: calibration.to_dict() | {"weights": loaded.weights}}
    if has_own_header(source):
        copy_with(source, path, record)
    else:
        save_checkpoint(
            loaded.model,
            path,
            class_names=loaded.class_names,
            preprocessing=loaded.preprocessing.to_dict(),
            about=loaded.about | {CALIBRATION: calibration.to_dict()},
        )
    if calibration.loss_after >= calibration.loss_before:
        logger.warning(
            f"on images that it was not fitted to, the temperature does not lower the loss "
            f"({calibration.loss_before:.4f} before, {calibration.loss_after:.4f} after): the model is calibrated "
            f"already, or {calibration.num_images:,} images are too few"
        )
    logger.info(f"temperature {calibration.temperature:.4g}, fitted to {calibration.num_images:,} images: {path}")
    return calibration


def measure(evaluation: Evaluation, calibration: Calibration | None) -> Effect | None:
    """What the model's temperature does to these probabilities, which is also logged; None without a temperature."""
    if calibration is None or not evaluation.is_finite_N.all():
        return None
    effect, before = effect_of(evaluation, calibration), expected_calibration_error(reliability(evaluation))
    how = "cross-fitted" if effect.is_cross_fitted else f"with temperature {calibration.temperature:.4g}"
    logger.info(f"calibration error (ECE): {100 * before:.2f} % before, {100 * effect.ece:.2f} % after, {how}")
    return effect
