"""Exact evaluation: each image counts once, at any batch size and any number of processes.

With several processes, each takes every n-th image and keeps one row per image. The rows are gathered and sorted, and
averages are computed from them in float64. No batch is padded, so no image counts twice. Of a stream, each process
reads its share of the shards (see `localvit.data.image_stream`).

Shapes: N images, B batch size, M classes of the model, K top classes kept (5, or all if there are fewer).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from localvit.data.classes import check_label, match_classes, match_streamed_classes
from localvit.data.image_stream import ImageStream, Position, check_count
from localvit.data.images import DataError, Images, UnreadableImage
from localvit.data.preprocessing import Preprocessing
from localvit.evaluation.unseen_images import open_unseen_images
from localvit.inference.runner import InferenceOptions, LoadedModel, ModelSource, Runner, load_model
from localvit.utils.distributed import all_gather, rank, world_size
from localvit.utils.intervals import accuracy_interval, interval_text


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of an evaluation: one row per image, in the data set's order, and the metrics of all rows."""

    paths: list[str]
    """Path of each image, relative to the data set's folder, or its position in a data set without files."""
    labels_N: Tensor
    """The true class, int64, as an index of the model's classes."""
    top_classes_NK: Tensor
    """The top classes, best first."""
    top_logits_NK: Tensor
    """Their logits, float32."""
    top_probabilities_NK: Tensor
    """Their softmax probabilities, float64."""
    losses_N: Tensor
    """Cross-entropy of each image in nats, float64."""
    class_names: list[str]
    """Name of each class of the model."""
    skipped: list[str] = field(default_factory=list)
    """Name and reason of each unreadable image that was skipped."""
    logits_NM: Tensor | None = None
    """The logits of all classes, float32, if they were asked for."""
    num_trained_on: int = 0
    """How many of the images the model was trained on, as far as its checkpoint tells."""

    @property
    def is_finite_N(self) -> Tensor:
        """Whether the model's output is finite, bool. Otherwise the image has no top class, and counts as wrong."""
        return self.top_probabilities_NK[:, 0].isfinite()

    @property
    def acc1(self) -> float:
        """Top-1 accuracy in percent."""
        return self._accuracy(1)

    @property
    def acc5(self) -> float:
        """Top-5 accuracy in percent."""
        return self._accuracy(5)

    @property
    def acc1_interval(self) -> tuple[float, float]:
        """The 95 % interval of `acc1`, in percent."""
        return accuracy_interval(self.acc1, len(self.paths))

    @property
    def acc5_interval(self) -> tuple[float, float]:
        """The 95 % interval of `acc5`, in percent."""
        return accuracy_interval(self.acc5, len(self.paths))

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats; NaN if an output is not finite."""
        return self.losses_N.mean().item()

    def _accuracy(self, k: int) -> float:
        hits = (self.top_classes_NK[:, :k] == self.labels_N[:, None]).any(1) & self.is_finite_N
        return 100.0 * hits.sum().item() / len(hits)

    def check_finite(self) -> None:
        """Raise FloatingPointError, with the number of images and some names, if not all outputs are finite."""
        names = [path for path, is_finite in zip(self.paths, self.is_finite_N.tolist(), strict=True) if not is_finite]
        if names:
            examples = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            raise FloatingPointError(
                f"the model's output is not finite on {len(names):,} of {len(self.paths):,} images, which count as "
                f"wrong: {examples}"
            )

    def line(self) -> str:
        """The metrics in the format of the published program's last line."""
        return f"* Acc@1 {self.acc1:.3f} Acc@5 {self.acc5:.3f} loss {self.loss:.3f}"

    def __str__(self) -> str:
        skipped = f", {len(self.skipped):,} unreadable skipped" if self.skipped else ""
        nonfinite = int((~self.is_finite_N).sum())
        skipped += f", {nonfinite:,} without a finite output" if nonfinite else ""
        interval = interval_text(self.acc1, len(self.paths))
        trained_on = f", of which the model was trained on {self.num_trained_on:,}" if self.num_trained_on else ""
        return (
            f"top-1 accuracy {self.acc1:.2f} % (95 % interval {interval}), top-5 accuracy {self.acc5:.2f} %, "
            f"loss {self.loss:.3f} ({len(self.paths):,} images{trained_on}{skipped})"
        )


