"""Position embeddings on another grid than the one they were trained on. Both grids are known, never guessed.

Other files call `patch_grid` and `resample_positions` through this module (`positions.patch_grid(...)`): they branch on
shapes, which a graph tracer cannot follow, and `torch.fx.wrap` keeps them whole only under the name in this file.

Shapes: P prefix tokens, N = P + H * W tokens of a grid, C channels; R offsets of a window's tokens, M attention heads.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed_nhwc, resize_rel_pos_bias_table_simple, to_2tuple
from torch import Tensor, nn

from localvit.models.family import Family, PositionGrids
from localvit.tokens.grid import Size


@torch.fx.wrap
def patch_grid(img_size: Sequence[int], patch_size: Sequence[int]) -> tuple[int, int]:
    """Grid (H, W) of the patches of an image; both sizes are (height, width) in pixels.

    Raises ValueError, with both numbers, if the patches do not divide the image.
    """
    for side, pixels, patch in zip(("height", "width"), img_size, patch_size, strict=True):
        if pixels < patch or pixels % patch:
            raise ValueError(f"the image's {side} of {pixels} pixels is not a multiple of the patch size {patch}")
    return img_size[0] // patch_size[0], img_size[1] // patch_size[1]


def img_size_of(model: nn.Module) -> tuple[int, int] | None:
    """Height and width in pixels that the model's first patch embedding is made for, if it has one."""
    sizes = (getattr(module, "img_size", None) for module in model.modules())
    return next((size for size in sizes if isinstance(size, tuple)), None)


def number_of_patches(model: Family, state_dict: Mapping[str, Tensor]) -> dict[str, int]:
    """How many patches each absolute position embedding in `state_dict` is for, by its name in the model."""
    grids = model.position_grids()
    return {name: state_dict[name].shape[1] - prefix for name, (_, prefix) in grids.items() if name in state_dict}


def fills(model: Family, patches: Mapping[str, int], img_size: tuple[int, int]) -> bool:
    """Whether an image of `img_size` has that many patches for each position embedding of the model."""
    try:
        grids = model.position_grids(img_size)
    except ValueError:  # the patches do not divide the image
        return False
    return all(grids[name][0][0] * grids[name][0][1] == count for name, count in patches.items())


def height_and_width(size: int | Sequence[int]) -> Size:
    """A size as timm takes it, one side or (height, width), as a pair."""
    height, width = to_2tuple(size)
    return height, width


def check_patch_size(model: nn.Module, given: int | Size | None, own: Size) -> None:
    """Raise ValueError if `set_input_size` is asked for other patches than the model's."""
    if given is not None and height_and_width(given) != tuple(own):
        kind = type(model).__name__
        raise ValueError(f"patch_size={given} is not possible: {kind} keeps its patches of {own[0]} x {own[1]} pixels")


def record_input_size(model: nn.Module, img_size: Size) -> None:
    """Tell timm the model's new input size, for its data configuration and `save_for_hf`; from 1.0.31 on it asks."""
    with contextlib.suppress(ImportError):
        from timm.models._input import update_model_input_size

        update_model_input_size(model, img_size)


@torch.fx.wrap
def resample_positions(
    pos_1NC: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], num_prefix_tokens: int
) -> Tensor:
    """The embedding (1, P + H * W, C) resampled from `old_grid` to `new_grid`, bicubic. Prefix tokens stay as they are.

    Raises ValueError, with both numbers, if the embedding does not fill `old_grid`.
    """
    num_patches = pos_1NC.shape[1] - num_prefix_tokens
    if num_patches != old_grid[0] * old_grid[1]:
        raise ValueError(
            f"a position embedding for {num_patches} patches (without {num_prefix_tokens} prefix tokens) does not fill "
            f"the {old_grid[0]} x {old_grid[1]} grid of {old_grid[0] * old_grid[1]}"
        )
    # A grid that is symbolic, as while torch.export traces, is equal for the example only.
    if not any(isinstance(side, torch.SymInt) for side in new_grid) and old_grid == new_grid:
        return pos_1NC
    prefix_1PC, grid_1NC = pos_1NC[:, :num_prefix_tokens], pos_1NC[:, num_prefix_tokens:]
    # As a map: for a sequence, timm before 1.0.29 takes equal numbers of tokens for equal grids.
    resampled_1HWC = resample_abs_pos_embed_nhwc(grid_1NC.unflatten(1, old_grid), new_grid)
    return torch.cat((prefix_1PC, resampled_1HWC.flatten(1, 2)), dim=1)


def resample_state(model: nn.Module, state_dict: dict[str, Tensor], old_img_size: tuple[int, int]) -> dict[str, Tensor]:
    """`state_dict` with every absolute position embedding resampled from images of `old_img_size` to the model's grid.

    Raises ValueError if an embedding does not fill the grid of `old_img_size`.
    """
    if not isinstance(model, Family):
        return state_dict
    old, new = model.position_grids(old_img_size), model.position_grids()
    resampled = {
        name: resample_positions(state_dict[name], old[name][0], grid_size, num_prefix_tokens)
        for name, (grid_size, num_prefix_tokens) in new.items()
        if name in state_dict and old[name] != new[name]
    }
    return state_dict | resampled


def resample_own(model: Any, old: PositionGrids) -> None:
    """Resample the model's own position embeddings from their `old` grids to those of its new input size, in place."""
    for name, (grid_size, num_prefix_tokens) in model.position_grids().items():
        owner, _, attribute = name.rpartition(".")
        position = model.get_parameter(name)
        resampled = resample_positions(position.detach(), old[name][0], grid_size, num_prefix_tokens)
        setattr(model.get_submodule(owner), attribute, nn.Parameter(resampled, position.requires_grad))


def positions_like(source: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """The position entries of `source` that `model` has on another grid or window, resampled to the model's.

    Both are of the same architecture, ours or timm's. Absolute embeddings are resampled by `resample_positions`, tables
    of relative position biases bicubic as in the Swin paper (arXiv 2103.14030, section 3.2).
    """
    old_grids, new_grids, state_dict = absolute_grids(source), absolute_grids(model), source.state_dict()
    resampled = {
        name: resample_positions(state_dict[name], old_grids[name][0], grid_size, num_prefix_tokens)
        for name, (grid_size, num_prefix_tokens) in new_grids.items()
        if name in old_grids and old_grids[name][0] != grid_size and old_grids[name][1] == num_prefix_tokens
    }
    old_windows = _windows(source)
    for name, window_size in _windows(model).items():
        if name in old_windows and old_windows[name] != window_size:
            resampled[name] = _resample_offsets(state_dict[name], old_windows[name], window_size)
    return resampled


def absolute_grids(model: Any) -> PositionGrids:
    """Grids of the absolute positions of our models, and of timm's vision transformers where they can be told."""
    if isinstance(model, Family):
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
    """The biases for the offsets in `new_window`. Those of a class token (BEiT), at the end, stay as they are."""
    (old_H, old_W), (new_H, new_W) = ((2 * height - 1, 2 * width - 1) for height, width in (old_window, new_window))
    # As a map: for a table, timm takes the window to be square.
    bias_MHW = table_RM[: old_H * old_W].T.unflatten(1, (old_H, old_W))
    resampled_MHW = resize_rel_pos_bias_table_simple(bias_MHW, new_window, (table_RM.shape[1], new_H, new_W))
    return torch.cat((resampled_MHW.flatten(1).T, table_RM[old_H * old_W :]))
