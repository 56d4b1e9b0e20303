"""Exact evaluation: every image once, whatever the batch size and the number of processes.

Each process takes every n-th image, keeps one row for each, and the rows are gathered and put back in order; sums
are made in float64 from the rows. Nothing is padded, so nothing is counted twice.

Shapes: N images, B images of a batch, M classes of the model, K the kept best classes (5, or all of fewer).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localvit.data.classes import match_classes
from localvit.data.images import Images, PreparedImages, UnreadableImage
from localvit.data.preprocessing import Preprocessing
from localvit.inference.runner import InferenceOptions, batches, forward
from localvit.utils.distributed import all_gather, rank, world_size


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One row an image, in the data set's order, and what follows from the rows."""

    paths: list[str]
    """Each image's path below the data set's folder, or its place, where a data set has no files."""
    labels_N: Tensor
    """The true class, int64, as the model counts its classes."""
    top_classes_NK: Tensor
    """The best classes, best first."""
    top_logits_NK: Tensor
    """Their logits, float32."""
    top_probabilities_NK: Tensor
    """Their softmax probabilities, float64."""
    losses_N: Tensor
    """Cross-entropy of each image in nats, float64."""
    class_names: list[str]
    """Name of each class of the model, in the model's order."""
    skipped: list[str] = field(default_factory=list)
    """Images that could not be read and were left out on request, with the reason."""

    @property
    def acc1(self) -> float:
        """Percent of images whose best class is the true one."""
        return self._accuracy(1)

    @property
    def acc5(self) -> float:
        """Percent of images with the true class among the best five."""
        return self._accuracy(5)

    @property
    def loss(self) -> float:
        """Mean cross-entropy over images, in nats."""
        return self.losses_N.mean().item()

    def _accuracy(self, k: int) -> float:
        hits = (self.top_classes_NK[:, :k] == self.labels_N[:, None]).any(1)
        return 100.0 * hits.sum().item() / len(hits)

    def line(self) -> str:
        """The published program's last line."""
        return f"* Acc@1 {self.acc1:.3f} Acc@5 {self.acc5:.3f} loss {self.loss:.3f}"


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    images: Images,
    preprocessing: Preprocessing,
    options: InferenceOptions,
    *,
    class_names: Sequence[str] | None,
    valid_classes: Sequence[int] | None = None,
    limit: int | None = None,
    skip_unreadable: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Evaluate `model` on labeled images, each exactly once, over all processes; every process gets the result.

    Args:
        model: in evaluation mode, on `options.device`.
        class_names: names of the model's classes, by which labels are matched; None if it has none.
        valid_classes: score on these classes of the model alone (the 200-class sets).
        limit: only the first so many images.
        skip_unreadable: leave unreadable images out, named in the result, instead of stopping.
        progress: told how many images this process has just finished.

    Raises:
        UnreadableImage: for one that cannot be decoded, on every process, unless `skip_unreadable`.
        DataError: when the data set has classes that the model lacks.
        ValueError: for a limit below 1, or when no image could be evaluated.
        RuntimeError: when a worker process dies, or another process failed.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1")
    num_classes = len(class_names) if class_names is not None else cast(int, model.num_classes)
    class_of = match_classes(images, class_names, num_classes)
    count = len(images) if limit is None else min(limit, len(images))
    rows: dict[int, tuple] = {}
    skipped: list[str] = []
    failure: Exception | None = None
    prepared = PreparedImages(images, preprocessing.transform())
    try:
        for indices, images_BCHW, failed in batches(prepared, range(rank(), count, world_size()), options):
            if failed and not skip_unreadable:
                raise UnreadableImage(f"{failed[0][1]}; --skip-unreadable leaves such images out and counts them")
            skipped += [reason for _, reason in failed]
            if images_BCHW is not None:
                labels_B = torch.tensor([class_of[images.labels[index]] for index in indices])
                logits_BM = forward(model, images_BCHW, options).cpu()
                rows.update(zip(indices, _rows(logits_BM, labels_B, valid_classes), strict=True))
            progress(len(indices) + len(failed))
    except Exception as error:  # told to every process below, so that none waits for this one
        failure = error
    parts = all_gather((rows, skipped, None if failure is None else f"{type(failure).__name__}: {failure}"))
    if failure is not None:
        raise failure
    failures = [text for _, _, text in parts if text]
    if failures:
        raise RuntimeError(f"another process failed: {failures[0]}")
    everything = {index: row for part, _, _ in parts for index, row in part.items()}
    if not everything:
        raise ValueError("no image could be evaluated")
    order = sorted(everything)
    columns = [torch.stack(column) for column in zip(*(everything[index] for index in order), strict=True)]
    return Evaluation(
        paths=[images.name(index) for index in order],
        labels_N=columns[0],
        top_classes_NK=columns[1],
        top_logits_NK=columns[2],
        top_probabilities_NK=columns[3],
        losses_N=columns[4],
        class_names=list(class_names) if class_names is not None else [str(index) for index in range(num_classes)],
        skipped=sorted(text for _, part, _ in parts for text in part),
    )


def _rows(logits_BM: Tensor, labels_B: Tensor, valid_classes: Sequence[int] | None) -> list[tuple[Any, ...]]:
    """For each image: its label, best classes, their logits and probabilities, and its loss."""
    if valid_classes is not None:
        others = torch.ones(logits_BM.shape[1], dtype=torch.bool)
        others[list(valid_classes)] = False
        logits_BM = logits_BM.masked_fill(others, float("-inf"))
    log_probabilities_BM = logits_BM.double().log_softmax(1)
    losses_B = F.nll_loss(log_probabilities_BM, labels_B, reduction="none")
    top_logits_BK, top_classes_BK = logits_BM.topk(min(5, logits_BM.shape[1]), dim=1)
    top_probabilities_BK = log_probabilities_BM.gather(1, top_classes_BK).exp()
    return list(zip(labels_B, top_classes_BK, top_logits_BK, top_probabilities_BK, losses_B, strict=True))
