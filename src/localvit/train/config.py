"""What a training run is told, and reading it from a recipe."""

import difflib
import math
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

RECIPES = Path(__file__).parent.parent / "recipes"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run. Defaults are the published program's (arXiv 2104.05707, section 4.1, after DeiT).

    Raises ValueError, with the field's name, for a value of another type or outside its range.
    """

    model: str = "localvit_tiny"
    """Name of the model: ours or timm's."""
    drop_path_rate: float = 0.1
    """Stochastic depth: rate of the last block, linear from 0 at the first."""
    input_size: tuple[int, ...] = ()
    """Side of the pictures, or height and width, in pixels; by default the model's own."""

    data_set: str = "IMNET"
    """IMNET, CIFAR (100), CIFAR10, INAT, INAT19, FOLDER, DIGITS, or a timm name like hfds/NAME."""
    data_path: Path | None = None
    """Folder of the data set; only DIGITS has one by default."""
    inat_category: str = "name"
    """Level of the taxonomy that INAT and INAT19 are labelled at."""

    epochs: int = 300
    """Times that the training pictures are gone through."""
    batch_size: int = 128
    """Pictures a step; those of an epoch that fill no batch are left out of it."""
    opt: str = "adamw"
    """timm's name of the optimiser."""
    lr: float = 5e-4
    """Highest learning rate, for 512 pictures a step; scaled by the batch size."""
    warmup_epochs: int = 5
    """Epochs in which the learning rate rises linearly."""
    warmup_lr: float = 1e-6
    """Learning rate that the rise starts from."""
    min_lr: float = 1e-5
    """Learning rate that the cosine falls to."""
    weight_decay: float = 0.05
    """Weight decay; none for 1-D parameters, biases and what the model's `no_weight_decay` names."""
    clip_grad: float | None = None
    """Largest norm of all gradients together; None leaves them."""
    ema_decay: float | None = 0.99996
    """Decay, a step, of the running average of the weights; None keeps no average."""

    label_smoothing: float = 0.1
    """Probability spread over all classes."""
    mixup: float = 0.8
    """Alpha of mixup (arXiv 1710.09412); 0 is off."""
    cutmix: float = 1.0
    """Alpha of CutMix (arXiv 1905.04899); 0 is off."""
    mixup_prob: float = 1.0
    """Probability that a batch is mixed, where either is on."""
    mixup_switch_prob: float = 0.5
    """Probability of CutMix rather than mixup, where both are on."""
    repeated_aug: bool = True
    """Take each picture three times in a row, differently augmented, and so fewer pictures an epoch."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    """timm's augmentation policy; None for none."""
    color_jitter: float = 0.4
    """Strength of colour jitter, which acts only where `auto_augment` is None."""
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    """Filter for resizing while training."""
    random_erasing: float = 0.25
    """Probability of erasing a rectangle with noise (arXiv 1708.04896)."""

    seed: int = 0
    """What every random draw of the run follows from."""
    device: str | None = None
    """cuda, mps or cpu; by default the first of these that there is."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Half precisions run under autocast."""
    workers: int = 2
    """Processes that prepare pictures; 0 prepares them in the main one. It changes no result."""
    output_dir: Path = Path("runs/train")
    """Where last.safetensors, best.safetensors and log.txt go."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not _is(value, field.type):
                raise ValueError(f"{field.name}={value!r} must be {_said(field.type)}{_yaml_hint(value)}")
        for rule, holds, names in _RULES:
            for name in names:
                value = getattr(self, name)
                if value is not None and not holds(value):
                    raise ValueError(f"{name}={value} must be {rule}")
        if len(self.input_size) > 2 or any(side < 1 for side in self.input_size):
            raise ValueError(f"input_size={self.input_size} must be one side, or height and width, of at least 1 pixel")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} must be fewer than epochs={self.epochs}")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"batch_size={self.batch_size} must be even to mix pictures in pairs (mixup, cutmix)")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """A config of plain values, as YAML gives them. Raises ValueError, also for a name that is no field."""
        kinds = {field.name: field.type for field in fields(cls)}
        for name in values:
            if name not in kinds:
                close = difflib.get_close_matches(str(name), kinds, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ValueError(f"{name} is no training setting{hint}")
        return cls(**{name: _converted(value, kinds[name]) for name, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which `of` reads back."""
        return {
            name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a YAML file, to be merged with others and given to `TrainConfig.of`.

    Raises FileNotFoundError, or ValueError when it is no YAML mapping.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold settings, a line each, like `epochs: 100`")
    return settings


def read_recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe that comes with the package. Raises ValueError for an unknown name."""
    known = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    if name not in known:
        raise ValueError(f"no recipe is called {name!r}; there is {', '.join(known)}")
    return read_settings(RECIPES / f"{name}.yaml")


_RULES = (
    ("at least 1", lambda value: value >= 1, ("epochs", "batch_size")),
    ("at least 0", lambda value: value >= 0, ("warmup_epochs", "workers", "seed")),
    ("above 0 and finite", lambda value: 0 < value < math.inf, ("lr", "clip_grad")),
    (
        "at least 0 and finite",
        lambda value: 0 <= value < math.inf,
        ("warmup_lr", "min_lr", "weight_decay", "mixup", "cutmix", "color_jitter"),
    ),
    ("in [0, 1]", lambda value: 0 <= value <= 1, ("mixup_prob", "mixup_switch_prob", "hflip", "random_erasing")),
    ("in [0, 1)", lambda value: 0 <= value < 1, ("drop_path_rate", "label_smoothing", "ema_decay")),
)


def _is(value: Any, kind: Any) -> bool:
    """Whether `value` is of the annotated type; whole numbers are numbers, truth values are not."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return any(_is(value, option) for option in get_args(kind))
    if origin is Literal:
        return value in get_args(kind)
    if origin is tuple:
        return isinstance(value, tuple) and all(_is(item, get_args(kind)[0]) for item in value)
    if kind in (int, float):
        return isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind)


def _said(kind: Any) -> str:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_said(option) for option in get_args(kind))
    if origin is Literal:
        return f"one of {', '.join(get_args(kind))}"
    names = {int: "a whole number", float: "a number", str: "text", Path: "a path", types.NoneType: "none"}
    return names.get(kind, "whole numbers")


def _yaml_hint(value: Any) -> str:
    """YAML 1.1 wants a point before an exponent, which nobody remembers."""
    try:
        number = float(value) if isinstance(value, str) else None
    except ValueError:
        number = None
    return "" if number is None else f"; YAML reads {value} as text, so write {number!r}"


def _converted(value: Any, kind: Any) -> Any:
    """Lists as tuples, and text as a path, where the field is one."""
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if isinstance(value, str) and (kind is Path or Path in get_args(kind)) else value
