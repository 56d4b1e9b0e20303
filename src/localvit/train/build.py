"""What a config builds: the data, the model, what trains it, and the state that it begins or goes on with."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from torch import Tensor, nn

from localvit.checkpoints import make_header, versions
from localvit.data.classes import match_classes
from localvit.data.images import Images
from localvit.data.preprocessing import Preprocessing
from localvit.data.training_batches import TrainingBatches
from localvit.inference.runner import InferenceOptions
from localvit.train.augmentation import mixing, open_both, training_batches
from localvit.train.config import TrainConfig
from localvit.train.distillation import DistillationLoss, build_teacher, check_student
from localvit.train.model import build_average, build_model, over_processes
from localvit.train.optimization import build_optimizer, build_scheduler
from localvit.train.run_folder import LOG, STATE, newest_state, read_state
from localvit.train.state import TrainState
from localvit.train.sync_batch_norm import synchronize_batch_norms
from localvit.utils.devices import DTYPES, choose_device
from localvit.utils.distributed import broadcast_from_rank0, check_agreement, together, world_size
from localvit.utils.weight_files import CheckpointError

Remark = Callable[[str], None]
"""Told what a person should know: the device, images left out."""
Criterion = Callable[[Tensor, Any, Tensor], Tensor]
"""Loss of images, what the model gave for them, and labels."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A run that is ready to go."""

    config: TrainConfig
    """What it was told."""
    state: TrainState
    """What changes while it goes."""
    trained: nn.Module
    """The state's model as a training step calls it: over all processes, compiled."""
    batches: TrainingBatches
    """The images to train on."""
    val_images: Images
    """The images to evaluate on after each epoch."""
    class_names: list[str] | None
    """Names of the model's classes, where the data set says them."""
    preprocessing: Preprocessing
    """How images are prepared for evaluation."""
    mixup: Mixup | None
    """Mixes the images and labels of a batch."""
    criterion: Criterion
    """What training makes small."""
    options: InferenceOptions
    """Where and how the model runs."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch."""
        return len(self.batches) // self.config.grad_accum

    @property
    def images_per_step(self) -> int:
        """Images of a step, over all processes."""
        return _images_per_step(self.config)

    @property
    def images_left(self) -> int:
        """Images that the rest of the run trains on, over all processes."""
        steps = (self.config.epochs - self.state.epoch) * self.steps_per_epoch - self.state.step
        return steps * self.images_per_step

    def describe(self) -> dict[str, Any]:
        """What checkpoints say of the model and of the run."""
        about = {"config": self.config.to_dict(), "images_per_step": self.images_per_step}
        return make_header(self.state.model, self.class_names, self.preprocessing.to_dict(), about)


def build(config: TrainConfig, remark: Remark = lambda message: None, resume: str | None = None) -> Training:
    """Open the data, make the model and what trains it, and bring them where a run to go on with stopped.

    Args:
        resume: None for a new run; "auto" for the newest state in the output folder, if there is one; or a state's
            file, ours or the published program's.

    Raises:
        DataError: for a data set that cannot be trained on.
        ValueError: for a model, optimizer or device that is not known, a batch larger than the data set, or processes
            that disagree about the run.
        FileExistsError: when a new run's output folder holds another.
        FileNotFoundError, CheckpointError: for a file to resume or to fine-tune from that cannot be used.
    """
    told = {f"the settings: {key}": value for key, value in config.to_dict().items() if key not in _OWN_TO_A_PROCESS}
    check_agreement({f"the version of {name}": number for name, number in versions().items()} | told)
    entries = broadcast_from_rank0(lambda: _entries(config, remark, resume))
    device, warning = choose_device(config.device)
    remark(f"warning: {warning}" if warning else f"device: {device}")
    if config.warmup_epochs >= config.epochs:
        remark(
            f"warning: the learning rate never reaches its highest, for {config.epochs} epochs end inside the "
            f"{config.warmup_epochs} of warm-up"
        )
    train_images, val_images = together(lambda: open_both(config, remark))
    check_agreement({"the images": {"train": _fingerprint(train_images), "val": _fingerprint(val_images)}})
    training = together(lambda: _assemble(config, device, train_images, val_images, remark))
    if entries is not None:
        together(lambda: _resume(training, entries, remark))
    return training


_OWN_TO_A_PROCESS = ("data_path", "output_dir", "workers")


