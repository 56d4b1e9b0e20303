"""Load a trained model and run it on batches of images.

Shapes: B batch size, C channels, H and W height and width in pixels, M classes of the model.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from localvit.checkpoints import Checkpoint, model_from_checkpoint
from localvit.checkpoints.hub_download import PREFIX, download
from localvit.checkpoints.hub_folder import is_hub_folder
from localvit.data.cached_images import CachedImages
from localvit.data.classes import model_class_names
from localvit.data.image_stream import PreparedStream, StreamedImage
from localvit.data.images import ImageSequence, PreparedImages
from localvit.data.preprocessing import Preprocessing, WholeImages
from localvit.data.workers import init_worker, iterate_batches
from localvit.inference.calibration import Calibration, for_weights
from localvit.inference.exported import ExportedModel, is_exported_path
from localvit.inference.fusion import fuse
from localvit.models.factory import create_model
from localvit.models.registry import DownloadError, packaged_weights
from localvit.utils.devices import choose_device

T = TypeVar("T")

CHECKPOINT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar")


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """Where and how a model runs. None of these changes a result beyond rounding."""

    batch_size: int | None = None
    """Images per batch and process; by default 16 on a CPU, where more are slower (docs/eval_speed.md), else 128."""
    workers: int = 2
    """Number of processes that decode images; 0 decodes in the main process."""
    device: torch.device = field(default_factory=lambda: choose_device(None)[0])
    """Where the model runs; by default CUDA, MPS or the CPU, whichever is available first."""
    dtype: torch.dtype = torch.float32
    """float32, or a half precision type, which is used through autocast."""
    channels_last: bool = False
    """Use the channels-last memory format."""
    compile: bool = False
    """Compile the model with torch.compile, which pays off over many batches."""
    fuse: bool = True
    """Run the fused model (`localvit.fuse`), which is faster."""

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers} must not be negative")

    @property
    def images_per_batch(self) -> int:
        """`batch_size`, or its default on this device."""
        return self.batch_size or (16 if self.device.type == "cpu" else 128)

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context of a forward pass: autocast in half precision, nothing in float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A trained model with its class names and preprocessing."""

    model: nn.Module
    """In evaluation mode, on the CPU, in float32."""
    name: str
    """Name of the architecture."""
    class_names: list[str] | None
    """Names of its classes, or None if they are unknown."""
    preprocessing: Preprocessing
    """How its images are prepared."""
    description: str
    """What was loaded from where."""
    about: dict[str, Any] = field(default_factory=dict)
    """What else its checkpoint says: versions, the settings and metrics of its run."""
    weights: Literal["raw", "ema"] = "raw"
    """Which weights of the checkpoint it has; the metrics in `about` are those of the raw ones."""

    def __str__(self) -> str:
        return f"{self.description}; {self.preprocessing}"

    @property
    def calibration(self) -> Calibration | None:
        """The temperature that was fitted to these weights, if any. Raises CheckpointError for a damaged one."""
        return Calibration.of(self.about, self.description)

    def prepare(self, options: InferenceOptions) -> nn.Module:
        """The model on the device and in the state that `options` ask for: fused, channels-last, compiled.

        An exported model runs in its runtime as it is. Raises ValueError if `options` ask for something else.
        """
        if isinstance(self.model, ExportedModel):
            if options.compile or options.channels_last or options.dtype != torch.float32:
                raise ValueError(
                    f"{self.model.path} runs in {self.model.runtime.name} in float32: dtype, channels_last and compile "
                    "have no effect on it; leave them out"
                )
            return self.model
        memory_format = torch.channels_last if options.channels_last else torch.preserve_format
        model: Any = fuse(self.model) if options.fuse else self.model
        model = model.to(options.device).to(memory_format=memory_format)
        if options.compile:
            model = torch.compile(model)
        return model


def is_checkpoint_path(source: str) -> bool:
    """Whether `source` means a checkpoint file, existing or not, or a model's folder, rather than a model's name."""
    return Path(source).suffix in CHECKPOINT_SUFFIXES or Path(source).is_file() or is_hub_folder(source)


