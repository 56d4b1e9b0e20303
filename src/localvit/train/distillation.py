"""Learning from a teacher through the distillation token (DeiT, arXiv 2012.12877, section 4).

Shapes: B images of a batch, C channels, H and W pixels, M classes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from localvit.data.preprocessing import Preprocessing
from localvit.inference.runner import is_checkpoint_path, load_model
from localvit.train.finetune import check_released


def check_student(model: nn.Module) -> None:
    """Raise ValueError unless the model has a head for what a teacher says."""
    if not hasattr(model, "set_distilled_training"):
        raise ValueError(
            "distillation needs a model with a distillation token, and this one has none: add --model-args "
            "distilled=true (LocalViT-T, -S and -nano take it), or choose one of timm's distilled models"
        )


class DistillationLoss(nn.Module):
    """(1 - alpha) of a loss on the class token's head, and alpha of the teacher's on the distillation token's.

    The teacher is no part of this module: its parameters are not among the loss's, nor does it move with the loss.

    Args:
        base: loss of logits (B, M) and targets.
        teacher: gives logits (B, M) of images; see `build_teacher`.
        kind: "hard", cross-entropy with the teacher's best class; or "soft", the Kullback-Leibler divergence from the
            teacher's probabilities at temperature tau, times tau squared, summed and divided by the B * M logits.
        alpha: the teacher's part, in [0, 1].
        tau: temperature of "soft", above 0.

    Raises:
        ValueError: for another kind, or arguments out of range.
    """

    def __init__(
        self, base: nn.Module, teacher: nn.Module, kind: Literal["hard", "soft"], *, alpha: float, tau: float
    ) -> None:
        super().__init__()
        if kind not in ("hard", "soft"):
            raise ValueError(f"kind={kind!r}: choose 'hard' or 'soft'")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} must be in [0, 1]")
        if not tau > 0:
            raise ValueError(f"tau={tau} must be above 0")
        self.base = base
        self._teacher = (teacher,)  # in a tuple, where nn.Module does not look for modules
        self.kind = kind
        self.alpha = alpha
        self.tau = tau

    def forward(self, images_BCHW: Tensor, outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            images_BCHW: what the student saw, mixed if it was.
            outputs: the student's logits (B, M) by its class token and by its distillation token.
            targets: what `base` takes: classes (B), or probabilities (B, M).

        Raises ValueError when `outputs` are not those of a distilled model in training.
        """
        if not isinstance(outputs, (tuple, list)) or len(outputs) != 2:
            raise ValueError(
                "distillation needs the logits of both heads: call the model's set_distilled_training(True) and train()"
            )
        by_class_token_BM, by_distillation_token_BM = outputs
        base = self.base(by_class_token_BM, targets)
        with torch.no_grad():
            teacher_BM = self._teacher[0](images_BCHW)
        # Half precision, of autocast, is too coarse for a difference of logarithms.
        precise = torch.promote_types(by_distillation_token_BM.dtype, torch.float32)
        student_BM, teacher_BM = by_distillation_token_BM.to(precise), teacher_BM.to(precise)
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


class Teacher(nn.Module):
    """A frozen model that is shown a student's images as it is used to see images.

    Takes images (B, 3, H, W) normalized as the student's; gives logits (B, M), without gradient.

    Args:
        model: gives logits of images.
        mean, std: of each channel, that the model's images are normalized with.
        input_size: height and width to resize the images to, bicubic; None leaves them.
        class_order: the model's class for each of the student's; None where they are the same.
        student_mean, student_std: of each channel, that the student's images are normalized with.
    """

    scale_C11: Tensor
    shift_C11: Tensor
    class_order: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        input_size: tuple[int, int] | None,
        class_order: Sequence[int] | None,
        student_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        student_std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ) -> None:
        super().__init__()
        self.model = model
        own_mean, own_std, their_mean, their_std = (
            torch.tensor(values, dtype=torch.float64)[:, None, None]
            for values in (student_mean, student_std, mean, std)
        )
        self.renormalizes = not (torch.equal(own_mean, their_mean) and torch.equal(own_std, their_std))
        self.register_buffer("scale_C11", (own_std / their_std).float())
        self.register_buffer("shift_C11", ((own_mean - their_mean) / their_std).float())
        self.input_size = input_size
        self.register_buffer("class_order", None if class_order is None else torch.tensor(class_order))
        self.eval()
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> Tensor:
        if self.renormalizes:
            images_BCHW = images_BCHW * self.scale_C11 + self.shift_C11
        if self.input_size is not None:
            images_BCHW = F.interpolate(images_BCHW, self.input_size, mode="bicubic", antialias=True)
        logits_BM = self.model(images_BCHW)
        return logits_BM if self.class_order is None else logits_BM[:, self.class_order]


