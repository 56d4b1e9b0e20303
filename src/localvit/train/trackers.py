"""Watching a run: where its numbers go while it trains, beside the log and the live bar."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from localvit.train.config import TrainConfig
from localvit.train.run_folder import LOG
from localvit.utils.files import atomic_write

METRICS = "metrics.csv"
CURVES = "curves.png"
TENSORBOARD = "tensorboard"
WANDB_ID = "wandb-id.txt"

Values = Mapping[str, float]


class Tracker(Protocol):
    """One place that numbers go to; it may raise anything."""

    def step(self, step: int, values: Values) -> None: ...
    def epoch(self, metrics: Sequence[Values], step: int) -> None: ...
    def close(self) -> None: ...


class Watch:
    """Where a run's numbers go: metrics.csv, curves.png, TensorBoard, Weights & Biases.

    What cannot be begun stops the run before it trains. What fails later is told once and left out from there on, since
    no image is worth a run.
    """

    def __init__(
        self, config: TrainConfig, *, from_step: int, remark: Callable[[str], None] = lambda message: None
    ) -> None:
        """Begin, or go on with what is in `config.output_dir`.

        Args:
            config: says the folder, and which trackers are asked for.
            from_step: optimizer steps that the run has done; points of later ones, from before it was killed, are
                superseded.
            remark: told what a person should know: what is left out, and why.

        Raises:
            ImportError: for a tracker that is asked for and not installed.
            OSError: when the folder cannot be written.
        """
        config.output_dir.mkdir(parents=True, exist_ok=True)
        self._remark = remark
        self._trackers: dict[str, Tracker] = {METRICS: _MetricsFile(config.output_dir / METRICS)}
        try:
            self._trackers[CURVES] = _Curves(config)
        except ImportError as error:
            remark(f"warning: there will be no {CURVES}: {error}")
        if config.tensorboard:
            self._trackers["TensorBoard"] = _TensorBoard(config.output_dir / TENSORBOARD, from_step)
        if config.wandb is not None:
            self._trackers["Weights & Biases"] = _WeightsAndBiases(config, config.wandb, from_step)

    def step(self, step: int, values: Values) -> None:
        """Take numbers of a moment, such as `{"train/loss": 2.3}`; `step` counts the run's optimizer steps so far."""
        self._each(lambda tracker: tracker.step(step, values))

    def epoch(self, metrics: Sequence[Values], step: int) -> None:
        """Take the rows of all finished epochs, a dict an epoch, when `step` steps are done and log.txt is written."""
        self._each(lambda tracker: tracker.epoch(metrics, step))

    def close(self) -> None:
        """Write what is waiting. Nothing can be taken afterwards."""
        self._each(lambda tracker: tracker.close())
        self._trackers.clear()

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                tell(tracker)
            except Exception as error:
                del self._trackers[name]
                self._remark(f"warning: {name} is left out from here on: {error or type(error).__name__}")


class _MetricsFile:
    """All rows, written anew each epoch, so that a resumed run's file is right whatever was there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def step(self, step: int, values: Values) -> None:
        pass

    def epoch(self, metrics: Sequence[Values], step: int) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in metrics for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(metrics)
        with atomic_write(self.path) as file:
            file.write_text(text.getvalue(), encoding="utf-8")

    def close(self) -> None:
        pass


class _Curves:
    """The image of the log so far."""

    def __init__(self, config: TrainConfig) -> None:
        from localvit.train.curves import draw_curves

        self.draw = draw_curves
        self.directory = config.output_dir
        self.title = f"{config.model}, {config.output_dir}"

    def step(self, step: int, values: Values) -> None:
        pass

    def epoch(self, metrics: Sequence[Values], step: int) -> None:
        self.draw(self.directory / LOG, self.directory / CURVES, self.title)

    def close(self) -> None:
        pass


class _TensorBoard:
    """TensorBoard's event files. A resumed run tells TensorBoard to hide what came after the step it goes on from."""

    def __init__(self, directory: Path, from_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError('--tensorboard needs TensorBoard: pip install "localvit[tensorboard]"') from error
        self.writer = SummaryWriter(directory, purge_step=from_step + 1)

    def step(self, step: int, values: Values) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def epoch(self, metrics: Sequence[Values], step: int) -> None:
        self.step(step, _of_epoch(metrics))
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _WeightsAndBiases:
    """A run of Weights & Biases, under an id that is kept in the folder so that a resumed run goes on with it."""

    def __init__(self, config: TrainConfig, project: str, from_step: int) -> None:
        try:
            # By name: `import wandb` alone would take the folder of that name that an earlier run left.
            from wandb import init
        except ImportError as error:
            raise ImportError('--wandb needs Weights & Biases: pip install "localvit[wandb]"') from error
        kept = config.output_dir / WANDB_ID
        if not from_step or not kept.exists():
            with atomic_write(kept) as file:
                file.write_text(uuid4().hex)
        self.run = init(
            project=project,
            id=kept.read_text().strip(),
            resume="allow",
            name=config.output_dir.name,
            dir=config.output_dir,
            config=config.to_dict(),
        )
        # Its own count only ever rises and would refuse the steps that a resumed run repeats.
        self.run.define_metric("*", step_metric="step")

    def step(self, step: int, values: Values) -> None:
        self.run.log({**values, "step": step})

    def epoch(self, metrics: Sequence[Values], step: int) -> None:
        self.step(step, _of_epoch(metrics))

    def close(self) -> None:
        self.run.finish()


def _of_epoch(metrics: Sequence[Values]) -> dict[str, float]:
    """What the last epoch has to plot, by the log's keys."""
    return {f"epoch/{key}": value for key, value in metrics[-1].items() if key not in ("epoch", "n_parameters")}
