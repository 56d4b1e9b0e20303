"""The training loop: steps, epochs, evaluation, and a state saved wherever it may have to go on."""

import math
import resource
import signal
import sys
import time
from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
from timm.utils import distribute_bn

from localvit.evaluation.evaluate import Evaluation, evaluate
from localvit.train.build import Remark, Training
from localvit.train.nonfinite import explain, nonfinite_parameter
from localvit.train.run_folder import STATE, prepare_folder, save_epoch, save_state, write_config
from localvit.train.state import Row
from localvit.train.step import StepResult, train_step
from localvit.train.stopping import Stopped, StopRequest
from localvit.train.trackers import Watch
from localvit.utils.distributed import gather, is_main, together, world_size

Progress = Callable[[int, str], None]
"""Told how many images were just trained on, and the loss and learning rate for a person."""

LOG_STEPS = 50
"""Steps between two entries of the trackers."""
MOST_SKIPS = 10
"""Steps in a row that may be skipped for a loss that is not finite."""


def fit(
    training: Training,
    progress: Progress = lambda done, note: None,
    remark: Remark = lambda message: None,
) -> list[Row]:
    """Train to the last epoch, evaluating the raw weights and saving after each; returns the rows of the log.

    With several processes, evaluation and files use the first one's BatchNorm statistics, on every process.

    Raises:
        FloatingPointError: when a loss is not finite; that step has changed nothing, and the state before it is saved.
        Stopped: when a signal asked for it; the state is saved.
        OSError: when the output folder cannot be written to.
        UnreadableImage: for an image that cannot be decoded.
        RuntimeError: when a worker process dies.
    """
    run = _Run(training, progress, remark)
    with StopRequest() as run.stop_request:
        try:
            together(run.open)
            while not run.is_over():
                run.train_epoch()
                run.evaluate_epoch()
        finally:
            run.close()
    return training.state.rows


