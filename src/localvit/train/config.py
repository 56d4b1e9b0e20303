"""The settings of a training run: names, types, ranges, defaults and help, each stated once.

YAML files, command-line flags and Python use the same names. The defaults are the published recipe (LocalViT,
arXiv 2104.05707, section 4.1), which follows DeiT (arXiv 2012.12877).
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
"""In [0, 1]."""
Rate = Annotated[float, Field(ge=0, lt=1)]
"""In [0, 1)."""
LenientPath = Annotated[Path, Field(strict=False)]
"""A path, also given as text."""
LENIENT = Field(strict=False)
"""A tuple, also given as a list."""


def _lengths(*allowed: int, meaning: str) -> AfterValidator:
    def check(values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(values) not in allowed:
            raise ValueError(f"must be {meaning}")
        return values

    return AfterValidator(check)


class SettingsGroup(BaseModel):
    """Settings that belong together; each group is a section of `localvit train --help`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class DataSettings(SettingsGroup):
    """The images to train and to evaluate on."""

    data_set: str = "IMNET"
    """IMNET, CIFAR (CIFAR-100), CIFAR10, INAT, INAT19, FOLDER, DIGITS, or a timm name such as hfds/NAME."""
    data_path: LenientPath | None = None
    """Folder of the data set. Only DIGITS has a default."""
    inat_category: str = "name"
    """Level of the taxonomy used as the label in INAT and INAT19."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Fraction of each class to evaluate on when FOLDER has no val/; the seed determines the split."""
    skip_unreadable: bool = False
    """Read all images once before training, and leave out and list the unreadable ones, instead of stopping at the
    first."""
    cache: bool = False
    """Decode all images once and keep them in memory, and augment many at once, on a CUDA device if there is one. For
    images of up to 32 pixels that are of one size. Augmentation has the same distribution as without, but other random
    numbers."""


class ModelSettings(SettingsGroup):
    """The model and its initial weights."""

    model: str = "localvit_tiny"
    """Name of the model, from localvit or timm."""
    model_args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments for the model, such as depthwise=false or local_blocks=1-4."""
    localize: dict[str, Any] | None = None
    """Add locality to the model with localvit.localize and these arguments, such as kernel_size=5 or method=replace.
    Without arguments, use the defaults of localize."""
    finetune: str | None = None
    """Initial weights: a checkpoint file, or the name of a model with released weights."""
    freeze: Annotated[tuple[str, ...], LENIENT] = ()
    """Names of parameters that are not trained. * matches anything, as in blocks.0.*"""
    drop_rate: Rate = 0.0
    """Dropout rate before the head and after the position embedding."""
    drop_path_rate: Rate = 0.1
    """Stochastic depth rate of the last block. The rate grows linearly from 0 in the first block."""
    input_size: Annotated[
        tuple[Count, ...], LENIENT, _lengths(0, 1, 2, meaning="one side, or height and width, in pixels")
    ] = ()
    """Image size in pixels: one side, or height and width. Default: the model's own size."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""
    sync_bn: bool = False
    """Compute BatchNorm statistics over all processes."""


class OptimizationSettings(SettingsGroup):
    """The optimizer and how long to train."""

    epochs: Count = 300
    """Number of passes over the training images."""
    batch_size: Count = 128
    """Images per process and forward pass. Unless it is set, it is reduced for a small data set, so that few images of
    an epoch are left out because they do not fill a batch."""
    grad_accum: Count = 1
    """Number of batches whose gradients are accumulated for one step."""
    opt: str = "adamw"
    """Optimizer, by its name in timm."""
    opt_eps: Positive = 1e-8
    """Epsilon of the optimizer."""
    opt_betas: Annotated[
        tuple[Rate, ...], LENIENT, _lengths(0, 2, 3, meaning="two numbers, or three for an optimizer that takes them")
    ] = ()
    """Betas of the optimizer. Default: the optimizer's own."""
    momentum: Fraction = 0.9
    """Momentum, for optimizers that have one."""
    lr: Positive = 5e-4
    """Peak learning rate for 512 images per step. It is scaled linearly with the images per step over all processes."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Factor on the learning rate for each layer further from the head. None means 1."""
    locality_lr_scale: Positive = 1.0
    """Factor on the learning rate of locality modules. Branches that localize adds start at zero and profit from a
    larger rate."""
    weight_decay: NonNegative = 0.05
    """Weight decay. Biases, 1-D parameters and those in the model's no_weight_decay list are exempt."""
    clip_grad: Positive | None = None
    """Maximum norm of the gradient. None does not clip."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What to do when a loss or gradient is not finite: stop the run, or skip the step (and stop after 10 in a row)."""
    early_stopping: Count | None = None
    """Stop after this many epochs without a better Acc@1. None trains all epochs."""


