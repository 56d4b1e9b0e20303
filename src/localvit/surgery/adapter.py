"""The adapter: locality for a trained feed-forward, without a change of its output at the start.

The hidden channels of the image tokens, which the feed-forward's last projection reads, pass through a depth-wise
convolution whose weights start at zero, and its output is added to them (`localvit.surgery.projection`). The paper's
channel gates (arXiv 2104.05707, section 3.3) start neutral too.

Shapes: B batch, E hidden channels, H and W the patch grid.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from localvit.locality import EfficientChannelAttention, SqueezeExcite
from localvit.ops import run_layers

GATES = ("se", "eca", "ecah")
"""Channel gates of the adapter: squeeze-and-excitation, ECA, ECA with a hard sigmoid."""

NORMS = ("batchnorm", "layernorm")
"""Norms of the convolution's input."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A method for `localize`: keep the feed-forward, and add locality to its hidden channels (`LocalityAdapter`).

    Raises:
        ValueError: for an even kernel, a dilation or reduction below 1, or an unknown gate or norm.
    """

    kernel_size: int = 3
    """Kernel size of the depth-wise convolution, odd; 1 mixes no neighbors (the control)."""
    dilation: int = 1
    """Dilation of the convolution."""
    gate: str | None = None
    """Channel gate, one of `GATES`, or None."""
    reduction: int = 4
    """Divisor of the hidden width for the bottleneck of the squeeze-and-excitation gate."""
    norm: str | None = None
    """Norm before the convolution, one of `NORMS`, without weights of its own. There is none after it: it would scale
    the zeros of the start up to noise."""

    def __post_init__(self) -> None:
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} must be odd, so that each patch is in the center")
        for name in ("dilation", "reduction"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name, known in (("gate", GATES), ("norm", NORMS)):
            if (value := getattr(self, name)) is not None and value not in known:
                raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(known)} or None")


class LocalityAdapter(nn.Module):
    """What locality adds to the hidden map of a feed-forward: a depth-wise convolution; at the start, zero.

    Computes conv(norm(h)) of the map h (B, E, H, W), and with a gate h * (g - 1) + conv(norm(h)), where g is twice the
    gate's sigmoid, which is 1 as long as the gate's last weights are zero. Since the gate multiplies and the
    convolution adds, the gradient reaches both in the first step; it reaches the first layer of a
    squeeze-and-excitation gate in the second. Moved off the meta device by `to_empty`, it starts neutral again.

    Args:
        hidden_dim: number of hidden channels E.
        config: kernel, gate and norm.

    Raises:
        ValueError: for a reduction larger than E.
    """

    never_initialized = False
    """Whether it was made on the meta device, and nothing is known to have given it values since."""

    def __init__(
        self,
        hidden_dim: int,
        config: Adapter = Adapter(),
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = _norm(config, hidden_dim, factory)
        self.conv = nn.Conv2d(
            hidden_dim,
            hidden_dim,
            config.kernel_size,
            padding=config.dilation * (config.kernel_size // 2),
            dilation=config.dilation,
            groups=hidden_dim,
            bias=False,  # The projection that follows has one.
            **factory,
        )
        self.gate = _gate(config, hidden_dim, factory)
        self.make_neutral()
        self.never_initialized = self.conv.weight.is_meta

    def make_neutral(self) -> None:
        """Set the last weights of convolution and gate to zero, so that nothing is added."""
        for weight in self._last_weights():
            nn.init.zeros_(weight)

    def reset_parameters(self) -> None:
        """Initialize all weights and statistics as a new adapter has them."""
        for part in (self.norm, self.conv, self.gate):
            for module in part.modules() if part is not None else ():
                if callable(reset := getattr(module, "reset_parameters", None)):
                    reset()
        self.make_neutral()
        self.never_initialized = self.conv.weight.is_meta

    @property
    def is_neutral(self) -> bool:
        """Whether zero is added to any map. Weights on the meta device count as untrained."""
        return not any(bool(weight.any()) for weight in self._last_weights() if not weight.is_meta)

    @property
    def part_with_means(self) -> str | None:
        """Describes the part that takes means over whole maps, for error messages; None if there is none."""
        if self.gate is not None:
            return f"the gate ({type(self.gate).__name__})"
        return "norm='batchnorm'" if isinstance(self.norm, _BatchNorm) else None

    def _last_weights(self) -> list[Tensor]:
        weights = [self.conv.weight]
        if isinstance(self.gate, SqueezeExcite):
            weights += list(self.gate.fc[2].parameters())
        elif self.gate is not None:
            weights += list(self.gate.parameters())
        return weights

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LocalityAdapter":
        was_meta = self.conv.weight.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.conv.weight.is_meta:
            self.reset_parameters()  # The new memory is not initialized, and no file of the original has values for it.
        return self

    def forward(self, map_BEHW: Tensor) -> Tensor:
        added_BEHW = self.conv(map_BEHW if self.norm is None else run_layers(self.norm, map_BEHW))
        return added_BEHW if self.gate is None else added_BEHW + (2 * self.gate(map_BEHW) - map_BEHW)


class _ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (B, E, H, W)."""

    def forward(self, map_BEHW: Tensor) -> Tensor:
        return super().forward(map_BEHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _norm(config: Adapter, hidden_dim: int, factory: dict[str, Any]) -> nn.Module | None:
    if config.norm is None:
        return None
    if config.norm == "batchnorm":
        return nn.BatchNorm2d(hidden_dim, affine=False, **factory)
    return _ChannelLayerNorm(hidden_dim, elementwise_affine=False, **factory)


def _gate(config: Adapter, hidden_dim: int, factory: dict[str, Any]) -> nn.Module | None:
    if config.gate is None:
        return None
    if config.gate == "se":
        return SqueezeExcite(hidden_dim, config.reduction, **factory)
    return EfficientChannelAttention(hidden_dim, hard=config.gate == "ecah", **factory)
