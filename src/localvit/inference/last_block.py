"""The last block of a model whose head reads the prefix tokens only (class, distillation): no work for the patches.

In such a block nothing depends on the queries, output projections and feed-forward of the patches: these run for the
prefix tokens only. Locality, which does not act on prefix tokens, does not run. Keys and values are computed for every
token.

This holds while every module from the block to the pooling computes exactly what its class defines. Models are changed
after `fuse` too, so each call of the model looks at all of them.

Shapes: B batch, N tokens, P prefix tokens, C channels, M attention heads, D channels of a head.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from timm.layers import Attention, DropPath
from timm.models import pvt_v2, tnt
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import LayerScale, VisionTransformer
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.module_tracker import ModuleTracker

from localvit.inference.override import override_forward
from localvit.inference.prefix_tokens import BLOCKS, prefix_tokens
from localvit.inference.token_wise import is_token_wise, is_token_wise_class
from localvit.models.pvt import LocalPVT
from localvit.models.pvt_stage import Stage
from localvit.models.tnt import LocalTNT
from localvit.ops import FusedConvolutions
from localvit.ops.stages import has_global_hooks, has_hooks, is_untouched
from localvit.surgery.projection import LocalizedProjection, localized_projections
from localvit.tokens.mlp import FusedMlp
from localvit.tokens.per_call import PerCall
from localvit.tokens.sources import is_grid_hook


def shorten_last_block(model: nn.Module) -> None:
    """Let a model's last block, in place, compute only the prefix tokens in calls of the model, if its head allows it.

    The block's modules stay as they are, and other calls still compute every token.
    """
    if (blocks := _blocks(model)) is None or not len(blocks) or "forward" in vars(model):
        return
    block, calls = blocks[-1], PerCall()
    if not _shortens(model, block):
        return
    override_forward(block, _forward_of_last_block, calls)
    for projection in localized_projections(block).values():
        override_forward(projection, _forward_of_projection, calls)
    override_forward(model, _forward_for_logits, calls)


def last_block(model: nn.Module) -> nn.Module | None:
    """The last block of a model whose head reads the prefix tokens only; None for any other model."""
    blocks = _blocks(model)
    return blocks[-1] if blocks is not None and len(blocks) else None


# torch.export matches inputs by this signature, so the images are an argument of their own.
def _forward_for_logits(model: Any, calls: PerCall, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    masked = any(value is not None and value is not False for value in (*args, *kwargs.values()))
    calls.begin(model.num_prefix_tokens if not masked and _is_shortened(model, calls) else None)
    try:
        return type(model).forward(model, x, *args, **kwargs)
    finally:
        calls.end()


def _forward_of_last_block(block: Any, calls: PerCall, *args: Any, **kwargs: Any) -> Any:
    if not calls.value:
        return type(block).forward(block, *args, **kwargs)
    if isinstance(block, tnt.Block):
        pixels, x_BNC = tnt.Block.forward(_InnerPart(block), *args)  # type: ignore[arg-type]
        return pixels, prefix_tokens(block, x_BNC, calls.value)
    return prefix_tokens(block, args[0], calls.value)


def _forward_of_projection(projection: Any, calls: PerCall, hidden: Tensor) -> Tensor:
    cls = projection.projection_class if calls.value else LocalizedProjection
    return cls.forward(projection, hidden)


class _InnerPart:
    """TNT's block without its outer attention and feed-forward. It runs for all patches: keys and values depend on it.

    `tnt.Block.forward` reads it in place of the block.
    """

    def __init__(self, block: tnt.Block) -> None:
        self.block = block
        self.norm_out = self.norm_mlp = _unchanged
        self.attn_out = self.mlp = _zero

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _zero(x: Tensor) -> Tensor:
    return x.new_zeros(())


METHODS = ("forward", "forward_features", "forward_head", "pool", "_outer_tokens", "_run_stages")
"""The methods that a model calls from its images to its logits."""
PREFIX_READERS: dict[type[nn.Module], list[Any]] = {
    cls: [getattr(cls, name, None) for name in METHODS]
    for cls in (VisionTransformer, VisionTransformerDistilled, tnt.TNT, LocalTNT, LocalPVT)
}
"""Models whose head, with `global_pool="token"`, reads only the prefix tokens of the last block, and their `METHODS`.

Subclasses are included as long as they override none of these."""
_OTHERS: tuple[type[nn.Module], ...] = (
    Attention,
    pvt_v2.Attention,
    Stage,
    FusedMlp,
    FusedConvolutions,
    LocalizedProjection,
)
_FORWARDS: dict[type[nn.Module], Any] = {cls: cls.forward for cls in (*BLOCKS, *_OTHERS)}
"""The forwards of the other classes on the way, as the code above knows them."""


def _blocks(model: Any) -> Any:
    """The model's list of blocks; None for a model that is not exactly known from there to its pooling."""
    methods = [getattr(type(model), name, None) for name in METHODS]
    known = any(isinstance(model, cls) and own == methods for cls, own in PREFIX_READERS.items())
    if not known or any(name in vars(model) for name in METHODS[1:]):
        return None
    if model.global_pool != "token" or "attn_pool" in model._modules or not is_token_wise(_child(model, "norm")):
        return None
    owner = model
    if isinstance(model, LocalPVT):
        owner = list(_child(model, "stages").children())[-1] if len(model.stages) else None
        if type(owner) is not Stage or not _stage_runs_as_written(owner):
            return None
    # Checkpointing runs blocks again outside of the model's call.
    blocks = _child(owner, "blocks")
    if model.training or owner.grad_checkpointing or type(blocks) not in (nn.Sequential, nn.ModuleList):
        return None
    observed = has_global_hooks() and _global_hooks_read_tensors()
    return blocks if is_untouched(blocks) and not observed else None


