"""Position embeddings on another grid than the one they were learned on. Both grids are always known, never guessed."""

from collections.abc import Mapping
from typing import Any

from timm.layers import register_notrace_function, resample_abs_pos_embed
from torch import Tensor, nn

PositionGrids = Mapping[str, tuple[tuple[int, int], int]]
"""For each position embedding (1, P + H * W, C) of a model, by name: its grid (H, W) and its prefix tokens P."""


@register_notrace_function  # It branches on shapes, which a graph tracer cannot follow.
def patch_grid(img_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """Grid (H, W) of the patches of a picture; both sizes are (height, width) in pixels.

    Raises ValueError, saying both numbers, when the patches do not divide the picture.
    """
    for side, pixels, patch in zip(("height", "width"), img_size, patch_size, strict=True):
        if pixels < patch or pixels % patch:
            raise ValueError(f"the picture's {side} of {pixels} pixels is no multiple of the patch's {patch}")
    return img_size[0] // patch_size[0], img_size[1] // patch_size[1]


def resample_positions(
    pos_1NC: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], num_prefix_tokens: int
) -> Tensor:
    """The embedding (1, P + H * W, C) brought from `old_grid` to `new_grid`, bicubic; the prefix tokens' stay.

    Raises ValueError, saying both numbers, when the embedding does not fill `old_grid`.
    """
    held = pos_1NC.shape[1] - num_prefix_tokens
    if held != old_grid[0] * old_grid[1]:
        raise ValueError(
            f"a position embedding for {held} patches ({num_prefix_tokens} prefix tokens left out) does not fill "
            f"the {old_grid[0]} x {old_grid[1]} grid of {old_grid[0] * old_grid[1]}"
        )
    return resample_abs_pos_embed(pos_1NC, new_grid, old_grid, num_prefix_tokens)


def resample_state(model: Any, state_dict: dict[str, Tensor], old_img_size: tuple[int, int]) -> dict[str, Tensor]:
    """`state_dict` with every position embedding that was learned on `old_img_size` brought to the model's own grid.

    Models without absolute positions (Swin) have no `position_grids` and take the dictionary as it is.
    """
    if not hasattr(model, "position_grids"):
        return state_dict
    old, new = model.position_grids(old_img_size), model.position_grids()
    resampled = {
        name: resample_positions(state_dict[name], old[name][0], new[name][0], num_prefix_tokens)
        for name, (_, num_prefix_tokens) in new.items()
        if name in state_dict and old[name] != new[name]
    }
    return state_dict | resampled


def move_positions(model: Any, old: PositionGrids) -> None:
    """Bring the model's own position embeddings from their `old` grids to those of its new input size, in place."""
    for name, (grid_size, num_prefix_tokens) in model.position_grids().items():
        owner, _, attribute = name.rpartition(".")
        held = model.get_parameter(name)
        moved = resample_positions(held.detach(), old[name][0], grid_size, num_prefix_tokens)
        setattr(model.get_submodule(owner), attribute, nn.Parameter(moved, held.requires_grad))