class AverageSettings(SettingsGroup):
    """Exponential moving average (EMA) of the weights."""

    ema_decay: Rate | None = 0.99996
    """Decay per step of the moving average of weights and buffers. None keeps no average."""
    ema_on_cpu: bool = False
    """Keep the average in CPU memory."""


class ScheduleSettings(SettingsGroup):
    """The schedule of the learning rate."""

    sched: Literal["cosine", "tanh", "step", "multistep", "poly", "plateau"] = "cosine"
    """Schedule, by its name in timm. plateau depends on Acc@1."""
    sched_on_updates: bool = False
    """Update the learning rate every step instead of every epoch."""
    warmup_epochs: NonNegative = 5
    """Epochs of linear warm-up."""
    warmup_lr: NonNegative = 1e-6
    """Learning rate at the start of the warm-up. Unless it is set, it is lower for few images per step."""
    min_lr: NonNegative = 1e-5
    """Lowest learning rate of the schedule. Unless it is set, it is lower for few images per step."""
    decay_epochs: Positive = 30
    """Epochs between decays, for sched=step."""
    decay_milestones: Annotated[tuple[Count, ...], LENIENT] = (90, 180, 270)
    """Epochs at which the learning rate decays, for sched=multistep."""
    decay_rate: Positive = 0.1
    """Factor of a decay (step, multistep, plateau), or the power (poly)."""
    patience_epochs: Count = 10
    """Epochs without a better Acc@1 before a decay, for sched=plateau."""
    lr_noise: Annotated[
        tuple[Fraction, ...], LENIENT, _lengths(0, 1, 2, meaning="one or two fractions of the schedule")
    ] = ()
    """Fractions of the schedule between which noise is added to the learning rate."""
    lr_noise_pct: NonNegative = 0.67
    """Limit of the noise, as a fraction of the learning rate."""
    lr_noise_std: NonNegative = 1.0
    """Standard deviation of the noise."""


class AugmentationSettings(SettingsGroup):
    """Augmentation of the training images."""

    hflip: Fraction = 0.5
    """Probability of a horizontal flip."""
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    """Augmentation policy, in timm's notation. None applies no policy."""
    color_jitter: NonNegative = 0.4
    """Strength of color jitter. Has an effect only without an augmentation policy."""
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    """Resizing filter for training images."""
    random_erasing: Fraction = 0.25
    """Probability of random erasing (arXiv 1708.04896)."""
    random_erasing_mode: Literal["pixel", "rand", "const"] = "pixel"
    """Fill an erased rectangle with noise per pixel (pixel), one random color (rand), or the mean (const)."""
    random_erasing_count: Count = 1
    """Maximum number of erased rectangles per image."""
    repeated_aug: bool = True
    """Repeated augmentation (arXiv 1902.05509): take each image three times, with different augmentation. An epoch
    then contains fewer different images."""
    resplit: bool = False
    """Do not erase in the first of the repeats of an image."""


class MixingSettings(SettingsGroup):
    """Mixup and CutMix."""

    mixup: NonNegative = 0.8
    """Alpha of mixup (arXiv 1710.09412). 0 turns it off."""
    cutmix: NonNegative = 1.0
    """Alpha of CutMix (arXiv 1905.04899). 0 turns it off."""
    cutmix_minmax: Annotated[
        tuple[Fraction, ...], LENIENT, _lengths(0, 2, meaning="two fractions of a side, the smallest and the largest")
    ] = ()
    """Smallest and largest side of the pasted rectangle, as fractions of the image's sides, instead of an alpha."""
    mixup_prob: Fraction = 1.0
    """Probability of mixing, if mixup or CutMix is on."""
    mixup_switch_prob: Fraction = 0.5
    """Probability of CutMix instead of mixup when both are on."""
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    """Choose the mixing parameters per batch, per pair of images, or per image (elem)."""


