"""What a model costs, counted: parameters, multiply-adds, and its blocks with the grids that they work on."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from localvit.tokens import LocalityMlp


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
    """Multiply-adds of one picture of `input_size` (channels, height, width): what most papers print as FLOPs.

    Counted by torch's FlopCounterMode, which sees matrix products and convolutions (two FLOPs a multiply-add) and no
    norms, activations or sums. `model` is left as it is, on whatever device. Raises what the model raises for pictures
    of that size.
    """
    shapes_only = _without_numbers(model)
    with FlopCounterMode(display=False) as counter:
        _run(shapes_only, input_size)
    return counter.get_total_flops() // 2


def summarize_blocks(model: nn.Module, input_size: tuple[int, ...]) -> list[BlockSummary]:
    """The blocks of a model, in order: its modules that hold a feed-forward called `mlp`, as timm's transformers do.

    Grids are those of a picture of `input_size` (channels, height, width). Raises what the model raises for pictures
    of that size.
    """
    shapes_only = _without_numbers(model)
    grids = {}

    def note(mlp: LocalityMlp, args: tuple, output: torch.Tensor) -> None:
        grids[mlp] = mlp.grid.size  # now: blocks that share a `Grid` may find it at different sizes

    for module in shapes_only.modules():
        if isinstance(module, LocalityMlp):
            module.register_forward_hook(note)
    _run(shapes_only, input_size)
    return [
        BlockSummary(
            name=name,
            kind=type(module).__name__,
            parameters=count_parameters(module),
            local=isinstance(module.mlp, LocalityMlp),
            grid_size=grids.get(module.mlp),
        )
        for name, module in shapes_only.named_modules()
        if isinstance(getattr(module, "mlp", None), nn.Module)
    ]


def _without_numbers(model: nn.Module) -> nn.Module:
    """A copy on the meta device, where tensors have shapes and no numbers, and running costs nothing."""
    # FlopCounterMode hooks gradients wherever a tensor wants one, and fails where none is recorded.
    return copy.deepcopy(model).to("meta").eval().requires_grad_(False)


def _run(shapes_only: nn.Module, input_size: tuple[int, ...]) -> None:
    # In plain products: FlopCounterMode does not count the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        shapes_only(torch.empty(1, *input_size, device="meta"))
