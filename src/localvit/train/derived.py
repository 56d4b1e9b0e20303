"""Settings that follow from the images and from other settings where nobody set them: batch size and lowest rates.

A setting counts as set if it is in the config's `model_fields_set`: by a flag, a file of settings, or an argument in
Python. A recipe sets its learning rates, but not its batch size.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

from localvit.train.config import TrainConfig
from localvit.utils.distributed import world_size

logger = logging.getLogger(__name__)

DERIVED = ("batch_size", "warmup_lr", "min_lr")
"""The settings that may be derived."""
MAX_LEFT_OUT = 0.1
"""Share of the images of an epoch that may be left out because they do not fill a batch."""
FEW_STEPS = 100
"""A run of fewer steps gets a warning. AdamW moves a weight by about the learning rate in a step, so few steps change
little, whatever the batch size."""


def images_per_step(config: TrainConfig) -> int:
    """Images per step, over all processes."""
    return config.batch_size * config.grad_accum * world_size()


def scaled_learning_rate(config: TrainConfig, images: int) -> float:
    """The peak learning rate for this number of images per step. `config.lr` is for 512 (arXiv 2012.12877, sec. 5)."""
    return config.lr * images / 512


def keep_recorded(config: TrainConfig, recorded: Mapping[str, Any]) -> TrainConfig:
    """The config of a resumed run: what nobody sets now remains as it was derived when the run started."""
    kept = {name: recorded[name] for name in DERIVED if name in recorded and name not in config.model_fields_set}
    return config.model_copy(update=kept)


def derive_settings(config: TrainConfig, num_images: int) -> TrainConfig:
    """The config with a batch size for the images, and lowest learning rates for the batch size.

    Logs what was chosen, and warns of images that are left out, of a schedule that rises, and of very few steps.

    Args:
        config: the settings.
        num_images: images in an epoch of each process.

    Raises:
        ValueError: if the images do not fill one step.
    """
    config = _with_batch_size(config, num_images)
    peak = scaled_learning_rate(config, images_per_step(config))
    config = with_lowest_rates(config, peak)
    _warn_of_rising(config, peak)
    steps_per_epoch = num_images // (config.batch_size * config.grad_accum)
    steps = config.epochs * steps_per_epoch
    if steps < FEW_STEPS:
        logger.warning(
            f"the run has only {steps:,} steps ({config.epochs:,} epochs of {steps_per_epoch:,}), too few to learn "
            f"much: use --epochs {math.ceil(FEW_STEPS / steps_per_epoch)} or more, or add images"
        )
    return config


def _with_batch_size(config: TrainConfig, num_images: int) -> TrainConfig:
    per_batch, accumulated = config.batch_size, config.grad_accum
    fitting = _fitting_batch_size(config, num_images)
    used, fitted = (num_images // (size * accumulated) * size * accumulated for size in (per_batch, max(fitting, 1)))
    of_images = f"{num_images:,} training images" + (" of each process" if world_size() > 1 else "")
    if "batch_size" not in config.model_fields_set and fitting and fitted > used and _leaves_out_many(used, num_images):
        logger.info(f"batch_size={fitting} instead of {per_batch}, to use {fitted:,} of the {of_images} in each epoch")
        return config.model_copy(update={"batch_size": fitting})
    if not used:
        raise ValueError(_too_few_images(config, num_images, fitting))
    if fitted > used and _leaves_out_many(used, num_images):
        logger.warning(
            f"batch_size={per_batch} leaves {num_images - used:,} of the {of_images} out of each epoch (others each "
            f"time); --batch-size {fitting} would use {fitted:,}"
        )
    return config


def _leaves_out_many(used: int, num_images: int) -> bool:
    return num_images - used > MAX_LEFT_OUT * num_images


def _fitting_batch_size(config: TrainConfig, num_images: int) -> int:
    """The largest batch size, up to the configured one, with which an epoch's images fill its steps; 0 if none does."""
    steps = math.ceil(num_images / (config.batch_size * config.grad_accum))
    size = num_images // max(steps * config.grad_accum, 1)
    return size - size % 2 if config.mixes else size


def _too_few_images(config: TrainConfig, num_images: int, fitting: int) -> str:
    times = f" times grad_accum={config.grad_accum}" if config.grad_accum > 1 else ""
    processes = f" in each of {world_size()} processes" if world_size() > 1 else ""
    remedies = ["add images"]
    if fitting:
        remedies.append(f"use --batch-size {fitting} or less")
    elif config.grad_accum > 1:
        remedies.append("use a smaller --grad-accum")
    if world_size() > 1:
        remedies.append("use fewer processes")
    if config.mixes and num_images == 1:
        remedies.append("turn off mixing, which needs two images (--mixup 0 --cutmix 0)")
    images = "1 image" if num_images == 1 else f"{num_images:,} images"
    return (
        f"batch_size={config.batch_size}{times} is more than the {images} to train on{processes}: "
        f"{' or '.join(remedies)}"
    )


def with_lowest_rates(config: TrainConfig, peak: float) -> TrainConfig:
    """The config with `warmup_lr` and `min_lr` in proportion to the peak learning rate, where nobody set them.

    The defaults hold for the default peak of one process or a higher one. They would be above a low peak, so that the
    learning rate would rise at the end. Below the default peak they are therefore scaled along.
    """
    defaults = TrainConfig()
    share = min(1.0, peak / scaled_learning_rate(defaults, defaults.batch_size))
    rates = {name: getattr(config, name) * share for name in ("warmup_lr", "min_lr")}
    return config.model_copy(update={name: rates[name] for name in rates.keys() - config.model_fields_set})


def scale_recipe_rates(recipe: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, float]:
    """The `warmup_lr` and `min_lr` of a recipe for other settings that lower its peak learning rate.

    Args:
        recipe: the recipe's settings.
        settings: all settings of the run.
    """
    own = TrainConfig(**recipe)
    peak = settings["lr"] * settings["batch_size"] * settings["grad_accum"]
    share = min(1.0, peak / (own.lr * own.batch_size * own.grad_accum))
    return {name: recipe[name] * share for name in ("warmup_lr", "min_lr") if name in recipe}


def _warn_of_rising(config: TrainConfig, peak: float) -> None:
    if config.warmup_epochs and config.warmup_lr > peak:
        logger.warning(
            f"the learning rate falls during the warm-up, from warmup_lr={config.warmup_lr:g} to its peak of {peak:.3g}"
            ": lower --warmup-lr, or raise --lr"
        )
    if config.sched in ("cosine", "tanh", "poly") and config.min_lr > peak:
        logger.warning(
            f"the learning rate rises from {peak:.3g} to min_lr={config.min_lr:g}: lower --min-lr, or raise --lr"
        )
