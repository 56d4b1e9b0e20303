"""The training loop: steps, epochs, evaluation, and checkpoints to resume from."""

import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from statistics import fmean
from types import FrameType
from typing import Any

import torch
from timm.utils import distribute_bn

from localvit.data.workers import STOP_SIGNALS
from localvit.evaluation.evaluate import Evaluation, evaluate
from localvit.train.builder import Training
from localvit.train.nonfinite import explain, nonfinite_parameter
from localvit.train.run_folder import STATE, complete_folder, prepare_folder, save_epoch, save_state, write_config
from localvit.train.state import Row
from localvit.train.step import StepResult, train_step
from localvit.train.summary import RunResult
from localvit.train.trackers import Trackers
from localvit.utils.distributed import all_gather, is_main, run_on_all_ranks, world_size
from localvit.utils.intervals import interval_text

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

Progress = Callable[[int, str], None]
"""Called after each step with its number of images and a short text: epoch, loss and learning rate."""

LOG_STEPS = 50
"""Steps between two entries of the trackers."""
MAX_SKIPPED_IN_ROW = 10
"""Number of consecutive steps with a non-finite loss or gradient at which the run stops."""
_SIGHUP = getattr(signal, "SIGHUP", None)  # Windows has none


class Stopped(Exception):
    """The run ended on a signal and saved a checkpoint."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_status = 128 + number
        """The status that shells report for a process ended by this signal."""


def fit(training: Training, *, progress: Progress = lambda done, note: None) -> RunResult:
    """Train to the last epoch. Evaluates the weights and saves a checkpoint after each epoch.

    With several processes, evaluation and files use the BatchNorm statistics of rank 0 on all processes.

    Args:
        training: from `localvit.train.build`; its state is updated in place.
        progress: called after each step.

    Returns:
        The result: best and last epoch, duration and speed. It prints as a table.

    Raises:
        FloatingPointError: if a loss or gradient is not finite. That step changed nothing, and a checkpoint is saved.
            Also if weights or buffers are found not to be finite when an epoch is evaluated, or if no epoch has a
            finite validation loss.
        Stopped: after a signal; a checkpoint is saved.
        FileExistsError: if another process trains in the output folder, or did since the run was built.
        OSError: if the output folder cannot be written.
        CheckpointError: if no epoch is left to train, and the weights or the accuracy of the last one are in no file.
        UnreadableImage: if an image cannot be decoded.
        RuntimeError: if a worker process dies.
    """
    loop = _Loop(training, progress)
    with _StopRequest() as loop.stop_request:
        try:
            run_on_all_ranks(loop.open)
            while not loop.is_over():
                loop.train_epoch()
                loop.evaluate_epoch()
            if training.state.epoch < training.config.epochs:
                logger.info(f"no better Acc@1 for {training.config.early_stopping} epochs: stopping early")
        finally:
            loop.close()
    if training.state.rows and training.state.best is None:
        raise FloatingPointError(
            f"the validation loss is not finite after any of the {len(training.state.rows)} epochs, so "
            f"{training.config.output_dir} contains no best epoch: try a lower --lr, or --dtype float32"
        )
    return RunResult.of(training.state.metrics)


class _StopRequest:
    """A context that records the signals that ask a program to stop; SIGHUP not in a process started with nohup.

    The first signal is only recorded; a second one has its usual effect. A terminal that closes may send several.
    """

    def __init__(self) -> None:
        self.number = 0
        """Number of the received signal; 0 if there was none."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_StopRequest":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in no other thread
            self._before = {
                number: signal.signal(number, self._record)
                for number in STOP_SIGNALS
                if not (number == _SIGHUP and signal.getsignal(number) == signal.SIG_IGN)
            }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, signal.SIG_IGN if number == _SIGHUP else self._before[number])


