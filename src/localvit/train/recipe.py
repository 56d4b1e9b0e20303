"""What a config builds: the data, the model, and everything that trains it, each by timm where timm has it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torchvision import transforms

from localvit.data.classes import match_classes
from localvit.data.datasets import open_pictures
from localvit.data.pictures import DataError, Pictures
from localvit.data.preprocessing import Preprocessing
from localvit.data.training import AugmentedPictures, Draws, TrainingBatches, seed_draws
from localvit.devices import DTYPES, choose_device
from localvit.inference import InferenceOptions
from localvit.train.config import TrainConfig
from localvit.train.state import LOG, TrainState
from localvit.zoo import create_model

REPEATS = 3
"""How often repeated augmentation takes a picture."""
SMALL = 32
"""Side in pixels up to which a shifted crop takes the place of the resized one."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A run that is ready to go."""

    config: TrainConfig
    """What it was told."""
    state: TrainState
    """What changes while it goes."""
    batches: TrainingBatches
    """The pictures to train on."""
    val_pictures: Pictures
    """The pictures to evaluate on after each epoch."""
    class_names: list[str] | None
    """Names of the model's classes, where the data set says them."""
    preprocessing: Preprocessing
    """How pictures are prepared for evaluation."""
    mixup: Mixup | None
    """Mixes the pictures and labels of a batch."""
    criterion: nn.Module
    """Loss of logits and labels."""
    options: InferenceOptions
    """Where and how the model runs."""

    @property
    def total_pictures(self) -> int:
        """Pictures that the rest of the run trains on."""
        return (self.config.epochs - self.state.epoch) * len(self.batches) * self.batches.batch_size


def build(config: TrainConfig, remark: Callable[[str], None] = lambda message: None) -> Training:
    """Open the data, make the model and what trains it, and make the output folder.

    Args:
        remark: told what a person should know: the device, pictures left out.

    Raises:
        DataError: for a data set that cannot be trained on.
        ValueError: for a model, optimiser or device that is not known, or a batch larger than the data set.
        FileExistsError: when the output folder holds another run.
    """
    if (config.output_dir / LOG).exists():
        raise FileExistsError(f"{config.output_dir} holds another run; give another --output-dir, or remove that one")
    device, warning = choose_device(config.device)
    remark(f"warning: {warning}" if warning else f"device: {device}")
    train_pictures, val_pictures = _open(config, remark)
    class_names = train_pictures.class_names
    num_classes = len(class_names) if class_names else max(train_pictures.labels) + 1
    match_classes(val_pictures, class_names, num_classes)  # now, rather than after the first epoch

    seed_draws(config.seed, Draws.WEIGHTS)
    made: dict[str, Any] = {"num_classes": num_classes, "drop_path_rate": config.drop_path_rate}
    if config.input_size:
        made["img_size"] = (config.input_size[0], config.input_size[-1])
    model: Any = create_model(config.model, **made)
    preprocessing = Preprocessing.published(made.get("img_size") or model.pretrained_cfg["input_size"][1:])
    model.to(device)

    batches = TrainingBatches(
        AugmentedPictures(train_pictures, augmentation(config, preprocessing), config.seed),
        batch_size=config.batch_size,
        repeats=REPEATS if config.repeated_aug else 1,
        workers=config.workers,
        pin_memory=device.type == "cuda",
    )
    mixup = mixing(config, num_classes)
    optimizer = build_optimizer(config, model)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    return Training(
        config=config,
        state=TrainState(
            model=model,
            ema=None if config.ema_decay is None else ModelEmaV3(model, decay=config.ema_decay),
            optimizer=optimizer,
            scheduler=build_scheduler(config, optimizer),
            scaler=torch.amp.GradScaler(device.type, enabled=config.dtype == "float16"),
        ),
        batches=batches,
        val_pictures=val_pictures,
        class_names=class_names,
        preprocessing=preprocessing,
        mixup=mixup,
        criterion=nn.CrossEntropyLoss(label_smoothing=0.0 if mixup else config.label_smoothing),
        options=InferenceOptions(
            batch_size=config.batch_size, workers=config.workers, device=device, dtype=DTYPES[config.dtype]
        ),
    )


def _open(config: TrainConfig, remark: Callable[[str], None]) -> tuple[Pictures, Pictures]:
    train_pictures, val_pictures = (
        open_pictures(
            config.data_set,
            config.data_path,
            split=split,
            inat_category=config.inat_category,
            remark=lambda message: remark(f"warning: {message}"),
        )
        for split in ("train", "val")
    )
    first, val_first = ((pictures.root, pictures.name(0)) for pictures in (train_pictures, val_pictures))
    if train_pictures.root and first == val_first:
        raise DataError(
            f"{train_pictures.root} would be trained and evaluated on alike: put the pictures to train on below train/ "
            "there, and others, to evaluate on, below val/"
        )
    return train_pictures, val_pictures


def augmentation(config: TrainConfig, preprocessing: Preprocessing) -> Callable[[Image.Image], Tensor]:
    """timm's training transform: PIL image to normalised tensor (3, H, W).

    For pictures of 32 pixels or less a random crop with a padding of 4 takes the place of the resized one, as in the
    published program; a picture of another size is first resized as for evaluation.
    """
    size = preprocessing.input_size
    geometry, colour, tensor = create_transform(
        size,
        is_training=True,
        hflip=config.hflip,
        color_jitter=config.color_jitter,
        auto_augment=config.auto_augment,
        interpolation=config.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        re_prob=config.random_erasing,
        re_mode="pixel",
        separate=True,
    )
    steps = [*geometry.transforms, *colour.transforms, *tensor.transforms]
    if max(size) <= SMALL:
        resize = transforms.Resize(min(size), transforms.InterpolationMode.BICUBIC)
        steps[:1] = [resize, transforms.RandomCrop(size, padding=4, pad_if_needed=True)]
    return transforms.Compose(steps)


def mixing(config: TrainConfig, num_classes: int) -> Mixup | None:
    """timm's mixup and CutMix, which smooths the labels as well; None when both are off."""
    if not (config.mixup or config.cutmix):
        return None
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        label_smoothing=config.label_smoothing,
        num_classes=num_classes,
    )


def build_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimiser at the scaled rate, without decay for 1-D parameters, biases and the model's own list.

    Raises ValueError for an optimiser that timm does not know.
    """
    lr = config.lr * config.batch_size / 512
    return create_optimizer_v2(model, opt=config.opt, lr=lr, weight_decay=config.weight_decay)


def build_scheduler(config: TrainConfig, optimizer: torch.optim.Optimizer) -> Scheduler:
    """timm's cosine with a linear warm-up. `set_learning_rate` puts it in force."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        num_epochs=config.epochs,
        min_lr=config.min_lr,
        warmup_lr=config.warmup_lr,
        warmup_epochs=config.warmup_epochs,
    )
    return scheduler


def set_learning_rate(scheduler: Scheduler, epoch: int) -> None:
    """Put the learning rate of `epoch` in force: the published one, whose schedule first moves after two epochs."""
    scheduler.step(max(epoch - 1, 0))
