"""What a run would be: a few of its steps and part of an evaluation, taken for real and thrown away."""

import math
import time
from datetime import timedelta

from localvit.evaluation.evaluate import evaluate
from localvit.train.build import Training
from localvit.train.loop import peak_memory_mb
from localvit.train.optimization import scaled_learning_rate
from localvit.train.step import train_step
from localvit.utils.distributed import world_size

STEPS = 2


def rehearse(training: Training) -> dict[str, str]:
    """Take two steps and evaluate a batch a process; returns what to tell, by name. Nothing is written.

    The times are of the second step and of that batch, so they are rough, and too long while a model is compiled.
    Raises ValueError when the loss of a step is not finite, and what the loop raises.
    """
    config, state = training.config, training.state
    state.begin_epoch()
    batches = training.batches.epoch(state.epoch)
    for _ in range(STEPS):
        started = time.monotonic()
        result = train_step(training, batches, stop=False)
        step_seconds = time.monotonic() - started
        if not math.isfinite(result.loss):
            raise ValueError(f"the loss of the first steps is {result.loss}: try a lower --lr, or another --dtype")
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
    per_step, steps = training.images_per_step, config.epochs * training.steps_per_epoch
    counts = [(each.numel(), each.requires_grad) for each in state.model.parameters()]
    trained, parameters = sum(count for count, trains in counts if trains), sum(count for count, _ in counts)
    evaluating = config.epochs * evaluation_seconds
    device, dtype = training.options.device, str(training.options.dtype).removeprefix("torch.")
    return {
        "model": f"{config.model}, {trained:,} of {parameters:,} parameters trained",
        "images": f"{len(training.batches.images.images):,} to train on, {len(training.val_images):,} to check",
        "runs on": f"{device} x {world_size()}, {dtype}",
        "images a step": f"{per_step:,} = batch {config.batch_size} x {config.grad_accum} x processes {world_size()}",
        "learning rate": f"{scaled_learning_rate(config, per_step):.3g} at its highest",
        "steps": f"{steps:,} = epochs {config.epochs} x {training.steps_per_epoch:,}",
        "time a step": f"{step_seconds:.3g} s, {per_step / step_seconds:,.0f} images/s",
        "time in all": f"about {_time(steps * step_seconds + evaluating)}, of it {_time(evaluating)} evaluating",
        "memory": f"{peak_memory_mb(device):,.0f} MB at most so far, a process",
    }


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