def _entries(config: TrainConfig, remark: Remark, resume: str | None) -> dict[str, Any] | None:
    """The state to go on from, if any."""
    if resume not in (None, "auto"):
        return read_state(Path(str(resume)))
    if resume == "auto" and (entries := newest_state(config.output_dir, remark)) is not None:
        return entries
    if (config.output_dir / LOG).exists() or (config.output_dir / STATE).exists():
        raise FileExistsError(
            f"{config.output_dir} holds another run: --resume auto goes on with it; for a new one give another "
            "--output-dir, or remove that one"
        )
    if resume == "auto":
        remark(f"no state in {config.output_dir}: beginning anew")
    return None


def _fingerprint(images: Images) -> str:
    """The number of images and a hash of their names, labels and classes."""
    said = (
        images.class_names,
        list(images.labels),
        [images.name(index) for index in range(len(images))],
    )
    return f"{len(images):,} images, {hashlib.sha256(repr(said).encode()).hexdigest()[:12]}"


def _assemble(
    config: TrainConfig, device: torch.device, train_images: Images, val_images: Images, remark: Remark
) -> Training:
    class_names = train_images.class_names
    num_classes = len(class_names) if class_names else max(train_images.labels) + 1
    match_classes(val_images, class_names, num_classes)  # now, rather than after the first epoch
    model, preprocessing = build_model(config, num_classes, class_names, remark)
    model.to(device, memory_format=torch.channels_last if config.channels_last else torch.preserve_format)
    batches = training_batches(config, train_images, preprocessing, pin_memory=device.type == "cuda")
    mixup = mixing(config, num_classes)
    criterion = _criterion(
        config, model, train_images, preprocessing, num_classes, device, mixes=mixup is not None, remark=remark
    )
    if config.sync_bn and world_size() > 1:
        synchronize_batch_norms(model, device)
    optimizer = build_optimizer(config, model, _images_per_step(config))
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
        trained=over_processes(config, model, device, preprocessing.input_size),
        batches=batches,
        val_images=val_images,
        class_names=class_names,
        preprocessing=preprocessing,
        mixup=mixup,
        criterion=criterion,
        options=InferenceOptions(
            batch_size=config.batch_size,
            workers=config.workers,
            device=device,
            dtype=dtype,
            channels_last=config.channels_last,
        ),
    )


def _criterion(
    config: TrainConfig,
    model: Any,
    images: Images,
    preprocessing: Preprocessing,
    num_classes: int,
    device: torch.device,
    *,
    mixes: bool,
    remark: Remark,
) -> Criterion:
    weight = None
    if config.class_weights == "balanced":
        counts = torch.tensor(images.labels).bincount(minlength=num_classes).clamp(min=1)
        weight = (counts.reciprocal() / counts.reciprocal().mean()).to(device)
    base = nn.CrossEntropyLoss(weight=weight, label_smoothing=0.0 if mixes else config.label_smoothing)
    if config.distillation == "none":
        return lambda images_BCHW, outputs, targets: base(outputs, targets)
    check_student(model)
    model.set_distilled_training(True)
    teacher = build_teacher(
        config.teacher,
        config.teacher_checkpoint,
        num_classes,
        images.class_names,
        device,
        preprocessing=preprocessing,
        remark=remark,
    )
    return DistillationLoss(
        base, teacher, config.distillation, alpha=config.distillation_alpha, tau=config.distillation_tau
    )


def _dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    if config.dtype:
        return DTYPES[config.dtype]
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def _images_per_step(config: TrainConfig) -> int:
    return config.batch_size * config.grad_accum * world_size()


def _resume(training: Training, entries: dict[str, Any], remark: Remark) -> None:
    """Bring the state where `entries` stopped, and say with what other settings it goes on."""
    about = entries.get("localvit", {}).get("about", {})
    training.state.load_entries(entries)
    then = about.get("images_per_step", training.images_per_step)
    if training.state.step and then != training.images_per_step:
        raise CheckpointError(
            f"the state lies inside an epoch of {then} images a step, and this run takes "
            f"{training.images_per_step}: resume with the same --batch-size, --grad-accum and number of processes"
        )
    now = training.config.to_dict()
    for name, value in about.get("config", {}).items():
        if name in now and now[name] != value and name not in ("workers", "output_dir", "device", "keep"):
            remark(f"warning: going on with {name}={now[name]!r}, where the run began with {value!r}")
