"""Building a run from its settings: data, model, loss, optimizer, and the state to start or resume from."""

import hashlib
import logging
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import Mixup
from torch import Tensor, nn

from localvit.checkpoints import make_header, versions
from localvit.data.cached_images import DecodedImages, cache_for_evaluation
from localvit.data.classes import match_classes
from localvit.data.held_out import describe_held_out
from localvit.data.images import Images
from localvit.data.preprocessing import Preprocessing
from localvit.data.readable import leave_out_unreadable
from localvit.data.recorded_images import Record, image_keys
from localvit.data.training_batches import TrainingBatches
from localvit.inference.runner import InferenceOptions
from localvit.train.augmentation import build_mixup, open_train_and_val, samples_per_epoch, training_batches
from localvit.train.buffers import SavedBuffers
from localvit.train.config import TrainConfig
from localvit.train.cuda_graph import check_graph_support
from localvit.train.derived import derive_settings, images_per_step
from localvit.train.device_batches import DeviceBatches
from localvit.train.losses import Criterion, DistillationLoss, Loss, cross_entropy, without_distillation
from localvit.train.model import build_average, build_model, wrap_model
from localvit.train.optimization import build_optimizer, build_scheduler
from localvit.train.ownership import Ownership
from localvit.train.resume import Start, check_classes, check_input_size, find_start, settings_on_resume
from localvit.train.state import TrainState
from localvit.train.sync_batch_norm import synchronize_batch_norms
from localvit.train.teacher import build_teacher, check_student
from localvit.utils.devices import DTYPES, choose_device
from localvit.utils.distributed import (
    broadcast_from_rank0,
    check_same_on_all_ranks,
    processes_on_machine,
    run_on_all_ranks,
    world_size,
)
from localvit.utils.weight_files import CheckpointError

logger = logging.getLogger(__name__)

_MAY_DIFFER_BETWEEN_RANKS = ("data_path", "output_dir", "workers")


@dataclass(frozen=True, kw_only=True, repr=False)
class Training:
    """A run that is ready to train with `localvit.train.fit`. Prints its model, images and steps."""

    config: TrainConfig
    """The settings, with those that were derived."""
    state: TrainState
    """All that changes during training: model, optimizer, progress."""
    wrapped_model: nn.Module
    """The state's model as a training step calls it: in DistributedDataParallel, compiled, or as CUDA graphs."""
    saved_buffers: SavedBuffers
    """The buffers from before a step, to undo it."""
    batches: TrainingBatches
    """The training images."""
    val_images: Images
    """The images to evaluate on after each epoch."""
    record: Record
    """The names of both, for the checkpoints."""
    ownership: Ownership
    """The run's right to its folder."""
    class_names: list[str] | None
    """Names of the model's classes, if the data set has names."""
    preprocessing: Preprocessing
    """Preprocessing for evaluation."""
    mixup: Mixup | None
    """Mixes the images and labels of a batch."""
    criterion: Criterion
    """The loss that training minimizes."""
    options: InferenceOptions
    """Device, precision and memory format."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps per epoch."""
        return len(self.batches) // self.config.grad_accum

    @property
    def images_per_step(self) -> int:
        """Images per step, over all processes."""
        return images_per_step(self.config)

    @property
    def images_left(self) -> int:
        """Images in the remaining steps of the run, over all processes."""
        steps = (self.config.epochs - self.state.epoch) * self.steps_per_epoch - self.state.step
        return steps * self.images_per_step

    def device_batches(self, epoch: int, first: int = 0) -> DeviceBatches:
        """The batches of an epoch on the device, starting at batch `first`."""
        return DeviceBatches(self.batches.epoch(epoch, first), self.options)

    def describe(self) -> dict[str, Any]:
        """The description that checkpoints hold: the model, its classes and preprocessing, and the settings."""
        about = {"config": self.config.to_dict(), "images_per_step": self.images_per_step}
        about |= describe_held_out(self.batches.images.images, self.val_images)
        header = make_header(self.state.model, self.class_names, self.preprocessing.to_dict(), about)
        return header | {"images": dict(self.record), "run_id": self.ownership.run_id}

    def __repr__(self) -> str:
        config, options = self.config, self.options
        height, width = self.preprocessing.input_size
        dtype = str(options.dtype).removeprefix("torch.")
        processes = f" x {world_size()} processes" if world_size() > 1 else ""
        return (
            f"{config.model}: {self.state.num_trained_parameters:,} trained parameters, images of {height} x {width} "
            f"pixels\n"
            f"{config.data_set}: {len(self.batches.images.images):,} training images, {len(self.val_images):,} "
            f"validation images\n"
            f"{config.epochs} epochs of {self.steps_per_epoch:,} steps with {self.images_per_step:,} images, on "
            f"{options.device}{processes} in {dtype}"
        )


