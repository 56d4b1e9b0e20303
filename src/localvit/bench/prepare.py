"""Prepare models for measuring: what one call of each does, and what is counted rather than timed.

Shapes: B batch, C channels, H and W height and width in pixels.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localvit.data.preprocessing import Preprocessing
from localvit.inference.cost import count_multiply_adds, count_parameters
from localvit.inference.exported import ExportedModel, is_exported_path
from localvit.inference.fusion import fuse
from localvit.inference.runner import LoadedModel, is_checkpoint_path, load_model
from localvit.models.factory import create_model
from localvit.models.registry import find_model

Call = Callable[[], Any]
_SAVED_AT = (2, 4)  # batch sizes between which the growth per image is taken


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is measured, and how the models run.

    Raises:
        ValueError: If the batch sizes or the number of rounds make no sense.
    """

    device: torch.device
    """Device that the models run on."""
    dtype: torch.dtype = torch.float32
    """In inference the model is converted to it; in training it is the dtype of autocast."""
    train: bool = False
    """Measure training steps (forward, cross entropy, backward, AdamW) instead of inference."""
    batch_sizes: tuple[int, ...] = (1, 16, 64)
    """Images per call, measured one size after the other."""
    rounds: int = 11
    """How many times each model is measured at each batch size; at least 3."""
    compile: bool = False
    """Compile the models with torch.compile, separately for each batch size."""
    channels_last: bool = False
    """Use the channels-last memory format for images and weights."""
    fuse: bool = True
    """Fuse the models with `localvit.fuse`; has no effect in training."""

    def __post_init__(self) -> None:
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            given = " ".join(map(str, self.batch_sizes)) or "none"
            raise ValueError(f"batch_sizes: {given} given; give one or more sizes, each at least 1")
        if len(set(self.batch_sizes)) < len(self.batch_sizes):
            raise ValueError(f"batch_sizes: {' '.join(map(str, self.batch_sizes))} given; give each size once")
        if self.rounds < 3:
            raise ValueError(f"rounds={self.rounds} must be at least 3, for quartiles to be meaningful")

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory format of the images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context of a training forward: autocast in half precision, a null context in float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