def evaluate(
    model: ModelSource,
    images: str | Path | Images | ImageStream,
    preprocessing: Preprocessing | None = None,
    options: InferenceOptions | None = None,
    *,
    class_names: Sequence[str] | None = None,
    valid_classes: Sequence[int] | None = None,
    limit: int | None = None,
    skip_unreadable: bool = False,
    include_trained: bool = False,
    keep_logits: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Evaluate a model on labeled images, each exactly once.

    Under torchrun, the images are distributed over all processes, and every process gets the result.

    Args:
        model: A checkpoint file, a model's name (with its released weights), a `LoadedModel`, or a module in evaluation
            mode. A module runs as it is, on the device it is on; `fuse` and `compile` of the options do not apply.
        images: A folder with one subfolder per class (or with val/ containing them), or any `Images`; see
            `localvit.data.datasets.open_images` for data sets by name. Of the folder that a checkpoint's model was
            trained on, only the images that were kept out of training are used. Or a stream of images
            (`localvit.data.datasets.open_stream`), of which only the images of a few batches are in memory.
        preprocessing: By default the one stored in the checkpoint, or the model's `pretrained_cfg`.
        options: Batch size, device, precision; by default the best available device, or the module's.
        class_names: Names of the model's classes, by which labels are matched. By default those stored in the
            checkpoint, or ImageNet's synsets for a model of 1,000 classes.
        valid_classes: Indices of the only classes to predict (the 200-class subsets of ImageNet).
        limit: Evaluate only the first `limit` images.
        skip_unreadable: Skip unreadable images and list them in the result, instead of raising an error.
        include_trained: Evaluate on the images of such a folder that the model was trained on as well.
        keep_logits: Keep the logits of all classes, not only of the top ones.
        progress: Called with the number of images that this process has finished since the last call.

    Raises:
        UnreadableImage: An image cannot be decoded, and `skip_unreadable` is False. Raised on every process.
        DataError: The images cannot be used, or have classes that the model lacks.
        ValueError: `limit` is below 1, no image could be evaluated, or the model cannot run (see `Runner.of`).
        FloatingPointError: The model's output is not finite on any image. If it is on some, the others count as wrong.
        RuntimeError: A worker process died, or another process failed.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1")
    if isinstance(model, str | Path):
        model = load_model(model)
    num_trained_on = 0
    if not isinstance(images, Images | ImageStream):
        about = model.about if isinstance(model, LoadedModel) else {}
        images, num_trained_on = open_unseen_images("FOLDER", Path(images), about, include_trained=include_trained)
    runner = Runner.of(model, preprocessing, options, class_names)
    names = runner.class_names
    num_classes = len(names) if names is not None else cast(int, runner.model.num_classes)
    classes = _Classes.of(images, names, num_classes)
    rows: dict[Position, tuple[Any, ...]] = {}
    skipped: list[str] = []
    failure: Exception | None = None
    try:
        for loaded, images_BCHW, failed in _load(runner, images, limit):
            if failed and not skip_unreadable:
                raise UnreadableImage(f"{failed[0]}; --skip-unreadable skips and counts such images")
            skipped += failed
            if images_BCHW is not None:
                labels_B = torch.tensor([classes.index(image) for image in loaded])
                found = _rows(runner, images_BCHW, labels_B, valid_classes)
                for image, row in zip(loaded, found, strict=True):
                    rows[image.position] = (image.name, *(row if keep_logits else row[:-1]))
            progress(len(loaded) + len(failed))
    except Exception as error:  # shared with every process below, so that none waits forever for this one
        failure = error
    parts = all_gather((rows, skipped, None if failure is None else f"{type(failure).__name__}: {failure}"))
    if failure is not None:
        raise failure
    failures = [text for _, _, text in parts if text]
    if failures:
        raise RuntimeError(f"another process failed: {failures[0]}")
    if isinstance(images, ImageStream) and limit is None:
        check_count(images.title, images.num_images, sum(len(part) + len(failed) for part, failed, _ in parts))
    result = _combine(
        {position: row for part, _, _ in parts for position, row in part.items()},
        names or [str(index) for index in range(num_classes)],
        sorted(text for _, part, _ in parts for text in part),
    )
    if not result.is_finite_N.any():
        result.check_finite()
    return replace(result, num_trained_on=num_trained_on)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """An image that was decoded."""

    position: Position
    """Where it is in the data set, which is in no shards if it is indexed."""
    name: str
    label: int
    """The class of the data set."""


def _load(
    runner: Runner, images: Images | ImageStream, limit: int | None
) -> Iterator[tuple[list[_Loaded], Tensor | None, list[str]]]:
    """The batches of this process: what is known of their images, their pixels, and why others are unreadable."""
    if isinstance(images, ImageStream):
        for found, images_BCHW, failed in runner.load_stream(images.share(rank(), world_size(), limit)):
            loaded = [_Loaded(image.position, image.name, image.label) for image in found]
            yield loaded, images_BCHW, [reason for _, reason in failed]
        return
    count = len(images) if limit is None else min(limit, len(images))
    for indices, images_BCHW, failures in runner.load_batches(images, range(rank(), count, world_size())):
        loaded = [_Loaded((0, index), images.name(index), images.labels[index]) for index in indices]
        yield loaded, images_BCHW, [reason for _, reason in failures]


@dataclass(frozen=True)
class _Classes:
    """Which class of the model each class of a data set is."""

    class_of: list[int]
    data_names: list[str] | None
    num_classes: int

    @classmethod
    def of(cls, images: Images | ImageStream, model_names: Sequence[str] | None, num_classes: int) -> "_Classes":
        """Raises DataError as `match_classes` does."""
        if isinstance(images, ImageStream):
            class_of = match_streamed_classes(images.class_names, model_names, num_classes)
        else:
            class_of = match_classes(images, model_names, num_classes)
        return cls(class_of, images.class_names, num_classes)

    def index(self, image: _Loaded) -> int:
        """The model's class of an image. Raises DataError, with the image's name, if the model lacks it."""
        if self.data_names is None:
            check_label(image.name, image.label, self.num_classes)
        elif not 0 <= image.label < len(self.class_of) or self.class_of[image.label] < 0:
            known = 0 <= image.label < len(self.data_names)
            name = repr(self.data_names[image.label]) if known else f"number {image.label}"
            raise DataError(
                f"{image.name} is of the class {name}, which is not a class of the model; use a checkpoint that was "
                "trained on these classes"
            )
        return self.class_of[image.label]


def _combine(rows: dict[Position, tuple[Any, ...]], class_names: list[str], skipped: list[str]) -> Evaluation:
    """The rows of all processes, in the data set's order."""
    if not rows:
        example = f", such as {skipped[0]}" if skipped else ""
        raise ValueError(f"no image could be evaluated ({len(skipped)} unreadable{example})")
    order = sorted(rows)
    columns = [torch.stack(column) for column in zip(*(rows[position][1:] for position in order), strict=True)]
    return Evaluation(
        paths=[rows[position][0] for position in order],
        labels_N=columns[0],
        top_classes_NK=columns[1],
        top_logits_NK=columns[2],
        top_probabilities_NK=columns[3],
        losses_N=columns[4],
        logits_NM=columns[5] if len(columns) > 5 else None,
        class_names=class_names,
        skipped=skipped,
    )


@torch.inference_mode()
def _rows(
    runner: Runner, images_BCHW: Tensor, labels_B: Tensor, valid_classes: Sequence[int] | None
) -> list[tuple[Any, ...]]:
    """For each image: its label, top classes, their logits and probabilities, its loss, and all its logits."""
    logits_BM = runner.logits(images_BCHW).cpu()
    if valid_classes is not None:
        others = torch.ones(logits_BM.shape[1], dtype=torch.bool)
        others[list(valid_classes)] = False
        logits_BM = logits_BM.masked_fill(others, float("-inf"))
    log_probabilities_BM = logits_BM.double().log_softmax(1)
    losses_B = F.nll_loss(log_probabilities_BM, labels_B, reduction="none")
    top_logits_BK, top_classes_BK = logits_BM.topk(min(5, logits_BM.shape[1]), dim=1)
    top_probabilities_BK = log_probabilities_BM.gather(1, top_classes_BK).exp()
    columns = (labels_B, top_classes_BK, top_logits_BK, top_probabilities_BK, losses_B, logits_BM)
    return list(zip(*columns, strict=True))