def build(
    config: TrainConfig,
    *,
    criterion: Loss | None = None,
    resume: str | None = None,
    decoded: DecodedImages | None = None,
) -> Training:
    """Open the images and build the model, the loss and the optimizer of a run.

    Args:
        config: the settings. Some are derived where they are not set, and then recorded in the run's config (see
            `localvit.train.derived`).
        criterion: loss of logits (B, M) and targets, such as a module of `torch.nn`; by default cross entropy with the
            configured label smoothing and class weights. Targets are classes (B), or probabilities (B, M) if mixup or
            CutMix is on. A module is moved to the device. With distillation it is the loss of the class token.
        resume: None for a new run; "auto" for the newest checkpoint in the output folder, if any; or the file of a
            training checkpoint, from localvit or from the published program.
        decoded: what several runs of one process share with `cache`, so that equal images are decoded once.

    Returns:
        The run, for `localvit.train.fit`.

    Raises:
        DataError: if the data set cannot be trained on, or has other classes than the run to resume.
        ValueError: for an unknown model, optimizer or device, a batch larger than the data set, class weights for a
            `criterion` of your own, processes with different settings or images, or `cuda_graph` where it cannot work.
        FileExistsError: if the output folder contains another run.
        FileNotFoundError, CheckpointError: if a file to resume or fine-tune from cannot be used, or a setting cannot
            change on resume.
    """
    if criterion is not None and config.class_weights != "none":
        raise ValueError(
            f"class_weights={config.class_weights} has no effect on a criterion of your own: weight the classes in it, "
            "and leave class_weights at none"
        )
    settings = {
        f"the setting {name}": value
        for name, value in config.to_dict().items()
        if name not in _MAY_DIFFER_BETWEEN_RANKS
    }
    check_same_on_all_ranks({f"the version of {name}": number for name, number in versions().items()} | settings)
    start = broadcast_from_rank0(lambda: find_start(config, resume))
    config = settings_on_resume(config, start)
    device, warning = choose_device(config.device)
    if warning:
        logger.warning(warning)
    else:
        logger.info(f"device: {device}")
    check_graph_support(config, device)
    if config.warmup_epochs >= config.epochs:
        logger.warning(
            f"the learning rate never reaches its peak: the run has {config.epochs} epochs, and the warm-up takes "
            f"{config.warmup_epochs:g}"
        )
    train_images, val_images = run_on_all_ranks(lambda: _open(config, start))
    record = {"train": image_keys(train_images), "val": image_keys(val_images)}
    check_same_on_all_ranks(
        {
            "the images": {
                "train": _fingerprint(train_images, record["train"]),
                "val": _fingerprint(val_images, record["val"]),
            }
        }
    )
    if config.skip_unreadable:
        train_images, val_images = (
            leave_out_unreadable(images, config.workers) for images in (train_images, val_images)
        )
    config = derive_settings(config, samples_per_epoch(config, train_images))
    images = train_images, val_images
    training = run_on_all_ranks(lambda: _assemble(config, device, images, record, start, criterion, decoded))
    if start.entries is not None:
        run_on_all_ranks(lambda: _load_state(training, start))
    return training


def _open(config: TrainConfig, start: Start) -> tuple[Images, Images]:
    """The images to train and to evaluate on; of a resumed run, its own."""
    train_images, val_images = open_train_and_val(config, start.record)
    check_classes(train_images.class_names, start)
    return train_images, val_images