class _Run:
    """A training run on its way."""

    def __init__(self, training: Training, progress: Progress, remark: Remark) -> None:
        self.training = training
        self.config = training.config
        self.state = training.state
        self.progress = progress
        self.remark = remark
        self.description = training.describe()
        self.stop_request = StopRequest()
        self.watch: Watch | None = None

    def open(self) -> None:
        """Make the folder, or find out now that it cannot be written to."""
        if not is_main():
            return
        prepare_folder(self.config.output_dir, self._entries(), self.config.keep)
        self.watch = Watch(self.config, from_step=self._steps_done(), remark=self.remark)
        self._save()  # so that a folder that cannot be written to stops the run now
        write_config(self.config, self.config.output_dir, world_size())

    def close(self) -> None:
        if self.watch:
            self.watch.close()

    def is_over(self) -> bool:
        """Whether the last epoch is trained, or so many went by without a better one."""
        state, patience = self.state, self.config.early_stopping
        if state.epoch >= self.config.epochs:
            return True
        if patience is None or state.best is None or state.epoch - 1 - state.best["epoch"] < patience:
            return False
        self.remark(f"no better Acc@1 for {patience} epochs: ending early")
        return True

    def train_epoch(self) -> None:
        """Train on what is left of the state's epoch."""
        training, state, config = self.training, self.state, self.config
        if state.step == 0:
            state.begin_epoch()
        batches = training.batches.epoch(state.epoch, state.step * config.grad_accum)
        while state.step < training.steps_per_epoch:
            started = time.monotonic()
            if config.sched_on_updates:
                state.scheduler.step_update(self._steps_done())
            result = train_step(training, batches, stop=self.stop_request.number != 0)
            self._count(result)
            state.seconds += time.monotonic() - started
            lr = state.optimizer.param_groups[0]["lr"]
            self.progress(training.images_per_step, f"epoch {state.epoch} loss {result.loss:.3f} lr {lr:.1e}")
            if self._steps_done() % LOG_STEPS == 0 and self.watch:
                self.watch.step(
                    self._steps_done(),
                    {
                        "train/loss": result.loss,
                        "train/lr": lr,
                        "train/images_per_second": state.step * training.images_per_step / state.seconds,
                    },
                )
            if result.stop:
                self._stop()
            if config.checkpoint_steps and self._steps_done() % config.checkpoint_steps == 0:
                self._save()

    def evaluate_epoch(self) -> None:
        """Evaluate, write the epoch down, and save."""
        state = self.state
        evaluation = self._evaluate()
        row = {
            "train_lr": state.optimizer.param_groups[0]["lr"],
            "train_loss": fmean(state.losses) if state.losses else math.nan,
            "test_loss": evaluation.loss,
            "test_acc1": evaluation.acc1,
            "test_acc5": evaluation.acc5,
            "epoch": state.epoch,
            "n_parameters": sum(each.numel() for each in state.model.parameters() if each.requires_grad),
        }
        trained_on = self.training.steps_per_epoch * self.training.images_per_step
        measured = {
            "seconds": state.seconds,
            "images_per_second": trained_on / state.seconds,
            "peak_memory_mb": peak_memory_mb(self.training.options.device),
            "skipped_steps": state.skipped,
        }
        state.finish_epoch(row, measured)
        self.remark(f"epoch {row['epoch']}: train loss {row['train_loss']:.3f} {evaluation.line()}")
        if self.watch:
            save_epoch(state, self.config.output_dir, self.description)
            self.watch.epoch(state.metrics, self._steps_done())
        self._save()
        if any(gather(self.stop_request.number)):
            self._stop()

    def _steps_done(self) -> int:
        """Steps of the whole run."""
        return self.state.epoch * self.training.steps_per_epoch + self.state.step

    def _count(self, result: StepResult) -> None:
        """Note a step that was taken, or skipped. Raises FloatingPointError when the run cannot go on."""
        state = self.state
        if math.isfinite(result.loss):
            state.losses.append(result.loss)
            state.skipped_in_row = 0
            state.step += 1
            return
        if self.config.nonfinite == "skip" and state.skipped_in_row < MOST_SKIPS - 1:
            state.skipped += 1
            state.skipped_in_row += 1
            self.remark(f"warning: the loss is {result.loss} in epoch {state.epoch}, step {state.step}: step skipped")
            state.step += 1
            return
        why = explain(self.training, result.loss)
        if self.config.nonfinite == "skip":
            why += f"; that is the {MOST_SKIPS}th such step in a row"
        if nonfinite_parameter(state.model):
            saved = f"the newest state in {self.config.output_dir} is of before"
        else:
            self._save()
            saved = f"{self.config.output_dir / STATE} is the state before that step"
        advice = "--dtype bfloat16, " if self.training.options.dtype == torch.float16 else ""
        raise FloatingPointError(
            f"{why}. The run has stopped; {saved}. Try {advice}--clip-grad 1, a lower --lr"
            + ("" if self.config.nonfinite == "skip" else ", or --nonfinite skip")
        )

    def _evaluate(self) -> Evaluation:
        training = self.training
        if world_size() > 1:
            distribute_bn(self.state.model, world_size())

        def look(done: int) -> None:  # one process can stop in between; several would wait for each other
            if self.stop_request.number and world_size() == 1:
                self._stop()

        return evaluate(
            self.state.model.eval(),
            training.val_images,
            training.preprocessing,
            training.options,
            class_names=training.class_names,
            progress=look,
        )

    def _entries(self) -> dict[str, Any]:
        return self.state.to_entries(self.description)

    def _save(self) -> None:
        if is_main():
            save_state(self._entries(), self.config.output_dir, self.config.keep)

    def _stop(self) -> None:
        """Save and leave. Raises Stopped."""
        self._save()
        raise Stopped(
            self.stop_request.number or signal.SIGTERM,  # which another process has heard
            f"stopped in epoch {self.state.epoch}, {self.state.step} of {self.training.steps_per_epoch} steps done; "
            f"go on with --resume auto --output-dir {self.config.output_dir}",
        )


def peak_memory_mb(device: torch.device) -> float:
    """Most memory that was taken: of the device, or on a CPU of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3