class LossSettings(SettingsGroup):
    """The loss, and distillation from a teacher."""

    label_smoothing: Rate = 0.1
    """Label smoothing: the probability that is spread over all classes."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced weights each image by the inverse of the number of images in its class; the mean over the classes is
    1."""
    distillation: Literal["none", "soft", "hard"] = "none"
    """Distillation through the distillation token (DeiT, arXiv 2012.12877, section 4)."""
    teacher: str = "regnety_160"
    """Teacher: the name of a model, or a localvit checkpoint file."""
    teacher_checkpoint: LenientPath | None = None
    """Weights of a teacher given by name. Default: its released weights."""
    distillation_alpha: Fraction = 0.5
    """Weight of the distillation term in the loss."""
    distillation_tau: Positive = 1.0
    """Temperature of soft distillation."""


class RunSettings(SettingsGroup):
    """Device, precision, reproducibility and output."""

    device: str | None = None
    """cuda, mps or cpu. Default: the first of these that is available."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision. bfloat16 and float16 run under autocast. Default: bfloat16 on CUDA devices that support it, otherwise
    float32."""
    compile: bool = False
    """Compile the model with torch.compile."""
    cuda_graph: bool = False
    """Capture the forward and backward pass once as CUDA graphs, and replay them in each step. Faster where launching
    kernels takes longer than running them: small models and batches. For one process on a CUDA device; not together
    with compile or grad_checkpointing."""
    channels_last: bool = False
    """Use the channels-last memory format for images and weights."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Data loading processes per training process. 0 loads in the training process. Does not affect results."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of all random numbers of the run."""
    output_dir: LenientPath = Path("runs/train")
    """Folder for checkpoints, logs and all other output."""
    checkpoint_steps: Count | None = None
    """Save a checkpoint every this many steps, in addition to every epoch."""
    keep: Count = 2
    """Number of training checkpoints to keep."""
    tensorboard: bool = False
    """Write TensorBoard event files."""
    wandb: str | None = None
    """Log to this project of Weights & Biases."""


# pydantic lists the fields of the last base first, so the bases are in reverse order of the printed settings.
class TrainConfig(
    RunSettings,
    LossSettings,
    MixingSettings,
    AugmentationSettings,
    AverageSettings,
    ScheduleSettings,
    OptimizationSettings,
    ModelSettings,
    DataSettings,
):
    """A training run. The defaults are the published recipe (arXiv 2104.05707, section 4.1, after DeiT).

    The object is immutable, and prints as YAML. `localvit.train.build` makes a run from it.

    Raises:
        ValueError: pydantic's ValidationError, for an unknown name, a wrong type or a value out of range.
    """

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.localize and self.localize.get("trainable") == "locality" and not self.finetune:
            raise ValueError(
                "localize: trainable=locality freezes all other weights, so finetune must name pretrained ones"
            )
        if self.mixes and self.batch_size % 2:
            raise ValueError(f"batch_size={self.batch_size} must be even to mix images in pairs (mixup, cutmix)")
        if self.sched == "plateau" and self.sched_on_updates:
            raise ValueError("sched=plateau depends on the accuracy of each epoch, so sched_on_updates must be false")
        if self.cuda_graph and self.compile:
            raise ValueError("cuda_graph captures the model's own kernels, so compile must be false")
        if self.cuda_graph and self.grad_checkpointing:
            raise ValueError(
                "grad_checkpointing sets the random generator in the backward pass, which cuda_graph cannot capture, "
                "so one of them must be false"
            )
        return self

    @property
    def mixes(self) -> bool:
        """Whether mixup or CutMix is on."""
        return bool(self.mixup or self.cutmix or self.cutmix_minmax)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, as in YAML and JSON. `TrainConfig(**values)` restores them."""
        return self.model_dump(mode="json")

    def __str__(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)
