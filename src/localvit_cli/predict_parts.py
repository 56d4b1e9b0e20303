"""`localvit predict` by several processes of torchrun, and what an interrupted run of them has left."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localvit.data.images import ImageSequence
from localvit.evaluation.predict_parts import JOB, Parts, merged, open_parts, predict_own, remove_parts, wait_for_others
from localvit.inference.runner import InferenceOptions, LoadedModel
from localvit.utils.distributed import read_launch
from localvit.utils.files import sha256_of
from localvit_cli import UsageError
from localvit_cli.console import progress

if TYPE_CHECKING:
    from localvit_cli.predict import Predict

logger = logging.getLogger(__name__)


def shares_images(output: Path | None) -> bool:
    """Whether several processes share the images, or a run in which they did has to be finished.

    Raises UsageError for several processes without a file to write to.
    """
    launch, _ = read_launch()
    if launch is not None and launch.world_size > 1:
        if output is None:
            raise UsageError("several processes cannot share standard output: give a file with --output FILE")
        return True
    return output is not None and (_folder(output) / JOB).exists()


def _folder(output: Path) -> Path:
    return output.with_name(f"{output.name}.parts")


def predict_in_parts(command: "Predict", loaded: LoadedModel, images: ImageSequence, options: InferenceOptions) -> int:
    """Compute the share of this process. The first process then waits for the others and writes the output.

    Returns:
        The exit status: in the first process 1 if any image has no prediction, else 0. torchrun stops all processes
        when one returns something else, so the others return 0.
    """
    from localvit_cli.predict import Counted, write_predictions  # which imports this file

    assert command.output is not None
    job = _job(command, loaded, options)
    parts = open_parts(_folder(command.output), images, options.images_per_batch, job)
    done = len(images) - sum(len(parts.indices(batch)) for batch in parts.missing)
    if done:
        logger.info(f"{parts.folder}: {done:,} of {len(images):,} images were done before")
    with progress(_title(parts), parts.own_images) as advance:
        predict_own(parts, loaded, options, **command.decision(), progress=lambda prediction: advance(1))
    if parts.rank != 0:
        return 0
    wait_for_others(parts)
    counted = Counted(merged(parts))
    write_predictions(command.format, command.output, counted)
    remove_parts(parts)
    return counted.report()


def _title(parts: Parts) -> str:
    return f"predict, process 1 of {parts.world_size}" if parts.world_size > 1 else "predict"


def _job(command: "Predict", loaded: LoadedModel, options: InferenceOptions) -> dict[str, Any]:
    """What the predictions depend on, besides the images."""
    file = command.checkpoint or Path(command.model)
    return {
        "model": str(loaded),
        "weights": sha256_of(file) if file.is_file() else None,
        **command.decision(),
        "device": options.device.type,
        "dtype": str(options.dtype),
        "channels_last": options.channels_last,
        "compile": options.compile,
        "fuse": options.fuse,
    }
