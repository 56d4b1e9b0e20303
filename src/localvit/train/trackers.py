"""Trackers: where the numbers of a run are written during training, in addition to the log."""

import csv
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from localvit.train.config import TrainConfig
from localvit.train.run_folder import LOG
from localvit.utils.files import atomic_write

logger = logging.getLogger(__name__)

METRICS = "metrics.csv"
CURVES = "curves.png"
TENSORBOARD = "tensorboard"
WANDB_ID = "wandb-id.txt"

Values = Mapping[str, float]


class Tracker(Protocol):
    """One destination of the numbers. Its methods may raise any exception."""

    def log_step(self, step: int, values: Values) -> None: ...
    def log_epoch(self, metrics: Sequence[Values], step: int) -> None: ...
    def close(self) -> None: ...


class Trackers:
    """All trackers of a run: metrics.csv, curves.png, TensorBoard, Weights & Biases.

    A tracker that cannot start stops the run before training. One that fails later logs a warning and is turned off,
    because a tracker must not end a run.
    """

    def __init__(self, config: TrainConfig, *, from_step: int) -> None:
        """Start, or continue what is in `config.output_dir`.

        Args:
            config: names the folder and the trackers.
            from_step: number of finished steps. Points of later steps, from before the run was killed, are replaced.

        Raises:
            ImportError: if a configured tracker is not installed.
            OSError: if the folder cannot be written.
            ValueError: if TensorBoard cannot write to a folder of that name.
        """
        config.output_dir.mkdir(parents=True, exist_ok=True)
        self._trackers: dict[str, Tracker] = {METRICS: _MetricsFile(config.output_dir / METRICS)}
        try:
            self._trackers[CURVES] = _Curves(config)
        except ImportError as error:
            logger.warning(f"{CURVES} is not drawn: {error}")
        if config.tensorboard:
            self._trackers["TensorBoard"] = _TensorBoard(config.output_dir / TENSORBOARD, from_step)
        if config.wandb is not None:
            self._trackers["Weights & Biases"] = _WeightsAndBiases(config, config.wandb, from_step)

    def log_step(self, step: int, values: Values) -> None:
        """Log numbers of a step, such as `{"train/loss": 2.3}`; `step` is the number of finished steps of the run."""
        self._for_each(lambda tracker: tracker.log_step(step, values))

    def log_epoch(self, metrics: Sequence[Values], step: int) -> None:
        """Log an epoch: the rows of all finished epochs, after `step` steps. log.txt must already be written."""
        self._for_each(lambda tracker: tracker.log_epoch(metrics, step))

    def close(self) -> None:
        """Write pending data, and close all trackers."""
        self._for_each(lambda tracker: tracker.close())
        self._trackers.clear()

    def _for_each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                action(tracker)
            except Exception as error:
                del self._trackers[name]
                logger.warning(f"{name} is turned off for the rest of the run: {error or type(error).__name__}")


class _MetricsFile:
    """metrics.csv. All rows are rewritten each epoch, so that the file of a resumed run is correct."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def log_step(self, step: int, values: Values) -> None:
        pass

    def log_epoch(self, metrics: Sequence[Values], step: int) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in metrics for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(metrics)
        with atomic_write(self.path) as file:
            file.write_text(text.getvalue(), encoding="utf-8")

    def close(self) -> None:
        pass


class _Curves:
    """curves.png: loss and accuracy so far."""

    def __init__(self, config: TrainConfig) -> None:
        from localvit.train.curves import draw_curves

        self.draw = draw_curves
        self.directory = config.output_dir
        self.title = f"{config.model}, {config.output_dir}"

    def log_step(self, step: int, values: Values) -> None:
        pass

    def log_epoch(self, metrics: Sequence[Values], step: int) -> None:
        self.draw(self.directory / LOG, self.directory / CURVES, self.title)

    def close(self) -> None:
        pass


class _TensorBoard:
    """TensorBoard event files. A resumed run hides the points after the step at which it resumes."""

    def __init__(self, directory: Path, from_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError('--tensorboard needs TensorBoard: pip install "localvit[tensorboard]"') from error
        try:
            self.writer = SummaryWriter(directory, purge_step=from_step + 1)
        except UnicodeEncodeError as error:
            raise ValueError(
                f"--tensorboard cannot write to {directory}, because that path is not valid UTF-8: choose another "
                "--output-dir"
            ) from error

    def log_step(self, step: int, values: Values) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def log_epoch(self, metrics: Sequence[Values], step: int) -> None:
        self.log_step(step, _last_epoch(metrics))
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _WeightsAndBiases:
    """A run of Weights & Biases. Its id is saved in the folder, so that a resumed run continues it."""

    def __init__(self, config: TrainConfig, project: str, from_step: int) -> None:
        try:
            # `import wandb` would succeed for a folder named wandb, which an earlier run may have created.
            from wandb import init
        except ImportError as error:
            raise ImportError('--wandb needs Weights & Biases: pip install "localvit[wandb]"') from error
        id_file = config.output_dir / WANDB_ID
        if not from_step or not id_file.exists():
            with atomic_write(id_file) as file:
                file.write_text(uuid4().hex)
        self.run = init(
            project=project,
            id=id_file.read_text().strip(),
            resume="allow",
            name=config.output_dir.name,
            dir=config.output_dir,
            config=config.to_dict(),
        )
        # The default step counter must not decrease, and a resumed run repeats steps.
        self.run.define_metric("*", step_metric="step")

    def log_step(self, step: int, values: Values) -> None:
        self.run.log({**values, "step": step})

    def log_epoch(self, metrics: Sequence[Values], step: int) -> None:
        self.log_step(step, _last_epoch(metrics))

    def close(self) -> None:
        self.run.finish()


def _last_epoch(metrics: Sequence[Values]) -> dict[str, float]:
    """The numbers of the last epoch to plot, by the keys of the log."""
    constant = ("epoch", "n_parameters", "test_images")
    return {f"epoch/{key}": value for key, value in metrics[-1].items() if key not in constant}