def _fingerprint(images: Images, keys: Tensor) -> str:
    """The number of images and a hash of their names and classes."""
    content = repr(images.class_names).encode() + keys.numpy().tobytes()
    return f"{len(images):,} images, {hashlib.sha256(content).hexdigest()[:12]}"


def _assemble(
    config: TrainConfig,
    device: torch.device,
    images: tuple[Images, Images],
    record: Record,
    start: Start,
    loss: Loss | None,
    decoded: DecodedImages | None,
) -> Training:
    train_images, val_images = images
    class_names = train_images.class_names
    num_classes = len(class_names) if class_names else max(train_images.labels) + 1
    match_classes(val_images, class_names, num_classes)  # fails now rather than after the first epoch
    model, preprocessing = build_model(config, num_classes, class_names, start)
    model.to(device, memory_format=torch.channels_last if config.channels_last else torch.preserve_format)
    batches = training_batches(config, train_images, preprocessing, device, decoded)
    if config.cache:
        copies = processes_on_machine()
        val_images = cache_for_evaluation(val_images, preprocessing, config.workers, copies=copies, decoded=decoded)
    loss = loss or cross_entropy(config, train_images.labels, num_classes)
    if isinstance(loss, nn.Module):
        loss.to(device)
    criterion = without_distillation(loss)
    if config.distillation != "none":
        criterion = _distillation(config, loss, model, preprocessing, num_classes, class_names, device)
    if config.sync_bn and world_size() > 1:
        synchronize_batch_norms(model, device)
    optimizer = build_optimizer(config, model, images_per_step(config))
    dtype = _dtype(config, device)
    return Training(
        config=config,
        state=TrainState(
            model=model,
            ema=build_average(config, model),
            optimizer=optimizer,
            scheduler=build_scheduler(config, optimizer, len(batches) // config.grad_accum),
            scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        ),
        wrapped_model=wrap_model(config, model, device, dtype, preprocessing.input_size),
        saved_buffers=SavedBuffers(model),
        batches=batches,
        val_images=val_images,
        record=record,
        ownership=Ownership(config.output_dir, start.run_id, start.source),
        class_names=class_names,
        preprocessing=preprocessing,
        mixup=build_mixup(config, num_classes),
        criterion=criterion,
        options=InferenceOptions(
            batch_size=config.batch_size,
            workers=config.workers,
            device=device,
            dtype=dtype,
            channels_last=config.channels_last,
        ),
    )


def _distillation(
    config: TrainConfig,
    loss: Loss,
    model: Any,
    preprocessing: Preprocessing,
    num_classes: int,
    class_names: list[str] | None,
    device: torch.device,
) -> Criterion:
    """The distillation loss; makes the model return the logits of both heads in training."""
    check_student(model)
    model.set_distilled_training(True)
    teacher = build_teacher(
        config.teacher, config.teacher_checkpoint, num_classes, class_names, device, preprocessing=preprocessing
    )
    assert config.distillation != "none"
    alpha, tau = config.distillation_alpha, config.distillation_tau
    return DistillationLoss(loss, teacher, config.distillation, alpha=alpha, tau=tau)


def _dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    if config.dtype:
        return DTYPES[config.dtype]
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def _load_state(training: Training, start: Start) -> None:
    """Load the checkpoint to resume from into the state of a run."""
    assert start.entries is not None
    check_input_size(training.preprocessing.input_size, start)
    training.state.load_entries(start.entries)
    before = start.header.get("about", {}).get("images_per_step", training.images_per_step)
    if training.state.step and before != training.images_per_step:
        raise CheckpointError(
            f"the checkpoint was saved within an epoch with {before} images per step, and this run has "
            f"{training.images_per_step}: resume with the same --batch-size, --grad-accum and number of processes"
        )
    if before != training.images_per_step:
        logger.warning(
            f"resuming with {training.images_per_step} images per step, over all processes; the run had {before}. The "
            "learning rate is scaled along"
        )
