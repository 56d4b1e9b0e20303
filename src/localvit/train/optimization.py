"""timm's optimizer with the published parameter groups, timm's learning rate schedules, and freezing."""

from fnmatch import fnmatch
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from localvit.surgery.localize import locality_modules
from localvit.train.config import TrainConfig
from localvit.train.derived import scaled_learning_rate, with_lowest_rates


def freeze(model: nn.Module, patterns: tuple[str, ...]) -> None:
    """Freeze the parameters whose names match a pattern, in which `*` matches anything.

    Raises ValueError for a pattern that matches no parameter, or if none remains trainable.
    """
    for pattern in patterns:
        matching = [parameter for name, parameter in model.named_parameters() if fnmatch(name, pattern)]
        if not matching:
            some = ", ".join(name for name, _ in list(model.named_parameters())[:4])
            raise ValueError(f"freeze={pattern} matches no parameter; the parameters are {some}, ...")
        for parameter in matching:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"freeze={', '.join(patterns)} freezes all parameters")


def build_optimizer(config: TrainConfig, model: nn.Module, images_per_step: int) -> torch.optim.Optimizer:
    """timm's optimizer at the scaled learning rate.

    Biases, 1-D parameters and the model's `no_weight_decay` list have no weight decay. Raises ValueError for an unknown
    optimizer, settings that it does not accept, or one that cannot be used or not be resumed bit-exactly.
    """
    if config.opt.lower().removeprefix("lookahead_").startswith(("bnb", "fused")):
        raise ValueError(
            f"opt={config.opt} is not supported, because its runs may not resume bit-exactly: choose one that is part "
            "of timm, such as adamw (which is fused)"
        )
    optimizer = _create_optimizer(config, model, images_per_step)
    if getattr(optimizer, "is_second_order", False):
        raise ValueError(
            f"opt={config.opt} needs second derivatives, which training does not compute: choose another, such as adamw"
        )
    if config.locality_lr_scale != 1:
        _scale_locality(optimizer, model, config.locality_lr_scale)
    return optimizer


def _scale_locality(optimizer: torch.optim.Optimizer, model: nn.Module, factor: float) -> None:
    """Move locality parameters to parameter groups with `lr_scale`, by which timm's schedules multiply the rate."""
    own = {id(parameter) for module in locality_modules(model).values() for parameter in module.parameters()}
    if not own:
        raise ValueError(f"locality_lr_scale={factor} has no effect: {type(model).__name__} has no locality modules")
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    for group in groups:
        scale = group.get("lr_scale", 1.0)
        for local, lr_scale in ((False, scale), (True, scale * factor)):
            parameters = [parameter for parameter in group["params"] if (id(parameter) in own) == local]
            if parameters:
                optimizer.add_param_group(group | {"params": parameters, "lr_scale": lr_scale})


def _create_optimizer(config: TrainConfig, model: nn.Module, images_per_step: int) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"betas": config.opt_betas} if config.opt_betas else {}
    if config.opt.lower() == "adamw":
        settings["fused"] = True
    try:
        return create_optimizer_v2(
            model,
            opt=config.opt,
            lr=scaled_learning_rate(config, images_per_step),
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            eps=config.opt_eps,
            layer_decay=config.layer_decay,
            **settings,
        )
    except TypeError as error:
        raise ValueError(f"opt={config.opt} does not accept the given settings: {error}") from error


def build_scheduler(config: TrainConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Scheduler:
    """timm's schedule with a linear warm-up. Apply it with `set_learning_rate`.

    The peak is the optimizer's rate, and `warmup_lr` and `min_lr` are in proportion to it unless they were set.

    Raises ValueError for sched=plateau if the version of timm is too old for torch.
    """
    config = with_lowest_rates(config, optimizer.param_groups[0]["lr"])
    noise: Any = list(config.lr_noise) or None
    # timm's plateau schedule starts with this rate, and would keep it, even without a warm-up.
    warmup_lr = config.warmup_lr if config.warmup_epochs else optimizer.param_groups[0]["lr"]
    warmup_epochs: Any = config.warmup_epochs  # may be fractional if the rate changes every step
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=config.sched,
            num_epochs=config.epochs,
            min_lr=config.min_lr,
            warmup_lr=warmup_lr,
            warmup_epochs=warmup_epochs,
            decay_epochs=config.decay_epochs,
            decay_milestones=list(config.decay_milestones),
            decay_rate=config.decay_rate,
            patience_epochs=config.patience_epochs,
            noise=noise,
            noise_pct=config.lr_noise_pct,
            noise_std=config.lr_noise_std,
            noise_seed=config.seed,
            step_on_epochs=not config.sched_on_updates,
            updates_per_epoch=steps_per_epoch,
        )
    except TypeError as error:  # the plateau schedule of older timm with newer torch
        raise ValueError(f"sched={config.sched} does not work with these versions: {error}; upgrade timm") from error
    return scheduler


def set_learning_rate(scheduler: Scheduler, epoch: int, acc1: float | None = None) -> None:
    """Set the learning rate of `epoch` (from 0): as published, it is still that of epoch 0 in epoch 1.

    Call it once per epoch. `acc1` is the Acc@1 of the previous epoch, for a plateau schedule.
    """
    scheduler.step(max(epoch - 1, 0), acc1)