@dataclass(frozen=True, kw_only=True)
class BenchModel:
    """A model ready to be measured, on its device."""

    name: str
    """Name of the model, or path of the checkpoint or exported file, as given."""
    runtime: str = "torch"
    """What runs it: torch, or the runtime and precision of an exported file, which runs on the CPU."""
    input_size: tuple[int, int, int]
    """Channels, height and width of an image, in pixels."""
    parameters: int | None
    """Number of parameters, before fusing; None for an exported file, as are the following counts."""
    multiply_adds: int | None
    """Multiply-adds per image, before fusing."""
    fused_multiply_adds: int | None
    """Multiply-adds per image of the forward pass that is measured, which fusing may reduce."""
    saved_bytes_per_image: int | None
    """Bytes that an eager training forward saves for the backward pass (see `saved_bytes`), per image."""
    acc1: float | None
    """Published Acc@1 in percent; None if there is none for this model and image size."""
    module: Any
    """The module that is measured: an nn.Module, what torch.compile made of it, or an `ExportedModel`."""
    options: BenchOptions
    """The options it was prepared with."""
    optimizer: torch.optim.Optimizer | None
    """None in inference."""

    @property
    def title(self) -> str:
        """Name and runtime."""
        return self.name if self.runtime == "torch" else f"{self.name} in {self.runtime}"

    def call(self, batch_size: int) -> Call:
        """The call to measure: inference or a training step on one fixed batch of random images."""
        options = self.options
        if isinstance(self.module, ExportedModel):
            images_BCHW = torch.randn(batch_size, *self.input_size)
            if "resize" in self.module.metadata.in_graph:
                images_BCHW = torch.randint(256, images_BCHW.shape, dtype=torch.uint8)
            return partial(self.module.run, self.module.as_input(images_BCHW))
        dtype = torch.float32 if options.train else options.dtype
        images_BCHW = torch.randn(batch_size, *self.input_size, device=options.device, dtype=dtype)
        images_BCHW = images_BCHW.to(memory_format=options.memory_format)
        return self._training(images_BCHW) if options.train else self._inference(images_BCHW)

    def _inference(self, images_BCHW: Tensor) -> Call:
        @torch.inference_mode()
        def call() -> None:
            self.module(images_BCHW)

        return call

    def _training(self, images_BCHW: Tensor) -> Call:
        options, optimizer = self.options, self.optimizer
        assert optimizer is not None
        labels_B = torch.randint(self.module.num_classes, images_BCHW.shape[:1], device=options.device)
        scaler = torch.amp.GradScaler(options.device.type, enabled=options.dtype == torch.float16)

        def call() -> None:
            with options.autocast():
                loss = F.cross_entropy(self.module(images_BCHW), labels_B)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        return call

    def resident_bytes(self) -> int:
        """Bytes of the parameters, of the buffers and, after the first step, of the optimizer's state."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        if self.optimizer is not None:
            for state in self.optimizer.state.values():
                tensors += [value for value in state.values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in tensors)


def prepare(source: str, options: BenchOptions, input_size: tuple[int, int] | None = None) -> BenchModel:
    """Prepare a model for measuring.

    Args:
        source: Name of a model, which gets random weights, or a checkpoint file. Nothing is downloaded.
        options: How the model runs.
        input_size: Height and width of the images in pixels, instead of those of the model.

    Raises:
        The errors of `load_model` for files and of `create_model` for names.
    """
    loaded = load(source, input_size)
    preprocessing, acc1 = loaded.preprocessing, None
    model: Any = loaded.model
    if not is_checkpoint_path(source):
        published = find_model(source)
        if published is not None and preprocessing.input_size == tuple(model.pretrained_cfg["input_size"][1:]):
            acc1 = published.acc1
    channels = model.made_from["args"].get("in_chans", model.pretrained_cfg["input_size"][0])
    size = (channels, *preprocessing.input_size)
    parameters, multiply_adds = count_parameters(model), count_multiply_adds(model, size)
    model = model.to(options.device).to(
        memory_format=torch.channels_last if options.channels_last else torch.preserve_format
    )
    saved = _saved_bytes_per_image(model, size, options)

    module, fused_multiply_adds, optimizer = model, multiply_adds, None
    if options.train:
        module = model.train()
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
    else:
        module.eval()
        if options.fuse:
            module = fuse(module)
            fused_multiply_adds = count_multiply_adds(module, size)
        module = module.to(options.dtype)
    return BenchModel(
        name=source,
        input_size=size,
        parameters=parameters,
        multiply_adds=multiply_adds,
        fused_multiply_adds=fused_multiply_adds,
        saved_bytes_per_image=saved,
        acc1=acc1,
        # With dynamic shapes, the second batch size would compile slower code that serves every size.
        module=torch.compile(module, dynamic=False) if options.compile else module,
        options=options,
        optimizer=optimizer,
    )


def load(source: str, input_size: tuple[int, int] | None = None) -> LoadedModel:
    """A checkpoint, or a named model with random weights."""
    if is_checkpoint_path(source):
        return load_model(source, input_size=input_size)
    size_args: dict[str, Any] = {"img_size": input_size} if input_size else {}
    model: Any = create_model(source, **size_args).eval()
    return LoadedModel(
        model=model,
        name=source,
        class_names=None,
        preprocessing=Preprocessing.from_pretrained_cfg(model.pretrained_cfg, input_size),
        description=f"{source}, random weights",
    )


def prepare_exported(path: Path, options: BenchOptions) -> BenchModel:
    """Prepare an exported file for measuring. What it includes, such as normalization, is measured too.

    Raises:
        ValueError: If the options ask for what has no effect on it.
        CheckpointError: If the file is damaged.
    """
    return of_exported(str(path), ExportedModel.open(path), options)


def of_exported(name: str, exported: ExportedModel, options: BenchOptions) -> BenchModel:
    """An exported file that was opened. Raises ValueError if the options ask for what has no effect on it."""
    runtime = exported.runtime.name
    if options.train or options.device.type != "cpu" or options.dtype != torch.float32:
        raise ValueError(
            f"{name} runs in {runtime}, for inference on the CPU in its own precision: leave out train and dtype, and "
            "set the device to cpu"
        )
    precision = exported.metadata.precision
    return BenchModel(
        name=name,
        runtime=runtime if precision == "float32" else f"{runtime} {precision}",
        input_size=(3, *exported.metadata.preprocessing.input_size),
        parameters=None,
        multiply_adds=None,
        fused_multiply_adds=None,
        saved_bytes_per_image=None,
        acc1=None,
        module=exported,
        options=options,
        optimizer=None,
    )


def label(source: str) -> str:
    """A short label for a source: its name, or the name of the file without its folder."""
    return Path(source).name if is_checkpoint_path(source) or is_exported_path(source) else source


def saved_bytes(model: nn.Module, images_BCHW: Tensor) -> int:
    """Bytes that one forward pass with autograd saves for the backward pass, each storage counted once.

    Parameters and buffers are not counted; the images are, if a layer saves them. Measured with
    `torch.autograd.graph.saved_tensors_hooks`.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage  # the reference keeps the address from being reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images_BCHW)
    return sum(storage.nbytes() for storage in saved.values())


def _saved_bytes_per_image(model: nn.Module, input_size: tuple[int, int, int], options: BenchOptions) -> int:
    """Growth from one batch size to a larger one, so that what does not depend on it, as autocast's casts, cancels."""
    model.train()
    few, many = _SAVED_AT
    counted = {}
    for batch_size in _SAVED_AT:
        images_BCHW = torch.randn(batch_size, *input_size, device=options.device)
        with options.autocast():
            counted[batch_size] = saved_bytes(model, images_BCHW.to(memory_format=options.memory_format))
    return (counted[many] - counted[few]) // (many - few)
