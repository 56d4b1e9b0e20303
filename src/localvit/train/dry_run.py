"""A dry run: a few training steps and part of an evaluation, to check a run and to estimate its duration."""

import time
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain

from localvit.evaluation.evaluate import evaluate
from localvit.train.builder import Training
from localvit.train.derived import scaled_learning_rate
from localvit.train.device_batches import DeviceBatches
from localvit.train.loop import peak_memory_mb
from localvit.train.run_folder import check_folder
from localvit.train.step import train_step
from localvit.utils.distributed import is_main, world_size

NUM_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long the parts of a run take, in seconds."""

    step: float
    """One training step."""
    evaluation: float
    """The evaluation after an epoch."""

    def of(self, training: Training, epochs: int) -> float:
        """Duration of so many epochs."""
        return epochs * (training.steps_per_epoch * self.step + self.evaluation)


def dry_run(training: Training) -> dict[str, str]:
    """Size, speed and duration of a run, as names and texts; raises as `measure`."""
    timing = measure(training)
    return _describe(training, timing)


def measure(training: Training) -> Timing:
    """Take two steps and evaluate one batch per process. Changes the weights of `training`, but writes no files.

    Times are estimated from the second step and from that batch, so they are rough, and too long if the model is
    compiled.

    Args:
        training: from `localvit.train.build`.

    Raises:
        OSError: if the output folder could not be written.
        ValueError: if the loss or a gradient is not finite.
        UnreadableImage, RuntimeError: as `localvit.train.fit`.
    """
    config, state = training.config, training.state
    if is_main():
        check_folder(config.output_dir, state.to_entries(training.describe()), config.keep)
    state.begin_epoch()
    # A small data set makes a single step in an epoch.
    epochs = chain(training.batches.epoch(state.epoch), training.batches.epoch(state.epoch + 1))
    batches = DeviceBatches(epochs, training.options)
    for _ in range(NUM_STEPS):
        started = time.monotonic()
        result = train_step(training, batches, stop=False)
        step_seconds = time.monotonic() - started
        if result.nonfinite:
            raise ValueError(f"{result.nonfinite} in the first steps: try a lower --lr, or another --dtype")
    started = time.monotonic()
    limit = min(config.batch_size * world_size(), len(training.val_images))
    evaluate(
        state.model.eval(),
        training.val_images,
        training.preprocessing,
        training.options,
        class_names=training.class_names,
        limit=limit,
    )
    evaluation_seconds = (time.monotonic() - started) * len(training.val_images) / limit
    return Timing(step=step_seconds, evaluation=evaluation_seconds)


def _describe(training: Training, timing: Timing) -> dict[str, str]:
    config, per_step = training.config, training.images_per_step
    num_steps = config.epochs * training.steps_per_epoch
    num_parameters = sum(each.numel() for each in training.state.model.parameters())
    device, dtype = training.options.device, str(training.options.dtype).removeprefix("torch.")
    peak = peak_memory_mb(device)
    return {
        "model": f"{config.model}, {training.state.num_trained_parameters:,} of {num_parameters:,} parameters trained",
        "images": f"{len(training.batches.images.images):,} for training, {len(training.val_images):,} for validation",
        "device": f"{device} x {world_size()}, {dtype}",
        "images per step": f"{per_step:,} = {config.batch_size} per batch x {config.grad_accum} batches x "
        f"{world_size()} processes",
        "peak learning rate": f"{scaled_learning_rate(config, per_step):.3g}",
        "steps": f"{num_steps:,} = {config.epochs} epochs x {training.steps_per_epoch:,}",
        "time per step": f"{timing.step:.3g} s, {per_step / timing.step:,.0f} images/s",
        "total time": f"about {duration(timing.of(training, config.epochs))}, including "
        f"{duration(config.epochs * timing.evaluation)} for evaluation",
        "peak memory": "unknown" if peak is None else f"{peak:,.0f} MB per process, so far",
    }


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))
