"""What an explanation has to know of a model: its attentions and blocks, and where their tokens lie on the image.

A rule for a class of models yields it (`localvit.explanations.hosts`). Grids follow from the size of the image, never
from a number of tokens.

Shapes: B images, N tokens, P prefix tokens (class, distillation, register), C channels, H and W a grid of tokens, W
windows in an index (1 where every query sees every key), Q queries and K keys of one window.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from localvit.inference.exported import ExportedModel
from localvit.tokens.layouts import tokens_to_map
from localvit.utils.wrappers import unwrap

Size = tuple[int, int]
"""Height and width."""


@dataclass(frozen=True, kw_only=True)
class TokenGrid:
    """A sequence of tokens: prefix tokens, then a grid row by row."""

    size: Size
    num_prefix_tokens: int = 0

    def __len__(self) -> int:
        return self.num_prefix_tokens + self.size[0] * self.size[1]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the queries and keys of an attention lie."""

    query: TokenGrid
    """All queries of an image."""
    key: TokenGrid
    """All keys of an image. Its grid is smaller than that of the queries where they are spatially reduced."""
    query_index_WQ: Tensor
    """The query's position in the sequence of `query`, for each window; -1 for padding."""
    key_index_WK: Tensor
    """Likewise for keys, in the sequence of `key`."""

    @classmethod
    def full(cls, query: TokenGrid, key: TokenGrid | None = None) -> "Placement":
        """Every query sees every key."""
        key = key or query
        return cls(
            query=query,
            key=key,
            query_index_WQ=torch.arange(len(query))[None],
            key_index_WK=torch.arange(len(key))[None],
        )

    @classmethod
    def windows(cls, grid: TokenGrid, index_WQ: Tensor) -> "Placement":
        """Queries see the keys of their own window."""
        return cls(query=grid, key=grid, query_index_WQ=index_WQ, key_index_WK=index_WQ)


@dataclass(frozen=True, kw_only=True)
class AttentionLayer:
    """One attention of a model."""

    name: str
    module: nn.Module
    placement: Callable[[Size], Placement]
    """Given height and width of the images, in pixels."""
    is_inner: bool = False
    """Whether it works on the pixels inside each patch, as TNT's inner transformer."""


@dataclass(frozen=True, kw_only=True)
class TokenLayer:
    """A module that returns the tokens of a grid, such as a block."""

    name: str
    module: nn.Module
    grid: Callable[[Size], TokenGrid]
    """Given height and width of the images, in pixels."""
    item: int | None = None
    """Which of several results the tokens are."""

    def to_map(self, output: Any, image_size: Size) -> Tensor:
        """The patches of what the module returned, as a map (B, C, H, W).

        Raises ValueError when tokens (B, N, C) do not fill the grid.
        """
        tokens = output[self.item] if self.item is not None and not isinstance(output, Tensor) else output
        grid = self.grid(image_size)
        if tokens.ndim == 4:
            return tokens.permute(0, 3, 1, 2)
        return tokens_to_map(tokens, grid.size, grid.num_prefix_tokens)


@dataclass(frozen=True, kw_only=True)
class ModelLayers:
    """The parts of a model that explanations read, in the order of its forward pass."""

    attentions: tuple[AttentionLayer, ...]
    blocks: tuple[TokenLayer, ...]
    last_norm: TokenLayer
    """The norm after the last block."""
    reads_class_token: bool
    """Whether the head reads prefix tokens only, so that the last block's patch tokens have no effect on the logits."""
    num_class_tokens: int = 1
    """Number of first tokens that the head reads, if it reads prefix tokens."""

    @property
    def num_tokens_read(self) -> int:
        """Number of first tokens that the head reads; 0 if it reads the mean of the patches."""
        return self.num_class_tokens if self.reads_class_token else 0

    @property
    def outer_attentions(self) -> tuple[AttentionLayer, ...]:
        """The attentions between patches."""
        return tuple(layer for layer in self.attentions if not layer.is_inner)


Rule = Callable[[Any], ModelLayers]
_RULES: dict[str, Rule] = {}


def layers_of_class(*class_names: str) -> Callable[[Rule], Rule]:
    """Register a rule for classes, given as "module.Class", and their subclasses. It must not change the model."""

    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(class_names, rule))
        return rule

    return register


def layers_of(model: nn.Module) -> ModelLayers:
    """The layers of a model, or of the only model inside it that has a rule. Names are those in `model`.

    Raises:
        ValueError: for a class without a rule, a model in training mode, and a file of another runtime.
    """
    model = unwrap(model)
    if isinstance(model, ExportedModel):
        raise ValueError(
            f"{model.path} is an exported file, whose layers cannot be read: give the checkpoint it was made from"
        )
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode; call model.eval() first")
    found = _find(model)
    if len(found) != 1:
        count = f"{len(found)} parts" if found else "no part"
        raise ValueError(
            f"{type(model).__name__} has {count} that can be explained; supported are this package's models, timm's "
            "ViT, DeiT, BEiT, EVA, DINOv3 and Swin (v1 and v2), and Hugging Face transformers' ViT, DeiT, DINOv2 and "
            "CLIP"
        )
    return found[0]


def _find(module: nn.Module) -> list[ModelLayers]:
    for cls in type(module).__mro__:
        if rule := _RULES.get(f"{cls.__module__}.{cls.__qualname__}"):
            return [rule(module)]
    return [found for child in module.children() for found in _find(child)]
