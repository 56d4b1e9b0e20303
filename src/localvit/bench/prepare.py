"""Models made ready to be measured: what one call of each does, and what can be counted instead of timed.

Shapes: B images of a batch, C channels, H and W pixels.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localvit.data.preprocessing import Preprocessing
from localvit.inference.cost import count_multiply_adds, count_parameters
from localvit.inference.fusion import fuse
from localvit.inference.runner import names_file, ready_model
from localvit.models.zoo import create_model, published_model

Call = Callable[[], Any]
_SAVED_AT = (2, 4)  # images; what grows between them is one image's


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is measured, and how the models run. Raises ValueError for numbers that make no sense."""

    device: torch.device
    """Where the models run."""
    dtype: torch.dtype = torch.float32
    """Inference in half precision converts the model to it; training in half precision runs under autocast."""
    train: bool = False
    """Whole training steps (forward, cross entropy, backward, AdamW) instead of inference."""
    batch_sizes: tuple[int, ...] = (1, 16, 64)
    """Images a call, measured one size after the other."""
    rounds: int = 11
    """How often everything of a batch size is measured, in turn."""
    compile: bool = False
    """Compile the models with torch.compile, for each batch size anew."""
    channels_last: bool = False
    """Lay images and weights out channels-last."""
    fuse: bool = True
    """Measure the inference form (`localvit.fuse`); without effect on training."""

    def __post_init__(self) -> None:
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            said = " ".join(map(str, self.batch_sizes)) or "nothing"
            raise ValueError(f"batch_sizes: {said}: give one or more sizes, each at least 1")
        if len(set(self.batch_sizes)) < len(self.batch_sizes):
            raise ValueError(f"batch_sizes: {' '.join(map(str, self.batch_sizes))}: give each size once")
        if self.rounds < 3:
            raise ValueError(f"rounds={self.rounds} must be at least 3: fewer have no spread")

    @property
    def memory_format(self) -> torch.memory_format:
        """How images lie in memory."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self) -> contextlib.AbstractContextManager:
        """What a training forward runs under: autocast in half precision, nothing in float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


@dataclass(frozen=True, kw_only=True)
class BenchModel:
    """A model in the form that is measured, on its device."""

    name: str
    """As it was asked for."""
    input_size: tuple[int, int, int]
    """Channels, height and width of an image."""
    parameters: int
    """Number of parameters as made, before any fusing."""
    multiply_adds: int
    """Multiply-adds of one image as made, before any fusing."""
    form_multiply_adds: int
    """Multiply-adds of one image in the measured form, whose dead work may be gone; in training, of its forward."""
    saved_bytes_per_image: int
    """What a training forward, not compiled, keeps for its backward pass (`saved_bytes`) for each further image."""
    acc1: float | None
    """Published Acc@1 in percent, where these are a published model and image size."""
    form: Any
    """What runs."""
    options: BenchOptions
    """How it runs."""
    optimizer: torch.optim.Optimizer | None
    """In training."""

    def call(self, batch_size: int) -> Call:
        """What is measured: inference on, or a training step from, one fixed batch of random images."""
        options = self.options
        dtype = torch.float32 if options.train else options.dtype
        images_BCHW = torch.randn(batch_size, *self.input_size, device=options.device, dtype=dtype)
        images_BCHW = images_BCHW.to(memory_format=options.memory_format)
        return self._training(images_BCHW) if options.train else self._inference(images_BCHW)

    def _inference(self, images_BCHW: Tensor) -> Call:
        @torch.inference_mode()
        def call() -> None:
            self.form(images_BCHW)

        return call

    def _training(self, images_BCHW: Tensor) -> Call:
        options, optimizer = self.options, self.optimizer
        assert optimizer is not None
        labels_B = torch.randint(self.form.num_classes, images_BCHW.shape[:1], device=options.device)
        scaler = torch.amp.GradScaler(options.device.type, enabled=options.dtype == torch.float16)

        def call() -> None:
            with options.autocast():
                loss = F.cross_entropy(self.form(images_BCHW), labels_B)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        return call

    def held_bytes(self) -> int:
        """Bytes of the model itself and, once a step has been made, of its optimizer's state."""
        tensors = [*self.form.parameters(), *self.form.buffers()]
        if self.optimizer is not None:
            for state in self.optimizer.state.values():
                tensors += [value for value in state.values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in tensors)


def prepare(source: str, options: BenchOptions, input_size: tuple[int, int] | None = None) -> BenchModel:
    """Make the model that `source` names, a checkpoint file or a model's name, ready to be measured.

    Args:
        source: a model of a name gets random weights; nothing is downloaded.
        options: how it runs.
        input_size: height and width to use instead of the model's own, in pixels.

    Raises as `ready_model` for files and as `create_model` for names.
    """
    model: Any
    acc1 = None
    if names_file(source):
        ready = ready_model(source, input_size=input_size)
        model, preprocessing = ready.model, ready.preprocessing
    else:
        size_args: dict[str, Any] = {"img_size": input_size} if input_size else {}
        model = create_model(source, **size_args).eval()
        preprocessing = Preprocessing.of_cfg(model.pretrained_cfg, input_size)
        published = published_model(source)
        if published is not None and preprocessing.input_size == tuple(model.pretrained_cfg["input_size"][1:]):
            acc1 = published.acc1
    channels = model.made_from["args"].get("in_chans", model.pretrained_cfg["input_size"][0])
    size = (channels, *preprocessing.input_size)
    parameters, multiply_adds = count_parameters(model), count_multiply_adds(model, size)
    model = model.to(options.device).to(
        memory_format=torch.channels_last if options.channels_last else torch.preserve_format
    )
    saved = _saved_bytes_per_image(model, size, options)

    form, form_multiply_adds, optimizer = model, multiply_adds, None
    if options.train:
        form = model.train()
        trained = [parameter for parameter in form.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
    else:
        form.eval()
        if options.fuse:
            form = fuse(form)
            form_multiply_adds = count_multiply_adds(form, size)
        form = form.to(options.dtype)
    return BenchModel(
        name=source,
        input_size=size,
        parameters=parameters,
        multiply_adds=multiply_adds,
        form_multiply_adds=form_multiply_adds,
        saved_bytes_per_image=saved,
        acc1=acc1,
        # Not dynamic: a second batch size would otherwise give every size slower, general code.
        form=torch.compile(form, dynamic=False) if options.compile else form,
        options=options,
        optimizer=optimizer,
    )


def label(source: str) -> str:
    """How a source is called where there is little room: a file by its name."""
    return Path(source).name if names_file(source) else source


def saved_bytes(model: nn.Module, images_BCHW: Tensor) -> int:
    """Bytes that one forward with autograd keeps for its backward pass: distinct storages, each whole.

    Parameters and buffers are left out, which are there anyway; the images are counted where a layer keeps them.
    Seen through `torch.autograd.graph.saved_tensors_hooks`.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that its address is not given to another meanwhile
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images_BCHW)
    return sum(storage.nbytes() for storage in kept.values())


def _saved_bytes_per_image(model: nn.Module, input_size: tuple[int, int, int], options: BenchOptions) -> int:
    """The growth from one batch to a larger one: autocast's copies of weights and statistics of channels cancel."""
    model.train()
    few, many = _SAVED_AT
    counted = {}
    for batch_size in _SAVED_AT:
        images_BCHW = torch.randn(batch_size, *input_size, device=options.device)
        with options.autocast():
            counted[batch_size] = saved_bytes(model, images_BCHW.to(memory_format=options.memory_format))
    return (counted[many] - counted[few]) // (many - few)