def load_model(
    source: str | Path,
    *,
    checkpoint: Path | None = None,
    weights: Literal["raw", "ema"] = "raw",
    input_size: tuple[int, int] | None = None,
) -> LoadedModel:
    """Load a model from a checkpoint or exported file, or by name with its released weights or those in this package.

    Args:
        source: A checkpoint file, a file of `localvit.export`, a folder of `localvit push`, "hf-hub:user/name" for such
            a folder on the Hugging Face Hub, or the name of a model registered with timm.
        checkpoint: Weights for the model named `source`, instead of the released or packaged ones.
        weights: Load the raw or the averaged (EMA) weights of a checkpoint.
        input_size: Height and width to use instead of the model's own, in pixels.

    Raises:
        FileNotFoundError: No such checkpoint file.
        CheckpointError: The file is damaged or unsafe, or does not fit the model; see `load_checkpoint`.
        ValueError: The name is unknown, or an exported file cannot have what is asked for.
        ImportError: The runtime of an exported file is not installed.
        RuntimeError: This machine cannot run an exported file.
        DownloadError: The released weights cannot be downloaded.
        HubError: A model of the hub cannot be downloaded.
    """
    source = str(source)
    if source.startswith(PREFIX):
        source = str(download(source))
    if is_exported_path(source):
        if checkpoint is not None or weights != "raw":
            raise ValueError(
                f"{source} is an exported file, which has its own weights: leave out checkpoint and weights"
            )
        return _load_exported(Path(source), input_size)
    size: dict[str, Any] = {"img_size": input_size} if input_size else {}
    model: Any
    loaded: Checkpoint | None = None
    packaged = None if checkpoint or is_checkpoint_path(source) else packaged_weights(source)
    if checkpoint is not None:
        model, loaded = model_from_checkpoint(checkpoint, weights, name=source, **size)
    elif packaged is not None:  # as a checkpoint, which says more than pretrained=True keeps
        model, loaded = model_from_checkpoint(packaged.path, weights, **size)
    elif is_checkpoint_path(source):
        model, loaded = model_from_checkpoint(source, weights, **size)
    else:
        try:
            model = create_model(source, pretrained=True, **size)
        except DownloadError as error:
            raise error.with_advice("give the file with --checkpoint FILE") from error
    name = model.made_from["name"]
    if packaged is not None:
        description = f"{name}.{packaged.tag}, {weights} weights in this package"
    else:
        description = f"{name}, {weights} weights of {loaded.path}" if loaded else f"{name}, released weights"
    if loaded is not None and loaded.preprocessing is not None:
        preprocessing = Preprocessing.from_dict(
            loaded.preprocessing | ({"input_size": input_size} if input_size else {})
        )
    else:
        preprocessing = Preprocessing.from_pretrained_cfg(model.pretrained_cfg, input_size)
    return LoadedModel(
        model=model.eval(),
        name=name,
        class_names=model_class_names(model, loaded.class_names if loaded else None),
        preprocessing=preprocessing,
        description=description,
        about=for_weights(loaded.about, weights) if loaded else {},
        weights=weights,
    )


def _load_exported(path: Path, input_size: tuple[int, int] | None) -> LoadedModel:
    model = ExportedModel.open(path)
    model.check_runs_here()
    metadata = model.metadata
    preprocessing = metadata.preprocessing.to_dict()
    if input_size is not None and input_size != metadata.preprocessing.input_size:
        if metadata.dynamic != "size":
            height, width = metadata.preprocessing.input_size
            raise ValueError(f"{path} takes images of {height} x {width} pixels only: export it with --dynamic size")
        preprocessing["input_size"] = input_size
    whole = "resize" in metadata.in_graph
    return LoadedModel(
        model=model,
        name=metadata.architecture,
        class_names=metadata.class_names,
        preprocessing=(WholeImages if whole else Preprocessing).from_dict(preprocessing),
        description=f"{path}, {metadata.architecture}, run by {model.runtime.name} on the CPU",
        about=metadata.about,
    )


ModelSource = str | Path | nn.Module | LoadedModel
"""A checkpoint or exported file, a model's name, a module, or the result of `load_model`."""


