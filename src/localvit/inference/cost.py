"""The cost of a model: parameters, multiply-adds, a summary of its blocks, and what locality adds."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from localvit.locality import EfficientChannelAttention, SqueezeExcite
from localvit.surgery.adapter import LocalityAdapter
from localvit.surgery.projection import CHILD
from localvit.tokens.mlp import LocalityMlp
from localvit.utils.tables import format_table


@dataclass(frozen=True, kw_only=True)
class BlockSummary:
    """Facts on one transformer block."""

    name: str
    """Its name in the model, such as "blocks.0"."""
    kind: str
    """The name of its class."""
    parameters: int
    """Number of parameters."""
    local: bool
    """Whether its feed-forward is the locality module."""
    grid_size: tuple[int, int] | None
    """Height and width, in patches, of the input of its locality module; None without one."""


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, including frozen ones, as in the paper's tables. Shared parameters count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_multiply_adds(model: nn.Module, input_size: tuple[int, ...]) -> int:
    """Number of multiply-adds for one image, which most papers call FLOPs.

    torch's FlopCounterMode counts matrix products and convolutions (two FLOPs per multiply-add), but not norms,
    activations or sums. Nothing is computed, so the model may be on the meta device, and it is not changed.

    Args:
        model: Any model of images.
        input_size: Channels, height and width of the image.

    Raises:
        The errors of the model's forward for images of that size.
    """
    copied = _copy(model)
    with FlopCounterMode(display=False) as counter:
        _run(copied, input_size)
    return counter.get_total_flops() // 2


def summarize_blocks(model: nn.Module, input_size: tuple[int, ...]) -> list[BlockSummary]:
    """Summarize the blocks of a model, in order: the modules with a feed-forward called `mlp`, as in timm.

    Args:
        model: Any model of images; it is not changed.
        input_size: Channels, height and width of the image that the grids belong to.

    Raises:
        The errors of the model's forward for images of that size.
    """
    shapes = _map_shapes(model, input_size)
    grid_of = {name.removesuffix(f".{CHILD}"): shape[1:] for name, shape in shapes.items()}

    def grid_in(name: str) -> tuple[int, int] | None:
        return next((grid for local, grid in grid_of.items() if local == name or local.startswith(f"{name}.")), None)

    return [
        BlockSummary(
            name=name,
            kind=type(module).__name__,
            parameters=count_parameters(module),
            local=grid_in(f"{name}.mlp") is not None,
            grid_size=grid_in(f"{name}.mlp"),
        )
        for name, module in model.named_modules()
        if isinstance(getattr(module, "mlp", None), nn.Module)
    ]


@dataclass(frozen=True, kw_only=True)
class LocalFeedForward:
    """The cost of locality in one feed-forward: of the depth-wise convolution, its norm, and the gate."""

    name: str
    """Name of the module with the convolution, in the model."""
    channels: int
    """Channels of the convolution."""
    grid_size: tuple[int, int]
    """Height and width of its input, in patches."""
    parameters: int
    """Number of parameters."""
    multiply_adds: int
    """Multiply-adds per image."""


class LocalityReport(tuple[LocalFeedForward, ...]):
    """The result of `locality_report`; prints as a table."""

    def __str__(self) -> str:
        rows = [
            (part.name, str(part.channels), " x ".join(map(str, part.grid_size)), part.parameters, part.multiply_adds)
            for part in self
        ]
        rows.append(("total", "", "", sum(part.parameters for part in self), sum(part.multiply_adds for part in self)))
        headings = ("locality", "channels", "grid", "parameters", "multiply-adds")
        cells = [(*row[:3], f"{row[3]:,}", f"{row[4]:,}") for row in rows]
        return format_table(cells, headings=headings, right=(1, 3, 4))


def locality_report(model: nn.Module, input_size: tuple[int, ...] | None = None) -> LocalityReport:
    """Report what locality adds to each feed-forward of a localized or LocalViT model.

    Args:
        model: The model; nothing is computed, and it is not changed.
        input_size: Channels, height and width of an image; by default those of the model's configuration.

    Returns:
        One entry per feed-forward with locality, in the order of the model; `print` shows them as a table.

    Raises:
        ValueError: If no size is given and the model has no configuration with one. The errors of the model's forward
            for images of that size pass through.
    """
    parts = []
    for name, (channels, height, width) in _map_shapes(model, input_size or _default_input_size(model)).items():
        module: Any = model.get_submodule(name)
        convolutions, norms, gates = _locality_parts(module)
        is_feed_forward = isinstance(module, LocalityMlp)
        hidden = module.conv[-2].in_channels if is_feed_forward else channels
        weights = [convolution.weight.numel() * height * width for convolution in convolutions]
        for gate in gates:
            if isinstance(gate, SqueezeExcite):
                weights += [layer.weight.numel() for layer in gate.fc if isinstance(layer, nn.Linear)]
            else:
                weights.append(gate.conv.weight.numel() * hidden)
        parts.append(
            LocalFeedForward(
                name=name,
                channels=convolutions[0].in_channels if convolutions else hidden,
                grid_size=(height, width),
                parameters=sum(map(count_parameters, (*convolutions, *norms, *gates))),
                multiply_adds=sum(weights),
            )
        )
    return LocalityReport(parts)


def _locality_parts(module: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """The depth-wise convolutions, their norms, and the gates of a branch or of the paper's module."""
    layers = list(module.conv) if isinstance(module, LocalityMlp) else [module.conv, module.gate]
    gates = [layer for layer in layers if isinstance(layer, SqueezeExcite | EfficientChannelAttention)]
    depthwise = [layer for layer in layers if isinstance(layer, nn.Conv2d) and layer.groups > 1]
    norms = [norm for layer, norm in pairwise(layers) if layer in depthwise and isinstance(norm, nn.BatchNorm2d)]
    return depthwise, norms, gates