def _child(module: nn.Module, name: str) -> Any:
    """A submodule itself. While torch.export traces, an attribute is a proxy for it, of another class."""
    return module._modules[name]


def _global_hooks_read_tensors() -> bool:
    """Whether hooks on all modules may read their tensors, unlike those of torch's FLOP counter, which needs names."""
    hooks = (
        *torch_module._global_forward_hooks.values(),
        *torch_module._global_forward_pre_hooks.values(),
        *torch_module._global_backward_hooks.values(),
        *torch_module._global_backward_pre_hooks.values(),
    )
    return not all(isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)


def _is_shortened(model: Any, calls: PerCall) -> bool:
    """Whether the last block, and no other one, is that of `shorten_last_block`, and the shortcut still holds."""
    blocks = _blocks(model)
    if blocks is None:
        return False
    own = [block for block in blocks if _bound_calls(block, _forward_of_last_block) is calls]
    return len(own) == 1 and own[0] is blocks[-1] and _shortens(model, own[0], calls)


def _shortens(model: Any, block: Any, calls: PerCall | None = None) -> bool:
    """Whether the parts of a block, run for the prefix tokens, compute what the block computes for them.

    `calls` are those that `shorten_last_block` bound to the forwards of the block and its projections, if it did.
    """
    if (parts := BLOCKS.get(type(block))) is None or not _runs_as_written(block, _forward_of_last_block, calls):
        return False
    attn, norm1, norm2, mlp = (_child(block, name) for name in (parts.attn, parts.norm1, parts.norm2, "mlp"))
    after_attn, after_mlp = ([_child(block, name) for name in names] for names in (parts.after_attn, parts.after_mlp))
    if not all(map(is_token_wise, (norm1, norm2, *after_attn, *after_mlp))):
        return False
    if isinstance(mlp, FusedMlp) and not all(type(module) in _ZERO_STAYS_ZERO for module in after_mlp):
        return False
    return (
        type(attn) is parts.attention
        and _is_plain_attention(attn)
        and _is_known_feed_forward(mlp, model.num_prefix_tokens, calls)
    )


_ZERO_STAYS_ZERO = (nn.Identity, nn.Dropout, DropPath, LayerScale)


def _is_plain_attention(attn: Any) -> bool:
    """Whether an attention of a known class is unchanged, reads every token itself, and has weights to slice."""
    if not _runs_as_written(attn) or not all(map(is_token_wise, attn.children())):
        return False
    if "sr" in attn._modules or "pool" in attn._modules:
        return False
    if type(_child(attn, "attn_drop")) not in (nn.Dropout, nn.Identity) or attn.scale != attn.head_dim**-0.5:
        return False
    if not isinstance(attn, Attention):
        return True
    return not is_traceable_wrapper_subclass(attn.qkv.weight)


def _is_known_feed_forward(mlp: nn.Module, num_prefix_tokens: int, calls: PerCall | None) -> bool:
    if isinstance(mlp, FusedMlp):
        inner = _child(mlp, "conv")
        known = type(mlp) is FusedMlp and type(inner) is FusedConvolutions
        known = known and all(map(_runs_as_written, (mlp, inner))) and all(map(is_untouched, inner.modules()))
        return known and mlp.layout.num_prefix_tokens == num_prefix_tokens
    local = list(localized_projections(mlp).values())
    inside = {part for projection in local for part in projection.modules()}
    return all(
        is_token_wise_class(part) and is_untouched(part) for part in mlp.modules() if part not in inside
    ) and all(_is_known_projection(projection, num_prefix_tokens, calls) for projection in local)


def _is_known_projection(projection: Any, num_prefix_tokens: int, calls: PerCall | None) -> bool:
    """Whether a localized projection, without its locality, multiplies prefix tokens by its weight."""
    return (
        projection.projection_class is nn.Linear
        and _runs_as_written(projection, _forward_of_projection, calls)
        and all(map(is_untouched, projection.locality.modules()))
        and projection.layout.num_prefix_tokens == num_prefix_tokens
    )


def _runs_as_written(module: nn.Module, ours: Callable[..., Any] | None = None, calls: PerCall | None = None) -> bool:
    """Whether a call of a module runs its class's forward, or with `calls` ours, in evaluation mode without hooks."""
    cls = type(module)
    own = "forward" not in vars(module) if calls is None else _bound_calls(module, ours) is calls
    return own and cls.forward is _FORWARDS[cls] and not module.training and not has_hooks(module)


def _stage_runs_as_written(stage: nn.Module) -> bool:
    """As `_runs_as_written`, for a stage of PVT, which has hooks that record its grid."""
    hooks = (*stage._forward_pre_hooks.values(), *stage._forward_hooks.values())
    backward = stage._backward_hooks or stage._backward_pre_hooks
    own = "forward" not in vars(stage) and type(stage).forward is _FORWARDS[Stage]
    return own and not backward and all(map(is_grid_hook, hooks))


def _bound_calls(module: nn.Module, ours: Callable[..., Any] | None) -> Any:
    """The calls that `shorten_last_block` bound to a module's forward."""
    forward = vars(module).get("forward")
    return forward.args[1] if isinstance(forward, partial) and forward.func is ours else None