@dataclass(frozen=True, kw_only=True)
class Runner:
    """A model on its device, with everything needed to run it on images."""

    model: nn.Module
    preprocessing: Preprocessing
    class_names: list[str] | None
    options: InferenceOptions

    @classmethod
    def of(
        cls,
        model: ModelSource,
        preprocessing: Preprocessing | None = None,
        options: InferenceOptions | None = None,
        class_names: Sequence[str] | None = None,
    ) -> Self:
        """Prepare any `ModelSource`. What is not given is taken from the checkpoint or the model.

        A module runs as it is, on the device it is on. Raises ValueError if it is in training mode or on another
        device than `options.device`, or if it has no preprocessing and none is given; for files and names, raises as
        `load_model` does.
        """
        if isinstance(model, nn.Module):
            device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
            options = options or InferenceOptions(device=device)
            _check_runnable(model, device, options)
            pretrained_cfg: Any = getattr(model, "pretrained_cfg", None)
            if preprocessing is None and not pretrained_cfg:
                raise ValueError(f"{type(model).__name__} does not define its preprocessing; give preprocessing=")
            return cls(
                model=model,
                preprocessing=preprocessing or Preprocessing.from_pretrained_cfg(pretrained_cfg),
                class_names=model_class_names(model, class_names),
                options=options,
            )
        loaded = model if isinstance(model, LoadedModel) else load_model(model)
        options = options or InferenceOptions()
        return cls(
            model=loaded.prepare(options),
            preprocessing=preprocessing or loaded.preprocessing,
            class_names=list(class_names) if class_names is not None else loaded.class_names,
            options=options,
        )

    def load_batches(
        self, images: ImageSequence, indices: Sequence[int]
    ) -> Iterator[tuple[list[int], Tensor | None, list[tuple[int, str]]]]:
        """Load and transform images in batches.

        Yields for each batch the indices of its readable images, these images (B, C, H, W) or None if there are none,
        and index and reason of each unreadable one. Raises RuntimeError if a worker process dies.
        """
        batch_size = self.options.images_per_batch
        if isinstance(images, CachedImages) and images.preprocessing == self.preprocessing:
            for start in range(0, len(indices), batch_size):
                chosen = list(indices[start : start + batch_size])
                bytes_BCHW = images.pixels_NCHW[chosen].to(self.options.device)
                yield chosen, self.preprocessing.normalized(bytes_BCHW), []
            return
        dataset = Subset(PreparedImages(images, self.preprocessing.transform()), list(indices))
        num_batches = -(-len(indices) // self._images_decoded_at_once)
        yield from self._batches(dataset, range(len(indices)), min(self.options.workers, num_batches))

    def load_stream(
        self, images: Iterable[StreamedImage]
    ) -> Iterator[tuple[list[StreamedImage], Tensor | None, list[tuple[StreamedImage, str]]]]:
        """Decode and transform streamed images in batches. This process reads them, so worker processes share nothing.

        Yields as `load_batches`, with the images, without their content, instead of indices. Raises what reading
        raises, and RuntimeError if a worker process dies.
        """
        yield from self._batches(PreparedStream(self.preprocessing.transform()), images, self.options.workers)

    @property
    def _images_decoded_at_once(self) -> int:
        """The batch size; 1 if images keep their sizes, which make no batch."""
        return 1 if isinstance(self.preprocessing, WholeImages) else self.options.images_per_batch

    def _batches(self, dataset: Dataset, items: Iterable[Any], workers: int) -> Iterator[Any]:
        """The items of the data set, collated in batches."""
        loader: DataLoader = DataLoader(
            dataset,
            batch_sampler=_in_batches(items, self._images_decoded_at_once),
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=self.options.device.type == "cuda",
            worker_init_fn=init_worker,
        )
        yield from iterate_batches(loader)

    def logits(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, M) in float32, on the model's device. Call it in inference mode."""
        memory_format = torch.channels_last if self.options.channels_last else torch.contiguous_format
        images_BCHW = images_BCHW.to(self.options.device, non_blocking=True, memory_format=memory_format)
        with self.options.autocast():
            return self.model(images_BCHW).float()


def _check_runnable(model: nn.Module, device: torch.device, options: InferenceOptions) -> None:
    """Raise ValueError for a module in training mode, or on another device than `options.device`."""
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode; call model.eval() first")
    if device.type != options.device.type or options.device.index not in (None, device.index):
        raise ValueError(
            f"{type(model).__name__} is on {device}, and options.device is {options.device}; "
            f"call model.to({str(options.device)!r}), or use InferenceOptions(device=torch.device({str(device)!r}))"
        )


def _in_batches(items: Iterable[T], batch_size: int) -> Iterator[list[T]]:
    """The items in lists of `batch_size`, of which the last one may be shorter. Read when a list is asked for."""
    remaining = iter(items)
    while batch := list(islice(remaining, batch_size)):
        yield batch


def _collate(items: Sequence[tuple[T, Tensor | str]]) -> tuple[list[T], Tensor | None, list[tuple[T, str]]]:
    readable = [(item, image) for item, image in items if isinstance(image, Tensor)]
    failed = [(item, reason) for item, reason in items if isinstance(reason, str)]
    images_BCHW = torch.stack([image for _, image in readable]) if readable else None
    return [item for item, _ in readable], images_BCHW, failed
