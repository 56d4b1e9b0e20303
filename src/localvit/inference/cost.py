"""What a model costs, counted: parameters, multiply-adds, blocks with their grids, and what locality adds."""

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
from localvit.surgery.branch import CHILD, LocalityBranch
from localvit.tokens.mlp import LocalityMlp
from localvit.utils.tables import format_table


@dataclass(frozen=True, kw_only=True)
class BlockSummary:
    """One transformer block."""

    name: str
    """Where it is in the model."""
    kind: str
    """Its class."""
    parameters: int
    """Number of parameters."""
    local: bool
    """Whether its feed-forward is the locality module."""
    grid_size: tuple[int, int] | None
    """Height and width, in patches, of the map that its locality module sees; None without one."""


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, frozen ones included, as the paper's tables count them; shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_multiply_adds(model: nn.Module, input_size: tuple[int, ...]) -> int:
    """Multiply-adds of one image of `input_size` (channels, height, width): what most papers print as FLOPs.

    Counted by torch's FlopCounterMode, which sees matrix products and convolutions (two FLOPs a multiply-add) and no
    norms, activations or sums. `model` is left as it is, and nothing is computed: it may be on the meta device. Raises
    what the model raises for images of that size.
    """
    copied = _copy(model)
    with FlopCounterMode(display=False) as counter:
        _run(copied, input_size)
    return counter.get_total_flops() // 2


def summarize_blocks(model: nn.Module, input_size: tuple[int, ...]) -> list[BlockSummary]:
    """The blocks of a model, in order: its modules that hold a feed-forward called `mlp`, as timm's transformers do.

    Grids are those of an image of `input_size` (channels, height, width). Raises what the model raises for images
    of that size.
    """
    maps = _maps(model, input_size)
    grid_of = {name.removesuffix(f".{CHILD}"): size[1:] for name, size in maps.items()}

    def locality_in(name: str) -> tuple[int, int] | None:
        return next((grid for local, grid in grid_of.items() if local == name or local.startswith(f"{name}.")), None)

    return [
        BlockSummary(
            name=name,
            kind=type(module).__name__,
            parameters=count_parameters(module),
            local=locality_in(f"{name}.mlp") is not None,
            grid_size=locality_in(f"{name}.mlp"),
        )
        for name, module in model.named_modules()
        if isinstance(getattr(module, "mlp", None), nn.Module)
    ]


@dataclass(frozen=True, kw_only=True)
class LocalFeedForward:
    """What locality adds to one feed-forward: the depth-wise convolution, its norm, and the gate."""

    name: str
    """Of the module that brings it, in the model."""
    channels: int
    """Channels that the convolution runs over."""
    grid_size: tuple[int, int]
    """Height and width, in patches, of the map that it sees."""
    parameters: int
    """Number of parameters."""
    multiply_adds: int
    """Multiply-adds an image."""


class LocalityReport(tuple[LocalFeedForward, ...]):
    """What `locality_report` found; prints as a table."""

    def __str__(self) -> str:
        rows = [
            (part.name, str(part.channels), " x ".join(map(str, part.grid_size)), part.parameters, part.multiply_adds)
            for part in self
        ]
        rows.append(("in all", "", "", sum(part.parameters for part in self), sum(part.multiply_adds for part in self)))
        headings = ("locality", "channels", "grid", "parameters", "multiply-adds")
        cells = [(*row[:3], f"{row[3]:,}", f"{row[4]:,}") for row in rows]
        return format_table(cells, headings=headings, right=(1, 3, 4))


def locality_report(model: nn.Module, input_size: tuple[int, ...] | None = None) -> LocalityReport:
    """What locality adds to each feed-forward of a model that has it, from `localize` or by construction.

    Args:
        model: as it is; nothing is computed on it.
        input_size: (channels, height, width) of an image; by default what the model says that it takes.

    Raises ValueError when the model does not say, and what it raises for images of that size.
    """
    parts = []
    for name, (channels, height, width) in _maps(model, input_size or _own_input_size(model)).items():
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
    """Depth-wise convolutions, their norms, and gates, of a branch or of the paper's module."""
    layers = list(module.conv) if isinstance(module, LocalityMlp) else [module.conv, module.gate]
    gates = [layer for layer in layers if isinstance(layer, SqueezeExcite | EfficientChannelAttention)]
    depthwise = [layer for layer in layers if isinstance(layer, nn.Conv2d) and layer.groups > 1]
    behind = [norm for layer, norm in pairwise(layers) if layer in depthwise and isinstance(norm, nn.BatchNorm2d)]
    return depthwise, behind, gates


def _own_input_size(model: Any) -> tuple[int, ...]:
    if cfg := getattr(model, "pretrained_cfg", None):
        return tuple(cfg["input_size"])
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    if size := getattr(config, "image_size", None):
        height, width = size if isinstance(size, Sequence) else (size, size)
        return (getattr(config, "num_channels", 3), height, width)
    raise ValueError(f"{type(model).__name__} does not say what images it takes: give input_size")


def _maps(model: nn.Module, input_size: tuple[int, ...]) -> dict[str, tuple[int, int, int]]:
    """Channels, height and width of the map that each module that brings locality sees, by the module's name."""
    copied = _copy(model)
    maps = {}

    def note(name: str, module: Any, args: tuple) -> None:
        maps[name] = tuple(module.layout.to_map(args[0]).shape[1:])

    for name, module in copied.named_modules():
        if isinstance(module, LocalityBranch | LocalityMlp):
            module.register_forward_pre_hook(partial(note, name))
    if any(isinstance(module, LocalityBranch | LocalityMlp) for module in copied.modules()):
        _run(copied, input_size)
    return maps


def _copy(model: nn.Module) -> nn.Module:
    # FlopCounterMode hooks gradients wherever a tensor wants one, and fails where none is recorded.
    return copy.deepcopy(model).eval().requires_grad_(False)


def _run(model: nn.Module, input_size: tuple[int, ...]) -> None:
    """Run the model on fake tensors, which have a device and shapes but no numbers, so that nothing is computed."""
    # In plain products: FlopCounterMode does not count the CPU's fused attention. And not on the meta device, which
    # also computes nothing, but which torch.autocast refuses. With gradients enabled the fused form runs in torch's own
    # convolutions, which the counter knows, not in oneDNN's.
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        entries = chain(model.named_parameters(), model.named_buffers())
        fakes = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in entries}
        dtype = next((fake.dtype for fake in fakes.values() if fake.is_floating_point()), None)
        functional_call(model, fakes, (torch.empty(1, *input_size, dtype=dtype),))
