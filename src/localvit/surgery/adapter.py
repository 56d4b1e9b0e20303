"""The adapter: locality for a trained feed-forward, without a change of its output at the start.

The hidden channels of the image tokens, which the feed-forward's last projection reads, pass through a depth-wise
convolution whose weights start at zero, and its output is added to them. The adapter is a child of that projection,
named `locality`, and runs before it. The paper's channel gates (arXiv 2104.05707, section 3.3) start neutral too.

Shapes: B batch, E hidden channels, H and W the patch grid.
"""

from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from localvit.locality import EfficientChannelAttention, SqueezeExcite
from localvit.surgery.override import override_forward, restore_forward
from localvit.tokens.layouts import Layout, refuse_empty_positions

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


@register_notrace_module
class LocalityAdapter(nn.Module):
    """Adds a depth-wise convolution of the hidden tokens to them; at the start, it adds zero.

    Computes h + conv(norm(h)) for the image tokens h, and with a gate h * g + conv(norm(h)), where g is twice the
    gate's sigmoid, which is 1 as long as the gate's last weights are zero. Since the gate multiplies and the
    convolution adds, the gradient reaches both in the first step; it reaches the first layer of a
    squeeze-and-excitation gate in the second. Other tokens pass unchanged.

    Args:
        hidden_dim: number of hidden channels E.
        layout: how the tokens lie on the patch grid, such as `TokenSequence`.
        config: kernel, gate and norm.

    Raises:
        ValueError: for a reduction larger than E. There and in forward, for a gate or batch norm on maps with empty
            positions (`localvit.tokens.ragged`).
    """

    def __init__(
        self,
        hidden_dim: int,
        layout: Layout,
        config: Adapter = Adapter(),
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.layout = layout
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
        self._check_empty_positions()

    def make_neutral(self) -> None:
        """Set the last weights of convolution and gate to zero, so that hidden tokens pass unchanged."""
        for weight in self._last_weights():
            nn.init.zeros_(weight)

    @property
    def is_neutral(self) -> bool:
        """Whether any hidden tokens pass unchanged. Weights on the meta device count as untrained."""
        return not any(bool(weight.any()) for weight in self._last_weights() if not weight.is_meta)

    def _last_weights(self) -> list[Tensor]:
        weights = [self.conv.weight]
        if isinstance(self.gate, SqueezeExcite):
            weights += list(self.gate.fc[2].parameters())
        elif self.gate is not None:
            weights += list(self.gate.parameters())
        return weights

    def _check_empty_positions(self) -> None:
        if self.gate is not None:
            refuse_empty_positions(self.layout, f"the gate ({type(self.gate).__name__})")
        if isinstance(self.norm, nn.BatchNorm2d):
            refuse_empty_positions(self.layout, "norm='batchnorm'")

    def forward(self, hidden: Tensor) -> Tensor:
        self._check_empty_positions()
        map_BEHW = self.layout.to_map(hidden)
        added = self.conv(map_BEHW if self.norm is None else self.norm(map_BEHW))
        if self.gate is not None:
            added = added + (2 * self.gate(map_BEHW) - map_BEHW)
        return hidden + self.layout.to_tokens(added)


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


CHILD = "locality"
"""Name of the adapter in its projection."""


def check_attachable(projection: nn.Module, name: str) -> None:
    """Raise ValueError where another library has replaced the projection's forward, which an adapter would undo."""
    if "forward" in vars(projection):
        raise ValueError(
            f"another library has wrapped the forward of {name} ({type(projection).__name__}): localize the model "
            "before it does"
        )


def attach(projection: nn.Module, adapter: LocalityAdapter) -> None:
    """Make an adapter a child of a projection, which from now on reads the adapter's output.

    It overrides the forward of the instance instead of using a hook: torch.compile checks the forward when it looks
    for code compiled before, but not hooks (`skip_nnmodule_hook_guards`), and would run the code of the model without
    adapters. The hook that does nothing stops torch's own encoder layers from using their fused kernel in evaluation,
    which calls no submodule.
    """
    projection.add_module(CHILD, adapter)
    override_forward(projection, _forward_through_adapter)
    projection.register_forward_pre_hook(_prevent_fused_kernel)


def detach(projection: nn.Module) -> None:
    """Remove the adapter from a projection."""
    delattr(projection, CHILD)
    restore_forward(projection)
    for key, hook in list(projection._forward_pre_hooks.items()):
        if hook is _prevent_fused_kernel:
            del projection._forward_pre_hooks[key]


def has_adapter(module: nn.Module) -> bool:
    """Whether an adapter is attached to this very module."""
    return isinstance(getattr(module, CHILD, None), LocalityAdapter)


def _prevent_fused_kernel(projection: nn.Module, args: tuple) -> None:
    pass


def _forward_through_adapter(projection: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    return type(projection).forward(projection, projection.get_submodule(CHILD)(hidden), *args, **kwargs)


def accept_state_dicts_without_adapters(model: nn.Module) -> None:
    """Let a state dict without any adapter, that of the model before `localize`, load strictly into `model`.

    The adapters then keep their weights. A state dict with some of the adapters only is still refused.
    """
    model.register_load_state_dict_pre_hook(_keep_adapters)


def refuse_state_dicts_without_adapters(model: nn.Module) -> None:
    """Undo `accept_state_dicts_without_adapters`."""
    for key, hook in list(model._load_state_dict_pre_hooks.items()):
        if getattr(hook, "hook", None) is _keep_adapters:
            del model._load_state_dict_pre_hooks[key]


def _keep_adapters(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    own = {prefix + key: value for key, value in model.state_dict().items() if f".{CHILD}." in key}
    if not any(key in state_dict for key in own):
        state_dict.update(own)
