"""What a training run is told."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from localvit.train.settings import check_kind, closest, converted


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run. Defaults are the published program's (arXiv 2104.05707, section 4.1, after DeiT).

    Raises ValueError, with the field's name, for a value of another type or outside its range.
    """

    model: str = "localvit_tiny"
    """Name of the model: ours or timm's."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """More arguments of the model, such as depthwise=false or local_blocks=1-4."""
    localize: dict[str, Any] | None = None
    """Put locality into the model by localvit.localize, with these arguments, such as kernel_size=5 or method=replace;
    without any, its defaults."""
    finetune: str | None = None
    """Weights to begin with: a checkpoint file, or a model's name for its released ones."""
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are, by name, with * for anything, such as blocks.0.*"""
    drop_rate: float = 0.0
    """Dropout before the head and in the positions."""
    drop_path_rate: float = 0.1
    """Stochastic depth: rate of the last block, linear from 0 at the first."""
    input_size: tuple[int, ...] = ()
    """Side of the images, or height and width, in pixels; by default the model's own."""

    data_set: str = "IMNET"
    """IMNET, CIFAR (100), CIFAR10, INAT, INAT19, FOLDER, DIGITS, or a timm name like hfds/NAME."""
    data_path: Path | None = None
    """Folder of the data set; only DIGITS has one by default."""
    inat_category: str = "name"
    """Level of the taxonomy that INAT and INAT19 are labeled at."""
    val_fraction: float = 0.15
    """Part of each class to evaluate on, where FOLDER has no val/; drawn by the seed."""

    epochs: int = 300
    """Times that the training images are gone through."""
    batch_size: int = 128
    """Images a process and forward; those of an epoch that fill no batch are left out of it."""
    grad_accum: int = 1
    """Batches whose gradients make one step."""
    opt: str = "adamw"
    """timm's name of the optimizer."""
    opt_eps: float = 1e-8
    """Epsilon of the optimizer."""
    opt_betas: tuple[float, ...] = ()
    """Betas of the optimizer; by default its own."""
    momentum: float = 0.9
    """Momentum of an optimizer that has one."""
    lr: float = 5e-4
    """Highest learning rate, for 512 images a step; scaled by the images a step over all processes."""
    layer_decay: float | None = None
    """Factor on the learning rate a layer further from the head; None is 1."""
    locality_lr_scale: float = 1.0
    """Factor on the learning rate of what brings locality; localize's branch starts at zero and wants more."""
    weight_decay: float = 0.05
    """Weight decay; none for 1-D parameters, biases and what the model's no_weight_decay names."""
    clip_grad: float | None = None
    """Largest norm of all gradients together; None leaves them."""

    sched: Literal["cosine", "tanh", "step", "multistep", "poly", "plateau"] = "cosine"
    """timm's schedule of the learning rate; plateau follows Acc@1."""
    sched_on_updates: bool = False
    """Move the learning rate every step rather than every epoch."""
    warmup_epochs: float = 5
    """Epochs in which the learning rate rises linearly."""
    warmup_lr: float = 1e-6
    """Learning rate that the rise starts from."""
    min_lr: float = 1e-5
    """Learning rate that the schedule falls to."""
    decay_epochs: float = 30
    """Epochs between the falls of a step schedule."""
    decay_milestones: tuple[int, ...] = (90, 180, 270)
    """Epochs of the falls of a multistep schedule."""
    decay_rate: float = 0.1
    """Factor of a fall (step, multistep, plateau), or the power of poly."""
    patience_epochs: int = 10
    """Epochs without a better Acc@1 before a plateau schedule falls."""
    lr_noise: tuple[float, ...] = ()
    """Parts of the schedule between which the learning rate is noisy."""
    lr_noise_pct: float = 0.67
    """Largest noise, as a part of the learning rate."""
    lr_noise_std: float = 1.0
    """Standard deviation of the noise."""
    ema_decay: float | None = 0.99996
    """Decay, a step, of the running average of weights and buffers; None keeps no average."""
    ema_on_cpu: bool = False
    """Keep the average in the CPU's memory."""
    early_stopping: int | None = None
    """End after so many epochs without a better Acc@1; None trains to the last."""

    label_smoothing: float = 0.1
    """Probability spread over all classes."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weigh the loss of each class by one over its number of images, scaled to a mean of 1."""
    mixup: float = 0.8
    """Alpha of mixup (arXiv 1710.09412); 0 is off."""
    cutmix: float = 1.0
    """Alpha of CutMix (arXiv 1905.04899); 0 is off."""
    cutmix_minmax: tuple[float, ...] = ()
    """Smallest and largest side of the pasted rectangle, as parts of the image's, instead of cutmix's alpha."""
    mixup_prob: float = 1.0
    """Probability of mixing, where either is on."""
    mixup_switch_prob: float = 0.5
    """Probability of CutMix rather than mixup, where both are on."""
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    """Draw how to mix for a batch, a pair, or each image."""
    repeated_aug: bool = True
    """Take each image three times in a row, differently augmented, and so fewer images an epoch."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    """timm's augmentation policy; None for none."""
    color_jitter: float = 0.4
    """Strength of color jitter, which acts only where auto_augment is None."""
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    """Filter for resizing while training."""
    random_erasing: float = 0.25
    """Probability of erasing rectangles (arXiv 1708.04896)."""
    random_erasing_mode: Literal["pixel", "rand", "const"] = "pixel"
    """Fill a rectangle with noise, with one random color, or with the mean."""
    random_erasing_count: int = 1
    """Most rectangles of an image."""
    resplit: bool = False
    """Leave the first of each image's repeats unerased."""

    distillation: Literal["none", "soft", "hard"] = "none"
    """Learn from a teacher through the distillation token (DeiT, arXiv 2012.12877)."""
    teacher: str = "regnety_160"
    """Name of the teacher, or a checkpoint file of ours."""
    teacher_checkpoint: Path | None = None
    """Weights of the teacher of that name; by default its released ones."""
    distillation_alpha: float = 0.5
    """Weight of the teacher's part of the loss."""
    distillation_tau: float = 1.0
    """Temperature of soft distillation."""

    nonfinite: Literal["stop", "skip"] = "stop"
    """When a loss is not finite: stop the run, or skip the step (and stop after 10 in a row)."""
    checkpoint_steps: int | None = None
    """Save the state every so many steps, beside every epoch."""
    keep: int = 2
    """How many of the newest states to keep."""
    seed: int = 0
    """What every random draw of the run follows from."""
    device: str | None = None
    """cuda, mps or cpu; by default the first of these that there is."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Half precisions run under autocast; by default bfloat16 on CUDA devices that have it."""
    compile: bool = False
    """Compile the model."""
    channels_last: bool = False
    """Lay images and weights out channels-last."""
    grad_checkpointing: bool = False
    """Compute activations anew in the backward pass, for less memory."""
    sync_bn: bool = False
    """BatchNorm over the images of all processes."""
    workers: int = 2
    """Processes that prepare images, beside each that trains; 0 prepares them there. It changes no result."""
    output_dir: Path = Path("runs/train")
    """Folder of everything that the run leaves."""
    tensorboard: bool = False
    """Write TensorBoard's event files."""
    wandb: str | None = None
    """Project of Weights & Biases to log to."""

    def __post_init__(self) -> None:
        for each in fields(self):
            check_kind(each.name, getattr(self, each.name), each.type)
        for rule, holds, names in _RULES:
            for name in names:
                value = getattr(self, name)
                for number in value if isinstance(value, tuple) else (value,):
                    if number is not None and not holds(number):
                        raise ValueError(f"{name}={value} must be {rule}")
        for name, lengths, rule in _LENGTHS:
            if len(getattr(self, name)) not in lengths:
                raise ValueError(f"{name}={getattr(self, name)} must be {rule}")
        if self.localize and self.localize.get("trainable") == "locality" and not self.finetune:
            raise ValueError(
                "localize: trainable=locality keeps every other weight as it is, so finetune must name them"
            )
        if self.mixes and self.batch_size % 2:
            raise ValueError(f"batch_size={self.batch_size} must be even to mix images in pairs (mixup, cutmix)")
        if self.sched == "plateau" and self.sched_on_updates:
            raise ValueError("sched=plateau follows the epochs' accuracy, so sched_on_updates must be false")

    @property
    def mixes(self) -> bool:
        """Whether images and labels are mixed."""
        return bool(self.mixup or self.cutmix or self.cutmix_minmax)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """A config of plain values, as YAML gives them. Raises ValueError, also for a name that is no field."""
        kinds = {each.name: each.type for each in fields(cls)}
        for name in values:
            if name not in kinds:
                raise ValueError(f"{name} is no training setting{closest(name, kinds)}")
        return cls(**{name: converted(value, kinds[name]) for name, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which `of` reads back."""
        return {
            name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


_RULES = (
    (
        "at least 1",
        lambda value: value >= 1,
        ("epochs", "batch_size", "grad_accum", "early_stopping", "checkpoint_steps", "keep", "patience_epochs"),
    ),
    ("at least 1", lambda value: value >= 1, ("random_erasing_count", "input_size", "decay_milestones")),
    ("at least 0", lambda value: value >= 0, ("workers", "seed")),
    (
        "above 0 and finite",
        lambda value: 0 < value < math.inf,
        ("lr", "locality_lr_scale", "clip_grad", "opt_eps", "decay_epochs", "decay_rate", "distillation_tau"),
    ),
    (
        "at least 0 and finite",
        lambda value: 0 <= value < math.inf,
        ("warmup_epochs", "warmup_lr", "min_lr", "weight_decay", "lr_noise_pct", "lr_noise_std"),
    ),
    ("at least 0 and finite", lambda value: 0 <= value < math.inf, ("mixup", "cutmix", "color_jitter")),
    (
        "in [0, 1]",
        lambda value: 0 <= value <= 1,
        ("mixup_prob", "mixup_switch_prob", "cutmix_minmax", "hflip", "random_erasing", "distillation_alpha"),
    ),
    ("in [0, 1]", lambda value: 0 <= value <= 1, ("lr_noise", "momentum")),
    (
        "in [0, 1)",
        lambda value: 0 <= value < 1,
        ("drop_rate", "drop_path_rate", "label_smoothing", "ema_decay", "opt_betas"),
    ),
    ("in (0, 1]", lambda value: 0 < value <= 1, ("layer_decay",)),
    ("in (0, 1)", lambda value: 0 < value < 1, ("val_fraction",)),
)
_LENGTHS = (
    ("input_size", (0, 1, 2), "one side, or height and width"),
    ("cutmix_minmax", (0, 2), "two parts of a side, the smallest and the largest"),
    ("lr_noise", (0, 1, 2), "one or two parts of the schedule"),
    ("opt_betas", (0, 2, 3), "two numbers, or three for an optimizer that takes them"),
)
