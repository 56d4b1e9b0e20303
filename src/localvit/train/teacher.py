"""The teacher of a distillation (DeiT, arXiv 2012.12877, section 4): its preprocessing and its order of classes.

Shapes: B images of a batch, C channels, H and W pixels, M classes.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from localvit.data.preprocessing import Preprocessing
from localvit.inference.runner import is_checkpoint_path, load_model
from localvit.models.registry import DownloadError
from localvit.train.finetune import check_released

logger = logging.getLogger(__name__)


def check_student(model: nn.Module) -> None:
    """Raise ValueError unless the model has a distillation token and a head for it."""
    if not hasattr(model, "set_distilled_training"):
        raise ValueError(
            "distillation needs a model with a distillation token, and this model has none: add --model-args "
            "distilled=true (LocalViT-T, -S and -nano accept it), or choose a distilled model of timm"
        )


class Teacher(nn.Module):
    """A frozen model that takes a student's images and converts them to its own normalization and size.

    Takes images (B, 3, H, W) normalized for the student; returns logits (B, M) without gradient, in the student's order
    of classes.

    Args:
        model: returns logits of images.
        mean, std: the model's normalization, per channel.
        input_size: height and width to which images are resized (bicubic); None keeps their size.
        class_order: the model's class index for each class of the student; None if they are the same.
        student_mean, student_std: the student's normalization, per channel.
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
        from_mean, from_std, to_mean, to_std = (
            torch.tensor(values, dtype=torch.float64)[:, None, None]
            for values in (student_mean, student_std, mean, std)
        )
        self.renormalizes = not (torch.equal(from_mean, to_mean) and torch.equal(from_std, to_std))
        self.register_buffer("scale_C11", (from_std / to_std).float())
        self.register_buffer("shift_C11", ((from_mean - to_mean) / to_std).float())
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
) -> Teacher:
    """The teacher of a student with these classes and images, on `device`. Logs differences from the student.

    Args:
        teacher: name of a model, or a checkpoint file.
        checkpoint: weights of a model given by name; by default its released weights.
        num_classes: number of the student's classes.
        class_names: names of the student's classes in order, if known.
        device: device of the teacher.
        preprocessing: preprocessing of the student's images.

    Raises:
        FileNotFoundError, CheckpointError: if a file cannot be used, or no weights of that name were released.
        ValueError: for an unknown name, or a teacher with other classes.
        RuntimeError: if released weights cannot be downloaded.
    """
    if checkpoint is None and not is_checkpoint_path(teacher):
        check_released(teacher)
    try:
        ready = load_model(teacher, checkpoint=checkpoint)
    except DownloadError as error:
        raise error.with_advice("give the file with --teacher-checkpoint FILE") from error
    class_order = _class_order(ready.model, teacher, ready.class_names, num_classes, class_names)
    model = ready.model.to(device)
    own, student = ready.preprocessing, preprocessing
    size = _size_to_resize_to(model, teacher, own, student.input_size, device)
    return Teacher(model, own.mean, own.std, size, class_order, student.mean, student.std).to(device)


def _class_order(
    model: Any,
    teacher: str,
    teacher_names: Sequence[str] | None,
    num_classes: int,
    class_names: Sequence[str] | None,
) -> list[int] | None:
    """The teacher's class index for each class of the student; None if they are the same."""
    advice = "choose a teacher that was trained on the same classes"
    if model.num_classes != num_classes:
        raise ValueError(f"teacher {teacher} has {model.num_classes} classes and the student {num_classes}: {advice}")
    if teacher_names is None or class_names is None:
        unnamed = f"teacher {teacher}" if teacher_names is None else "the data set"
        logger.warning(f"{unnamed} has no class names: assuming the same order of classes in teacher and data set")
        return None
    unknown = sorted(set(class_names) - set(teacher_names))
    if unknown:
        raise ValueError(
            f"teacher {teacher} lacks {len(unknown)} of the {num_classes} classes "
            f"({', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}): {advice}"
        )
    index_of = {name: index for index, name in enumerate(teacher_names)}
    order = [index_of[name] for name in class_names]
    return None if order == list(range(num_classes)) else order


def _size_to_resize_to(
    model: nn.Module,
    teacher: str,
    preprocessing: Preprocessing,
    input_size: tuple[int, int],
    device: torch.device,
) -> tuple[int, int] | None:
    """The size to resize the student's images to; None if the teacher accepts their size."""
    own_size = preprocessing.input_size
    if own_size == tuple(input_size):
        return None
    sizes = f"{own_size[0]} x {own_size[1]} pixels, and the student's have {input_size[0]} x {input_size[1]}"
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, *input_size, device=device))
    except (AssertionError, RuntimeError, ValueError):  # from timm, torch and localvit, in this order
        logger.info(f"teacher {teacher} needs images of {sizes}: they are resized for it")
        return own_size
    logger.warning(f"teacher {teacher} was trained on images of {sizes}, which it accepts without resizing")
    return None
