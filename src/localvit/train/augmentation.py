"""Training and validation images: opening them, augmentation, and mixing (mixup, CutMix)."""

import logging
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import Mixup, auto_augment, create_transform
from torchvision import transforms

from localvit.data.batch_augmentation import BatchAugmentation
from localvit.data.cached_batches import CachedBatches, RandomlyTransformedCache
from localvit.data.cached_images import DecodedImages, cache_images
from localvit.data.class_folders import SPLITS, folders_beside_splits, is_validation_name
from localvit.data.datasets import open_images
from localvit.data.images import DataError, Images
from localvit.data.preprocessing import Preprocessing
from localvit.data.recorded_images import Record, check_recorded, recorded_images
from localvit.data.resized_crop import ResizedCrop
from localvit.data.split import split_images
from localvit.data.training_batches import AugmentedImages, EpochSampler, LoadedBatches, TrainingBatches
from localvit.train.config import TrainConfig
from localvit.utils.distributed import processes_on_machine, rank, world_size

logger = logging.getLogger(__name__)

REPEATS = 3
"""Number of times that repeated augmentation takes an image."""
SMALL = 32
"""Image side in pixels up to which a padded random crop replaces the random resized crop."""


def open_train_and_val(config: TrainConfig, record: Record | None = None) -> tuple[Images, Images]:
    """The training images and the validation images.

    A FOLDER without val/ is split with the seed. All other data sets contain both. With the `record` of a
    run that is resumed, only its images are used, and remain in the same split. Raises DataError.
    """
    if config.data_set.upper() == "FOLDER" and config.data_path and (config.data_path / "train").is_dir():
        _report_unread_folders(config.data_path)

    def images_of(split: str) -> Images:
        return open_images(config.data_set, config.data_path, split=split, inat_category=config.inat_category)

    train_images = images_of("train")
    if record is None:
        _check_several_classes(train_images, config)
    if config.data_set.upper() == "FOLDER" and config.data_path and not (config.data_path / "val").is_dir():
        if record:
            return _recorded(config, train_images, train_images, record)
        parts = split_images(train_images, config.val_fraction, config.seed)
        logger.info(
            f"{config.data_path} has no val/: evaluating on {len(parts[1]):,} of its {len(train_images):,} images, "
            f"selected with seed {config.seed}"
        )
        return parts
    val_images = images_of("val")
    if not _share_images(train_images, val_images):
        return _recorded(config, train_images, val_images, record) if record else (train_images, val_images)
    raise DataError(
        f"{train_images.root} would be used for both training and evaluation: move the training images to train/ in "
        "this folder, and other images, for evaluation, to val/"
    )


def _share_images(train_images: Images, val_images: Images) -> bool:
    """Whether both contain the same file. Either folder may be a link to the other; iNaturalist has one for both."""
    if not train_images.root or not val_images.root or train_images.root.resolve() != val_images.root.resolve():
        return False
    train_names, val_names = (
        {images.name(index) for index in range(len(images))} for images in (train_images, val_images)
    )
    return not train_names.isdisjoint(val_names)


def _recorded(config: TrainConfig, train_images: Images, val_images: Images, record: Record) -> tuple[Images, Images]:
    """The images that are in the record. The folder of both is the same if the run split it."""
    parts = recorded_images(train_images, record["train"]), recorded_images(val_images, record["val"])
    num_images = len(train_images) + (len(val_images) if val_images is not train_images else 0)
    num_added = num_images - len(parts[0]) - len(parts[1])
    check_recorded(*parts, record, num_added, str(config.data_path or config.data_set))
    return parts


def samples_per_epoch(config: TrainConfig, images: Images) -> int:
    """The number of training images in an epoch of each process, before they are divided into batches."""
    repeats = REPEATS if config.repeated_aug else 1
    return len(EpochSampler(len(images), config.seed, repeats=repeats, num_processes=world_size()))


def _report_unread_folders(root: Path) -> None:
    """Log the folders beside train/ that are not read. Raises DataError for another name of val/."""
    unread = folders_beside_splits(root)
    if not (root / "val").is_dir():
        for name in filter(is_validation_name, unread):
            raise DataError(f"{root / name} would not be read: rename it to val, or move it elsewhere")
    if unread:
        logger.warning(
            f"{root} contains folders beside {', '.join(SPLITS)}, which are not read: {', '.join(unread[:5])}"
            f"{', ...' if len(unread) > 5 else ''}"
        )


