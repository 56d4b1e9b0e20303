"""The losses of training: cross entropy, and distillation on top of any loss of logits.

Shapes: B images of a batch, C channels, H and W pixels, M classes.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localvit.train.config import TrainConfig

Loss = Callable[[Tensor, Tensor], Tensor]
"""A loss of logits (B, M) and targets, as in `torch.nn`: a scalar. The targets are classes (B), or probabilities (B, M)
when mixup or CutMix is on."""
Criterion = Callable[[Tensor, Any, Tensor], Tensor]
"""What a training step minimizes: a scalar from images (B, C, H, W), the model's outputs for them, and targets."""


def cross_entropy(config: TrainConfig, labels: Sequence[int], num_classes: int) -> nn.Module:
    """The default loss: cross entropy with the configured label smoothing and class weights.

    Args:
        config: uses `label_smoothing`, which mixup applies itself when it is on, and `class_weights`.
        labels: class of each training image, to balance the classes.
        num_classes: M.
    """
    label_smoothing = 0.0 if config.mixes else config.label_smoothing
    if config.class_weights == "balanced":
        return WeightedCrossEntropy(_balanced_weights(labels, num_classes), label_smoothing=label_smoothing)
    return nn.CrossEntropyLoss(label_smoothing=label_smoothing)


def _balanced_weights(labels: Sequence[int], num_classes: int) -> Tensor:
    """The inverse number of images of each class (M), scaled to a mean of 1 over the classes that have images."""
    images_M = torch.tensor(labels).bincount(minlength=num_classes)
    weight_M = torch.where(images_M > 0, images_M.clamp(min=1).reciprocal(), 0)
    return weight_M / weight_M[images_M > 0].mean()


class WeightedCrossEntropy(nn.Module):
    """Cross entropy as a weighted mean over images: an image counts as much as its class.

    The weight of `nn.CrossEntropyLoss` multiplies each class's share of a smoothed or mixed target instead, so the
    minimum is not at the target: with weights of 0.06 and 1.94 and a smoothing of 0.1, it is where an image of the
    first class is assigned to the second. Here the weights change how much an image counts, not what is right for it.

    Args:
        weight_M: weight of each class, at least 0.
        label_smoothing: as for `nn.CrossEntropyLoss`. It does not change an image's weight.
    """

    weight_M: Tensor

    def __init__(self, weight_M: Tensor, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("weight_M", weight_M)
        self.label_smoothing = label_smoothing

    def forward(self, logits_BM: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch: the sum of weight times loss, divided by the sum of the weights.

        Args:
            logits_BM: logits (B, M).
            targets: classes (B), or probabilities (B, M). The weight of an image is that of its class, or the mean of
                the weights under its probabilities.
        """
        losses_B = F.cross_entropy(logits_BM, targets, reduction="none", label_smoothing=self.label_smoothing)
        weights_B = self.weight_M[targets] if targets.ndim == 1 else (targets * self.weight_M).sum(1)
        return (weights_B * losses_B).sum() / weights_B.sum()


def without_distillation(loss: Loss) -> Criterion:
    """A criterion that applies `loss` to the model's logits."""

    def criterion(images_BCHW: Tensor, logits_BM: Tensor, targets: Tensor) -> Tensor:
        return loss(logits_BM, targets)

    return criterion


class DistillationLoss(nn.Module):
    """Distillation through the distillation token (DeiT, arXiv 2012.12877, section 4).

    The loss is (1 - alpha) times `base` of the class token's logits, plus alpha times the distillation term of the
    distillation token's logits.

    The teacher is not a submodule: its parameters are not among those of the loss, and it does not move with the loss.

    Args:
        base: loss of logits (B, M) and targets.
        teacher: returns logits (B, M) of images; see `build_teacher`.
        kind: "hard", cross entropy with the teacher's most likely class; or "soft", the Kullback-Leibler divergence
            from the teacher's probabilities at temperature tau, times tau squared, summed and divided by the B * M
            logits.
        alpha: weight of the distillation term, in [0, 1].
        tau: temperature of "soft", above 0.

    Raises:
        ValueError: for another kind, or arguments out of range.
    """

    def __init__(
        self, base: Loss, teacher: nn.Module, kind: Literal["hard", "soft"], *, alpha: float, tau: float
    ) -> None:
        super().__init__()
        if kind not in ("hard", "soft"):
            raise ValueError(f"kind={kind!r}: choose 'hard' or 'soft'")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} must be in [0, 1]")
        if not tau > 0:
            raise ValueError(f"tau={tau} must be above 0")
        self.base = base
        self._teacher = (teacher,)  # nn.Module does not register modules in a tuple
        self.kind = kind
        self.alpha = alpha
        self.tau = tau

    def forward(self, images_BCHW: Tensor, outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            images_BCHW: the student's input, mixed if mixup is on.
            outputs: the student's logits (B, M) of its class token and of its distillation token.
            targets: the targets of `base`: classes (B), or probabilities (B, M).

        Raises:
            ValueError: if `outputs` are not those of a distilled model in training mode.
        """
        if not isinstance(outputs, (tuple, list)) or len(outputs) != 2:
            raise ValueError(
                "distillation needs the logits of both heads: call the model's set_distilled_training(True) and train()"
            )
        class_token_BM, distillation_token_BM = outputs
        base = self.base(class_token_BM, targets)
        with torch.no_grad():
            teacher_BM = self._teacher[0](images_BCHW)
        # The half precision of autocast is too coarse for a difference of logarithms.
        precise = torch.promote_types(distillation_token_BM.dtype, torch.float32)
        student_BM, teacher_BM = distillation_token_BM.to(precise), teacher_BM.to(precise)
        if self.kind == "hard":
            distillation = F.cross_entropy(student_BM, teacher_BM.argmax(1))
        else:
            divergence = F.kl_div(
                F.log_softmax(student_BM / self.tau, dim=1),
                F.log_softmax(teacher_BM / self.tau, dim=1),
                reduction="sum",
                log_target=True,
            )
            distillation = divergence * self.tau**2 / student_BM.numel()
        return (1 - self.alpha) * base + self.alpha * distillation
