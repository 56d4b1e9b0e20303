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


def cross_entropy(config: TrainConfig, labels: Sequence[int], num_classes: int) -> nn.CrossEntropyLoss:
    """The default loss: cross entropy with the configured label smoothing and class weights.

    Args:
        config: uses `label_smoothing`, which mixup applies itself when it is on, and `class_weights`.
        labels: class of each training image, to balance the classes.
        num_classes: M.
    """
    weight = None
    if config.class_weights == "balanced":
        inverse = torch.tensor(labels).bincount(minlength=num_classes).clamp(min=1).reciprocal()
        weight = inverse / inverse.mean()
    return nn.CrossEntropyLoss(weight=weight, label_smoothing=0.0 if config.mixes else config.label_smoothing)


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
