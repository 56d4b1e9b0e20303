"""The branch that brings locality to a trained feed-forward without changing what it computes.

The hidden channels of the image tokens, which the feed-forward's last projection reads, pass through a depth-wise
convolution whose weights start at zero, and its output is added to them: the branch hangs on that projection, as its
child `locality`, and acts before it. The paper's gates are neutral at the start too.

Shapes: B batch, E hidden channels, H and W the patch grid.
"""

from functools import partial
from typing import Any

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from localvit.locality import EfficientChannelAttention, SqueezeExcite
from localvit.tokens.layouts import refuse_empty_places

GATES = ("se", "eca", "ecah")
"""Channel gates of the branch: squeeze-and-excitation, ECA, ECA with a hard sigmoid."""

NORMS = ("batchnorm", "layernorm")
"""Norms of what the convolution reads."""


@register_notrace_module
class LocalityBranch(nn.Module):
    """Adds to hidden tokens what their neighbors say; at the start, nothing, and then whatever training finds.

    Computes h + conv(norm(h)) for the image tokens h, and with a gate h * g + conv(norm(h)), where g is twice the
    gate's sigmoid, 1 as long as its last weights are zero. The gate multiplies and the convolution adds, so the
    gradient reaches both from the first step; of a squeeze-and-excitation gate the first layer follows in the second.
    Other tokens pass untouched.

    Args:
        hidden_dim: channels E.
        layout: how the tokens lie on the patch grid, such as `localvit.tokens.TokenSequence`.
        kernel_size: of the convolution, odd; 1 mixes no neighbors, the control.
        dilation: of the convolution.
        gate: one of `GATES`, or None.
        reduction: divisor of E for the squeeze-and-excitation bottleneck.
        norm: one of `NORMS`, without weights of its own, before the convolution: behind it a norm would turn its zeros
            into noise. None, the default, leaves it out.

    Raises:
        ValueError: for an even kernel, a dilation below 1, an unknown gate or norm, or a reduction that leaves nothing;
            there and in forward, for a gate or batch norm on maps with empty places (`placed_tokens`).
    """

    def __init__(
        self,
        hidden_dim: int,
        layout: nn.Module,
        *,
        kernel_size: int = 3,
        dilation: int = 1,
        gate: str | None = None,
        reduction: int = 4,
        norm: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd, so that every patch is the center of its own")
        if dilation < 1:
            raise ValueError(f"dilation={dilation} must be at least 1")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.layout: Any = layout
        self.norm = _norm(norm, hidden_dim, factory)
        self.conv = nn.Conv2d(
            hidden_dim,
            hidden_dim,
            kernel_size,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
            groups=hidden_dim,
            bias=False,  # The projection behind has one.
            **factory,
        )
        self.gate = _gate(gate, hidden_dim, reduction, factory)
        self.make_neutral()
        self._check_empty_places()

    def make_neutral(self) -> None:
        """Set the weights that decide to zero, so that hidden tokens pass unchanged."""
        for weight in self._deciding():
            nn.init.zeros_(weight)

    @property
    def is_neutral(self) -> bool:
        """Whether hidden tokens pass unchanged, whatever they are. On the meta device weights hold nothing learned."""
        return not any(bool(weight.any()) for weight in self._deciding() if not weight.is_meta)

    def _deciding(self) -> list[Tensor]:
        weights = [self.conv.weight]
        if isinstance(self.gate, SqueezeExcite):
            weights += list(self.gate.fc[2].parameters())
        elif self.gate is not None:
            weights += list(self.gate.parameters())
        return weights

    def _check_empty_places(self) -> None:
        if self.gate is not None:
            refuse_empty_places(self.layout, f"the gate ({type(self.gate).__name__})")
        if isinstance(self.norm, nn.BatchNorm2d):
            refuse_empty_places(self.layout, "norm='batchnorm'")

    def forward(self, hidden: Tensor) -> Tensor:
        self._check_empty_places()
        map_BEHW = self.layout.to_map(hidden)
        added = self.conv(map_BEHW if self.norm is None else self.norm(map_BEHW))
        if self.gate is not None:
            added = added + (2 * self.gate(map_BEHW) - map_BEHW)
        return hidden + self.layout.to_tokens(added)


class _ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (B, E, H, W)."""

    def forward(self, map_BEHW: Tensor) -> Tensor:
        return super().forward(map_BEHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _norm(norm: str | None, hidden_dim: int, factory: dict[str, Any]) -> nn.Module | None:
    if norm is None:
        return None
    if norm == "batchnorm":
        return nn.BatchNorm2d(hidden_dim, affine=False, **factory)
    if norm == "layernorm":
        return _ChannelLayerNorm(hidden_dim, elementwise_affine=False, **factory)
    raise ValueError(f"norm={norm!r} is not known; choose one of {', '.join(NORMS)} or None")


def _gate(gate: str | None, hidden_dim: int, reduction: int, factory: dict[str, Any]) -> nn.Module | None:
    if gate is None:
        return None
    if gate == "se":
        return SqueezeExcite(hidden_dim, reduction, **factory)
    if gate in GATES:
        return EfficientChannelAttention(hidden_dim, hard=gate == "ecah", **factory)
    raise ValueError(f"gate={gate!r} is not known; choose one of {', '.join(GATES)} or None")


CHILD = "locality"
"""Name of the branch in the projection that it hangs on."""


def attach(projection: nn.Module, branch: LocalityBranch) -> None:
    """Hang a branch on a projection: from now on it reads what the branch returns.

    By a `forward` of the instance, and not by a hook: torch.compile checks the one when it looks for code that it has
    compiled before, and would run that of the model without branches for a hook (`skip_nnmodule_hook_guards`). A hook
    that does nothing keeps torch's own encoder layers from computing without their parts, as they do in evaluation.

    Raises ValueError where another library has put its own `forward` there.
    """
    if "forward" in vars(projection):
        raise ValueError(
            f"another library has wrapped the forward of {type(projection).__name__}: localize the model before it does"
        )
    projection.add_module(CHILD, branch)
    projection.forward = partial(_forward_through_branch, projection)
    projection.register_forward_pre_hook(_do_not_bypass)


def detach(projection: nn.Module) -> None:
    """Take the branch off a projection again."""
    delattr(projection, CHILD)
    del projection.forward
    for key, hook in list(projection._forward_pre_hooks.items()):
        if hook is _do_not_bypass:
            del projection._forward_pre_hooks[key]


def has_branch(module: nn.Module) -> bool:
    """Whether a branch hangs on this very module."""
    return isinstance(getattr(module, CHILD, None), LocalityBranch)


def _do_not_bypass(projection: nn.Module, args: tuple) -> None:
    """Be a hook."""


def _forward_through_branch(projection: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    return type(projection).forward(projection, projection.get_submodule(CHILD)(hidden), *args, **kwargs)


def load_without_branches(model: nn.Module) -> None:
    """Let a state dict without any branch, that of the model before surgery, load strictly into it.

    The branches keep their weights then. A state dict that has some branches and not others is still refused.
    """
    model.register_load_state_dict_pre_hook(_keep_branches)


def load_as_before(model: nn.Module) -> None:
    """Undo `load_without_branches`."""
    for key, hook in list(model._load_state_dict_pre_hooks.items()):
        if getattr(hook, "hook", None) is _keep_branches:
            del model._load_state_dict_pre_hooks[key]


def _keep_branches(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    own = {prefix + key: value for key, value in model.state_dict().items() if f".{CHILD}." in key}
    if not any(key in state_dict for key in own):
        state_dict.update(own)
