"""A model made ready to be used on images, and images fed to it in batches.

Shapes: B images of a batch, C channels, H and W pixels, M classes of the model.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from localvit.checkpoints import Checkpoint, model_from_checkpoint
from localvit.data.classes import model_class_names
from localvit.data.images import PreparedImages
from localvit.data.preprocessing import Preprocessing
from localvit.data.workers import leave_quietly, loaded
from localvit.inference.fusion import fuse
from localvit.models.factory import create_model

CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")


@dataclass(frozen=True, kw_only=True)
class ReadyModel:
    """A model with what is needed to use it on images."""

    model: nn.Module
    """In evaluation mode, on the CPU, in float32."""
    name: str
    """The architecture's name."""
    class_names: list[str] | None
    """Names of its classes, if it knows them."""
    preprocessing: Preprocessing
    """How its images are prepared."""
    description: str
    """What was loaded from where, for a person."""

    def place(self, options: "InferenceOptions") -> Any:
        """The model where and how `options` want it."""
        layout = torch.channels_last if options.channels_last else torch.preserve_format
        model: Any = fuse(self.model) if options.fuse else self.model
        model = model.to(options.device).to(memory_format=layout)
        return torch.compile(model) if options.compile else model


def names_file(source: str) -> bool:
    """Whether `source` is meant as a checkpoint file, there or not, rather than as a model's name."""
    return Path(source).suffix in CHECKPOINT_SUFFIXES or Path(source).is_file()


def ready_model(
    source: str,
    *,
    checkpoint: Path | None = None,
    weights: Literal["raw", "ema"] = "raw",
    input_size: tuple[int, int] | None = None,
) -> ReadyModel:
    """Load the model that `source` names: a checkpoint file, or a model's name with its released weights.

    Args:
        source: a file, or a name that timm knows; a name takes its weights from `checkpoint` where that is given.
        checkpoint: weights for the model called `source`.
        weights: the raw or the averaged ones of a checkpoint.
        input_size: height and width to use instead of the model's own, in pixels.

    Raises:
        FileNotFoundError, CheckpointError: see `load_checkpoint`.
        ValueError: for a name that is not known.
        RuntimeError: when released weights cannot be downloaded.
    """
    size: dict[str, Any] = {"img_size": input_size} if input_size else {}
    model: Any
    loaded: Checkpoint | None = None
    if checkpoint is not None:
        model, loaded = model_from_checkpoint(checkpoint, weights, name=source, **size)
    elif names_file(source):
        model, loaded = model_from_checkpoint(source, weights, **size)
    else:
        model = create_model(source, pretrained=True, **size)
    name = model.made_from["name"]
    if loaded is not None and loaded.preprocessing is not None:
        preprocessing = Preprocessing.from_dict(
            loaded.preprocessing | ({"input_size": input_size} if input_size else {})
        )
    else:
        preprocessing = Preprocessing.of_cfg(model.pretrained_cfg, input_size)
    return ReadyModel(
        model=model.eval(),
        name=name,
        class_names=model_class_names(model, loaded.class_names if loaded else None),
        preprocessing=preprocessing,
        description=f"{name}, {weights} weights of {loaded.path}" if loaded else f"{name}, released weights",
    )


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """How images are fed to a model and where it runs; none of it changes a result beyond rounding."""

    batch_size: int = 16
    """Images a batch and process. On a CPU larger ones are slower (docs/eval_speed.md)."""
    workers: int = 2
    """Processes that decode images, beside each process that computes; 0 decodes in that one."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where the model runs."""
    dtype: torch.dtype = torch.float32
    """float32, or the half precision that autocast uses."""
    channels_last: bool = False
    """Lay images and weights out channels-last."""
    compile: bool = False
    """Compile the model with torch.compile; pays off over many batches."""
    fuse: bool = True
    """Use the model's inference form (`localvit.fuse`)."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers} must not be negative")

    def autocast(self) -> contextlib.AbstractContextManager:
        """What a forward runs under: autocast in half precision, nothing in float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def _collate(items: Sequence[tuple[int, Tensor | str]]) -> tuple[list[int], Tensor | None, list[tuple[int, str]]]:
    read = [(index, image) for index, image in items if isinstance(image, Tensor)]
    failed = [(index, reason) for index, reason in items if isinstance(reason, str)]
    return [index for index, _ in read], torch.stack([image for _, image in read]) if read else None, failed


def batches(
    prepared: PreparedImages, indices: Sequence[int], options: InferenceOptions
) -> Iterator[tuple[list[int], Tensor | None, list[tuple[int, str]]]]:
    """Batches of prepared images: their indices, the images (B, C, H, W), and the unreadable ones with the reason.

    Raises RuntimeError when a worker process dies.
    """
    loader: DataLoader = DataLoader(
        Subset(prepared, list(indices)),
        batch_size=options.batch_size,
        num_workers=min(options.workers, -(-len(indices) // options.batch_size)),
        collate_fn=_collate,
        pin_memory=options.device.type == "cuda",
        worker_init_fn=leave_quietly,
    )
    yield from loaded(loader)


def forward(model: nn.Module, images_BCHW: Tensor, options: InferenceOptions) -> Tensor:
    """Logits (B, M) in float32 of a model in evaluation mode."""
    memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
    images_BCHW = images_BCHW.to(options.device, non_blocking=True, memory_format=memory_format)
    with options.autocast():
        return model(images_BCHW).float()
