"""The training loop.

Shapes: B pictures of a batch, C channels, H and W pixels, M classes.
"""

import math
from collections.abc import Callable
from statistics import fmean

from torch.nn.utils import clip_grad_norm_

from localvit.data.training import Draws, seed_draws
from localvit.evaluate import Evaluation, evaluate
from localvit.train.recipe import Training, set_learning_rate
from localvit.train.state import Row, save_epoch

Progress = Callable[[int, str], None]
"""Told how many pictures were just trained on, and the loss and learning rate for a person."""


def fit(
    training: Training,
    progress: Progress = lambda done, note: None,
    remark: Callable[[str], None] = lambda message: None,
) -> list[Row]:
    """Train to the last epoch, evaluating the raw weights and saving after each; returns the rows of the log.

    Raises:
        FloatingPointError: when a loss is not finite; that step has changed no weight, and the files are those of the
            epoch before.
        UnreadablePicture: for a picture that cannot be decoded.
        RuntimeError: when a worker process dies.
    """
    config, state = training.config, training.state
    n_parameters = sum(parameter.numel() for parameter in state.model.parameters() if parameter.requires_grad)
    for epoch in range(state.epoch, config.epochs):
        set_learning_rate(state.scheduler, epoch)
        train_loss = train_epoch(training, epoch, progress)
        evaluation = _evaluate(training)
        row = {
            "train_lr": state.optimizer.param_groups[0]["lr"],
            "train_loss": train_loss,
            "test_loss": evaluation.loss,
            "test_acc1": evaluation.acc1,
            "test_acc5": evaluation.acc5,
            "epoch": epoch,
            "n_parameters": n_parameters,
        }
        state.rows.append(row)
        save_epoch(
            state,
            config.output_dir,
            class_names=training.class_names,
            preprocessing=training.preprocessing.to_dict(),
            config=config.to_dict(),
        )
        remark(f"epoch {epoch}: train loss {train_loss:.3f} {evaluation.line()}")
    return state.rows


def train_epoch(training: Training, epoch: int, progress: Progress = lambda done, note: None) -> float:
    """Train on each batch of `epoch` once; returns the mean loss. Raises as `fit`."""
    config, state, device = training.config, training.state, training.options.device
    learning_rate = state.optimizer.param_groups[0]["lr"]
    losses = []
    state.model.train()
    for step, (pictures_BCHW, labels) in enumerate(training.batches.epoch(epoch)):
        seed_draws(config.seed, Draws.STEP, epoch, step)
        pictures_BCHW = pictures_BCHW.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        if training.mixup:
            pictures_BCHW, labels = training.mixup(pictures_BCHW, labels)  # labels (B) become probabilities (B, M)
        with training.options.autocast():
            loss = training.criterion(state.model(pictures_BCHW), labels)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(
                f"the loss is {losses[-1]} in epoch {epoch}, step {step} (both from 0), and the run has stopped before "
                f"it changed a weight; {config.output_dir} holds the epoch before, if there was one. "
                "Try a lower --lr, --clip-grad 1, or --dtype float32"
            )
        state.optimizer.zero_grad()
        state.scaler.scale(loss).backward()
        if config.clip_grad is not None:
            state.scaler.unscale_(state.optimizer)
            clip_grad_norm_(state.model.parameters(), config.clip_grad)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if state.ema:
            state.ema.update(state.model)
        progress(len(pictures_BCHW), f"epoch {epoch} loss {losses[-1]:.3f} lr {learning_rate:.1e}")
    return fmean(losses)


def _evaluate(training: Training) -> Evaluation:
    model = training.state.model.eval()
    return evaluate(
        model, training.val_pictures, training.preprocessing, training.options, class_names=training.class_names
    )
