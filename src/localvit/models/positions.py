"""Position embeddings on another grid than the one they were learned on. Both grids are always known, never guessed.

Shapes: P prefix tokens, N = P + H * W tokens of a grid, C channels; R offsets of a window's tokens, M attention heads.
"""

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import register_notrace_function, resample_abs_pos_embed_nhwc, resize_rel_pos_bias_table_simple
from torch import Tensor, nn

PositionGrids = Mapping[str, tuple[tuple[int, int], int]]
"""For each position embedding (1, P + H * W, C) of a model, by name: its grid (H, W) and its prefix tokens P."""


@register_notrace_function  # It branches on shapes, which a graph tracer cannot follow.
def patch_grid(img_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """Grid (H, W) of the patches of an image; both sizes are (height, width) in pixels.

    Raises ValueError, saying both numbers, when the patches do not divide the image.
    """
    for side, pixels, patch in zip(("height", "width"), img_size, patch_size, strict=True):
        if pixels < patch or pixels % patch:
            raise ValueError(f"the image's {side} of {pixels} pixels is no multiple of the patch's {patch}")
    return img_size[0] // patch_size[0], img_size[1] // patch_size[1]


@register_notrace_function
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
    if old_grid == new_grid:
        return pos_1NC
    prefix_1PC, grid_1NC = pos_1NC[:, :num_prefix_tokens], pos_1NC[:, num_prefix_tokens:]
    # As a map: of a sequence timm before 1.0.29 takes equal counts of tokens for equal grids.
    moved_1HWC = resample_abs_pos_embed_nhwc(grid_1NC.unflatten(1, old_grid), new_grid)
    return torch.cat((prefix_1PC, moved_1HWC.flatten(1, 2)), dim=1)


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


def positions_like(source: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """The position entries of `source` that `model` has on another grid or window, brought to the model's.

    Both are of one architecture, ours or timm's, and know their own grids. Both kinds are resampled bicubic: absolute
    ones as `resample_positions` does it, tables of relative biases as the Swin paper (arXiv 2103.14030, 3.2).
    """
    old_grids, new_grids = _absolute_grids(source), _absolute_grids(model)
    moved = {
        name: resample_positions(source.get_parameter(name).detach(), old_grids[name][0], grid_size, num_prefix_tokens)
        for name, (grid_size, num_prefix_tokens) in new_grids.items()
        if name in old_grids and old_grids[name][0] != grid_size and old_grids[name][1] == num_prefix_tokens
    }
    old_windows = _windows(source)
    for name, window_size in _windows(model).items():
        if name in old_windows and old_windows[name] != window_size:
            moved[name] = _resample_offsets(source.get_parameter(name).detach(), old_windows[name], window_size)
    return moved


def _absolute_grids(model: Any) -> PositionGrids:
    """What the model says of its absolute positions, or what can be told of those of timm's vision transformers."""
    if hasattr(model, "position_grids"):
        return model.position_grids()
    positions = getattr(model, "pos_embed", None)
    grid_size = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if not isinstance(positions, nn.Parameter) or positions.ndim != 3 or grid_size is None:
        return {}
    return {"pos_embed": (tuple(grid_size), positions.shape[1] - grid_size[0] * grid_size[1])}


def _windows(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Height and width of each attention's window, by the name of its table of relative position biases (R, M)."""
    return {
        f"{name}.relative_position_bias_table": module.window_size
        for name, module in model.named_modules()
        if getattr(getattr(module, "relative_position_bias_table", None), "ndim", 0) == 2
        and isinstance(getattr(module, "window_size", None), tuple)
    }


def _resample_offsets(table_RM: Tensor, old_window: tuple[int, int], new_window: tuple[int, int]) -> Tensor:
    """The biases of the offsets in `old_window` for those in `new_window`; those of a class token (BEiT) stay."""
    (old_H, old_W), (new_H, new_W) = ((2 * height - 1, 2 * width - 1) for height, width in (old_window, new_window))
    # As a map, for of a table timm would take the window to be square.
    bias_MHW = table_RM[: old_H * old_W].T.unflatten(1, (old_H, old_W))
    moved_MHW = resize_rel_pos_bias_table_simple(bias_MHW, new_window, (table_RM.shape[1], new_H, new_W))
    return torch.cat((moved_MHW.flatten(1).T, table_RM[old_H * old_W :]))
