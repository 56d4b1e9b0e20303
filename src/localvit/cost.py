"""What a model costs, counted: parameters, multiply-adds, and its blocks with the grids that they work on."""

import copy
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
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
    norms, activations or sums. `model` is left as it is, and nothing is computed: it may be on the meta device. Raises
    what the model raises for pictures of that size.
    """
    copied = _copy(model)
    with FlopCounterMode(display=False) as counter:
        _run(copied, input_size)
    return counter.get_total_flops() // 2


def summarize_blocks(model: nn.Module, input_size: tuple[int, ...]) -> list[BlockSummary]:
    """The blocks of a model, in order: its modules that hold a feed-forward called `mlp`, as timm's transformers do.

    Grids are those of a picture of `input_size` (channels, height, width). Raises what the model raises for pictures
    of that size.
    """
    copied = _copy(model)
    grids = {}

    def note(mlp: LocalityMlp, args: tuple, output: torch.Tensor) -> None:
        grids[mlp] = mlp.layout.grid.size  # now: blocks that share a `Grid` may find it at different sizes

    for module in copied.modules():
        if isinstance(module, LocalityMlp):
            module.register_forward_hook(note)
    _run(copied, input_size)
    return [
        BlockSummary(
            name=name,
            kind=type(module).__name__,
            parameters=count_parameters(module),
            local=isinstance(module.mlp, LocalityMlp),
            grid_size=grids.get(module.mlp),
        )
        for name, module in copied.named_modules()
        if isinstance(getattr(module, "mlp", None), nn.Module)
    ]


def _copy(model: nn.Module) -> nn.Module:
    # FlopCounterMode hooks gradients wherever a tensor wants one, and fails where none is recorded.
    return copy.deepcopy(model).eval().requires_grad_(False)


def _run(model: nn.Module, input_size: tuple[int, ...]) -> None:
    """Run the model on fake tensors, which have a device and shapes but no numbers, so that nothing is computed."""
    # In plain products: FlopCounterMode does not count the CPU's fused attention. And not on the meta device, which
    # also computes nothing, but which torch.autocast refuses.
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        entries = chain(model.named_parameters(), model.named_buffers())
        fakes = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in entries}
        functional_call(model, fakes, (torch.empty(1, *input_size),))