def _default_input_size(model: Any) -> tuple[int, ...]:
    if cfg := getattr(model, "pretrained_cfg", None):
        return tuple(cfg["input_size"])
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    if size := getattr(config, "image_size", None):
        height, width = size if isinstance(size, Sequence) else (size, size)
        return (getattr(config, "num_channels", 3), height, width)
    raise ValueError(
        f"{type(model).__name__} has no configuration with an image size: pass input_size=(channels, height, width)"
    )


def _map_shapes(model: nn.Module, input_size: tuple[int, ...]) -> dict[str, tuple[int, int, int]]:
    """Channels, height and width of the input map of each module with locality, by the name of the module."""
    copied = _copy(model)
    shapes = {}

    def record(name: str, module: Any, args: tuple) -> None:
        map_BCHW = module.layout.to_map(args[0]) if isinstance(module, LocalityMlp) else args[0]
        shapes[name] = tuple(map_BCHW.shape[1:])

    for name, module in copied.named_modules():
        if isinstance(module, LocalityAdapter | LocalityMlp):
            module.register_forward_pre_hook(partial(record, name))
    if any(isinstance(module, LocalityAdapter | LocalityMlp) for module in copied.modules()):
        _run(copied, input_size)
    return shapes


def _copy(model: nn.Module) -> nn.Module:
    # FlopCounterMode hooks the gradient of each tensor that requires one, and fails if none is recorded.
    return copy.deepcopy(model).eval().requires_grad_(False)


def _run(model: nn.Module, input_size: tuple[int, ...]) -> None:
    """Run the model on fake tensors, which have devices, dtypes and shapes but no values, so nothing is computed."""
    # The MATH backend, because FlopCounterMode does not count the CPU's fused attention. Not the meta device, which
    # computes nothing either, because torch.autocast refuses it. With gradients enabled, a fused model runs torch's own
    # convolutions, which the counter knows, instead of those of oneDNN.
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        entries = chain(model.named_parameters(), model.named_buffers())
        fakes = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in entries}
        dtype = next((fake.dtype for fake in fakes.values() if fake.is_floating_point()), None)
        functional_call(model, fakes, (torch.empty(1, *input_size, dtype=dtype),))