def _check_several_classes(images: Images, config: TrainConfig) -> None:
    """Raise DataError if all images are of one class."""
    labels = set(images.labels)
    if len(labels) != 1:
        return
    (label,) = labels
    name = images.class_names[label] if images.class_names else str(label)
    advice = f": if {images.root / name} contains the class folders, give it as --data-path" if images.root else ""
    raise DataError(
        f"all images of {config.data_path or config.data_set} are of one class, {name}, so a model is always right"
        f"{advice or '; add images of other classes'}"
    )


def training_batches(
    config: TrainConfig,
    images: Images,
    preprocessing: Preprocessing,
    device: torch.device,
    decoded: DecodedImages | None = None,
) -> TrainingBatches:
    """The training batches of this process, for a model on `device`. `decoded` has the images of an earlier run.

    Raises:
        ValueError: if there are not enough images for a step, or an augmentation that `cache` does not support.
        DataError, UnreadableImage, RuntimeError: if the images cannot be kept in memory, see `cache_images`.
    """
    transform = augmentation(config, preprocessing, config.random_erasing)
    order = {
        "batches_per_step": config.grad_accum,
        "repeats": REPEATS if config.repeated_aug else 1,
        "num_processes": world_size(),
        "process": rank(),
    }
    if config.cache:
        _check_size(preprocessing.input_size)
        cached = _cached_with_transform(config, images, transform, device, decoded)
        return CachedBatches(cached, batch_size=config.batch_size, **order)
    first = augmentation(config, preprocessing, 0.0) if config.resplit else None
    augmented = AugmentedImages(images, transform, config.seed, first_transform=first)
    pin_memory = device.type == "cuda"
    return LoadedBatches(
        augmented, batch_size=config.batch_size, workers=config.workers, pin_memory=pin_memory, **order
    )


def _check_size(size: tuple[int, int]) -> None:
    if max(size) > SMALL:
        raise ValueError(
            f"cache: is for inputs of at most {SMALL} pixels, and the input size is {size[0]} x {size[1]}: turn it off "
            "(--no-cache)"
        )


def _cached_with_transform(
    config: TrainConfig,
    images: Images,
    transform: transforms.Compose,
    device: torch.device,
    decoded: DecodedImages | None,
) -> RandomlyTransformedCache:
    try:
        augment = BatchAugmentation(transform)
    except ValueError as error:
        raise ValueError(f"cache: {error}: turn it off (--no-cache), or choose another augmentation") from error
    cached = cache_images(
        images,
        transform.transforms[0].resize,
        config.workers,
        copies=processes_on_machine(),
        title="training ",
        decoded=decoded,
    )
    where = device if device.type == "cuda" else torch.device("cpu")
    return RandomlyTransformedCache(cached, augment, config.seed, where, erase_first=not config.resplit)


def augmentation(config: TrainConfig, preprocessing: Preprocessing, random_erasing: float) -> transforms.Compose:
    """timm's training transform, from a PIL image to a normalized tensor (3, H, W).

    For image sizes up to 32 pixels, a random crop with a padding of 4 replaces the random resized crop, as in the
    published program. Images of another size are first resized as for evaluation.
    """
    size = preprocessing.input_size
    geometry, color, tensor = create_transform(
        size,
        is_training=True,
        hflip=config.hflip,
        color_jitter=config.color_jitter,
        auto_augment=config.auto_augment,
        interpolation=config.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        re_prob=random_erasing,
        re_mode=config.random_erasing_mode,
        re_count=config.random_erasing_count,
        separate=True,
    )
    for step in color.transforms:
        _posterize_to_black(step)
    steps = [*geometry.transforms, *color.transforms, *tensor.transforms]
    if max(size) <= SMALL:
        resize = transforms.Resize(min(size), transforms.InterpolationMode.BICUBIC)
        steps[:1] = [ResizedCrop(resize, transforms.RandomCrop(size, padding=4, pad_if_needed=True))]
    return transforms.Compose(steps)


def _posterize_to_black(policy: Any) -> None:
    """Let timm's policies posterize to 0 bits, which results in black. Pillow 13 raises an error for 0 bits."""
    operations = [*getattr(policy, "ops", ()), *chain(*getattr(policy, "policy", ()))]
    for operation in operations:
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterized


def _posterized(image: Image.Image, bits_to_keep: int, **unused: Any) -> Image.Image:
    return auto_augment.posterize(image, bits_to_keep) if bits_to_keep else Image.new(image.mode, image.size)


def build_mixup(config: TrainConfig, num_classes: int) -> Mixup | None:
    """timm's mixup and CutMix, which also apply label smoothing. None if both are off."""
    if not config.mixes:
        return None
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        cutmix_minmax=config.cutmix_minmax or None,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        mode=config.mixup_mode,
        label_smoothing=config.label_smoothing,
        num_classes=num_classes,
    )