class _Loop:
    """A run in progress."""

    def __init__(self, training: Training, progress: Progress) -> None:
        self.training = training
        self.config = training.config
        self.state = training.state
        self.progress = progress
        self.description = training.describe()
        self.stop_request = _StopRequest()
        self.trackers: Trackers | None = None
        self.held = ExitStack()
        """Holds the folder until the end."""
        self.num_evaluated = len(training.val_images)

    def open(self) -> None:
        """Create the folder and its first files, so that a folder that is not writable stops the run now."""
        if not is_main():
            return
        directory, ownership = self.config.output_dir, self.training.ownership
        prepare_folder(directory, self._entries(), self.config.keep)
        self.held.enter_context(ownership.held())
        complete_folder(self.state, directory, self.description, ownership.source, is_over=self.is_over())
        self.trackers = Trackers(self.config, from_step=self._steps_done())
        self._save()
        write_config(self.config, directory, world_size())

    def close(self) -> None:
        if self.trackers:
            self.trackers.close()
        self.held.close()

    def is_over(self) -> bool:
        """Whether the last epoch is finished, or early stopping applies."""
        return self.state.epoch >= self.config.epochs or self._stops_early()

    def _stops_early(self) -> bool:
        """Whether too many epochs had no better accuracy."""
        state, patience = self.state, self.config.early_stopping
        return patience is not None and state.best is not None and state.epoch - 1 - state.best["epoch"] >= patience

    def train_epoch(self) -> None:
        """Train on the remaining batches of the current epoch."""
        training, state, config = self.training, self.state, self.config
        if state.step == 0:
            state.begin_epoch()
        batches = training.device_batches(state.epoch, state.step * config.grad_accum)
        while state.step < training.steps_per_epoch:
            started = time.monotonic()
            if config.sched_on_updates:
                state.scheduler.step_update(self._steps_done())
            result = train_step(training, batches, stop=self.stop_request.number != 0)
            self._count(result)
            state.seconds += time.monotonic() - started
            self._report(result)
            if result.stop:
                self._stop()
            if config.checkpoint_steps and self._steps_done() % config.checkpoint_steps == 0:
                self._save()

    def _report(self, result: StepResult) -> None:
        """Pass the numbers of a step to the progress display and the trackers."""
        state, training = self.state, self.training
        lr = state.optimizer.param_groups[0]["lr"]
        self.progress(training.images_per_step, f"epoch {state.epoch + 1} loss {result.loss:.3f} lr {lr:.1e}")
        if self._steps_done() % LOG_STEPS == 0 and self.trackers:
            values = {
                "train/loss": result.loss,
                "train/lr": lr,
                "train/images_per_second": state.step * training.images_per_step / state.seconds,
            }
            self.trackers.log_step(self._steps_done(), values)

    def evaluate_epoch(self) -> None:
        """Evaluate, log the epoch, and save."""
        state = self.state
        row = {
            "train_lr": state.optimizer.param_groups[0]["lr"],
            "train_loss": fmean(state.losses) if state.losses else math.nan,
            **self._evaluate(),
            "epoch": state.epoch,
            "n_parameters": state.num_trained_parameters,
        }
        num_images = self.training.steps_per_epoch * self.training.images_per_step
        measured = {"seconds": state.seconds, "images_per_second": num_images / state.seconds}
        if (peak := peak_memory_mb(self.training.options.device)) is not None:
            measured["peak_memory_mb"] = peak
        measured["skipped_steps"] = state.skipped
        measured["test_images"] = self.num_evaluated
        state.finish_epoch(row, measured)
        logger.info(
            f"epoch {state.epoch}: train loss {row['train_loss']:.3f} * Acc@1 {row['test_acc1']:.3f} "
            f"Acc@5 {row['test_acc5']:.3f} loss {row['test_loss']:.3f} "
            f"(95 % interval of Acc@1: {interval_text(row['test_acc1'], self.num_evaluated)})"
        )
        if self.trackers:
            save_epoch(state, self.config.output_dir, self.description)
            self.trackers.log_epoch(state.metrics, self._steps_done())
        self._save()
        if any(all_gather(self.stop_request.number)):
            self._stop()

    def _steps_done(self) -> int:
        """Number of finished steps of the run."""
        return self.state.epoch * self.training.steps_per_epoch + self.state.step

    def _count(self, result: StepResult) -> None:
        """Count a step as finished or skipped. Raises FloatingPointError if the run must stop."""
        state = self.state
        if result.nonfinite is None:
            state.losses.append(result.loss)
            state.skipped_in_row = 0
            state.step += 1
            return
        if self.config.nonfinite == "skip" and state.skipped_in_row < MAX_SKIPPED_IN_ROW - 1:
            state.skipped += 1
            state.skipped_in_row += 1
            logger.warning(f"{result.nonfinite} in epoch {state.epoch + 1}, step {state.step + 1}: step skipped")
            state.step += 1
            return
        reason = explain(self.training, result)
        if self.config.nonfinite == "skip":
            reason += f"; this is the {MAX_SKIPPED_IN_ROW}th such step in a row"
        if nonfinite_parameter(state.model):
            saved = f"the newest checkpoint in {self.config.output_dir} is from an earlier step"
        else:
            self._save()
            saved = f"{self.config.output_dir / STATE} is the checkpoint before this step"
        advice = "--dtype bfloat16, " if self.training.options.dtype == torch.float16 else ""
        raise FloatingPointError(
            f"{reason}. The run stopped; {saved}. Try {advice}--clip-grad 1, a lower --lr"
            + ("" if self.config.nonfinite == "skip" else ", or --nonfinite skip")
        )

    def _evaluate(self) -> Row:
        """The numbers of the validation images. Images for which the output is not finite make the loss NaN.

        Raises FloatingPointError if that is because of weights or buffers, which training cannot repair.
        """
        evaluation = None
        try:
            evaluation = self._evaluation()
            evaluation.check_finite()
        except FloatingPointError as error:
            if name := nonfinite_parameter(self.state.model):
                raise FloatingPointError(
                    f"{name} is not finite after epoch {self.state.epoch + 1}: {error}. The run stopped; the newest "
                    f"checkpoint in {self.config.output_dir} is from before. Try a lower --lr, or --dtype float32"
                ) from error
            logger.warning(f"epoch {self.state.epoch + 1} cannot be the best: {error}")
        if evaluation is None:
            return {"test_loss": math.nan, "test_acc1": 0.0, "test_acc5": 0.0}
        return {"test_loss": evaluation.loss, "test_acc1": evaluation.acc1, "test_acc5": evaluation.acc5}

    def _evaluation(self) -> Evaluation:
        training = self.training
        if world_size() > 1:
            distribute_bn(self.state.model, world_size())

        def check_stop(done: int) -> None:  # with several processes, the others would wait for this one
            if self.stop_request.number and world_size() == 1:
                self._stop()

        return evaluate(
            self.state.model.eval(),
            training.val_images,
            training.preprocessing,
            training.options,
            class_names=training.class_names,
            progress=check_stop,
        )

    def _entries(self) -> dict[str, Any]:
        return self.state.to_entries(self.description)

    def _save(self) -> None:
        if is_main():
            save_state(self._entries(), self.config.output_dir, self.config.keep)

    def _stop(self) -> None:
        """Save a checkpoint, and raise Stopped."""
        self._save()
        raise Stopped(
            self.stop_request.number or signal.SIGTERM,  # another process may have received it
            f"stopped in epoch {self.state.epoch + 1}, {self.state.step} of {self.training.steps_per_epoch} steps "
            f"done; continue with --resume auto --output-dir {self.config.output_dir}",
        )


def peak_memory_mb(device: torch.device) -> float | None:
    """Peak memory in MB: of a CUDA device, otherwise of this process; None if the platform does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3