def build_teacher(
    teacher: str,
    checkpoint: Path | None,
    num_classes: int,
    class_names: Sequence[str] | None,
    device: torch.device,
    *,
    preprocessing: Preprocessing,
    remark: Callable[[str], None] = lambda message: None,
) -> Teacher:
    """The teacher of a student with these classes and images, on `device`.

    Args:
        teacher: a model's name, or a checkpoint file.
        checkpoint: weights for the model called `teacher`; by default its released ones.
        num_classes, class_names: the student's classes in order, and their names if they have any.
        preprocessing: of the student's images.
        remark: told what of the teacher is not as the student's.

    Raises:
        FileNotFoundError, CheckpointError: for a file that cannot be used, or a name without released weights.
        ValueError: for a name that is not known, or a teacher of other classes.
        RuntimeError: when released weights cannot be downloaded.
    """
    if checkpoint is None and not is_checkpoint_path(teacher):
        check_released(teacher)
    ready = load_model(teacher, checkpoint=checkpoint)
    class_order = _class_order(ready.model, teacher, ready.class_names, num_classes, class_names, remark)
    model = ready.model.to(device)
    own, student = ready.preprocessing, preprocessing
    own_size = _size_to_show(model, teacher, own, student.input_size, device, remark)
    return Teacher(model, own.mean, own.std, own_size, class_order, student.mean, student.std).to(device)


def _class_order(
    model: Any,
    teacher: str,
    teacher_names: Sequence[str] | None,
    num_classes: int,
    class_names: Sequence[str] | None,
    remark: Callable[[str], None],
) -> list[int] | None:
    advice = "choose a teacher that was trained on the same classes"
    if model.num_classes != num_classes:
        raise ValueError(f"teacher {teacher} knows {model.num_classes} classes and the student {num_classes}: {advice}")
    if teacher_names is None or class_names is None:
        unnamed = f"teacher {teacher}" if teacher_names is None else "the data set"
        remark(f"warning: {unnamed} does not name its classes: they are taken to be in the same order on both sides")
        return None
    unknown = sorted(set(class_names) - set(teacher_names))
    if unknown:
        raise ValueError(
            f"teacher {teacher} does not know {len(unknown)} of the {num_classes} classes "
            f"({', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}): {advice}"
        )
    index_of = {name: index for index, name in enumerate(teacher_names)}
    order = [index_of[name] for name in class_names]
    return None if order == list(range(num_classes)) else order


def _size_to_show(
    model: nn.Module,
    teacher: str,
    preprocessing: Preprocessing,
    input_size: tuple[int, int],
    device: torch.device,
    remark: Callable[[str], None],
) -> tuple[int, int] | None:
    """The size to resize the student's images to, if the teacher cannot take theirs."""
    own_size = preprocessing.input_size
    if own_size == tuple(input_size):
        return None
    sizes = f"{own_size[0]} x {own_size[1]} pixels, not of {input_size[0]} x {input_size[1]}"
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, *input_size, device=device))
    except (AssertionError, RuntimeError, ValueError):  # timm asserts, torch and this package say what does not fit
        remark(f"teacher {teacher} takes images of {sizes}: it is shown them resized")
        return own_size
    remark(f"warning: teacher {teacher} was made for images of {sizes}, which it takes as they are")
    return None
