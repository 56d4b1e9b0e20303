"""The image size at which the position embeddings in a checkpoint were trained.

It is never guessed from a number of tokens. It is what the caller or the file says, or else the size of the model or of
the released weights, whichever has a grid that the embeddings fill.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from localvit.checkpoints.contents import Checkpoint
from localvit.models.family import Family
from localvit.models.positions import fills, img_size_of, number_of_patches
from localvit.utils.weight_files import CheckpointError


def resizable_positions(model: nn.Module, state_dict: Mapping[str, Tensor]) -> set[str]:
    """The absolute position embeddings of the model that the state dict has, at any grid but of the same width.

    Empty if it lacks one of them: they change their grids together.
    """
    if not isinstance(model, Family):
        return set()
    names, own = model.position_grids().keys(), model.state_dict()
    fits = [
        name in state_dict and state_dict[name].ndim == 3 and state_dict[name].shape[::2] == own[name].shape[::2]
        for name in names
    ]
    return set(names) if all(fits) else set()


def trained_img_size(
    model: Any, checkpoint: Checkpoint, state_dict: Mapping[str, Tensor], given: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Height and width in pixels at which the position embeddings in `state_dict` were trained.

    Args:
        model: a model of a family with absolute position embeddings.
        checkpoint: the file.
        state_dict: its weights under the model's names.
        given: what the caller says.

    Raises CheckpointError if that size is not known, or if the size that is said does not fit the embeddings.
    """
    path = checkpoint.path
    patches = number_of_patches(model, state_dict)
    stated = given or (checkpoint.img_size if checkpoint.has_header else None)
    if stated is not None:
        if not fills(model, patches, stated):
            source = "checkpoint_img_size" if given else "its header"
            raise CheckpointError(
                f"{path} has position embeddings for {_listed(patches)} patches, which is not the grid of "
                f"{_size(stated)} pixels that {source} says"
            )
        return stated
    if checkpoint.img_size is not None and fills(model, patches, checkpoint.img_size):
        return checkpoint.img_size
    own, released = img_size_of(model), tuple(model.pretrained_cfg["input_size"][1:])
    sizes = [size for size in dict.fromkeys((own, released)) if size and fills(model, patches, size)]
    grids = {tuple(grid for grid, _ in model.position_grids(size).values()) for size in sizes}
    if len(grids) == 1:
        return sizes[0]
    found = (
        f"both {_size(own)} and {_size(released)} pixels have that many"
        if grids
        else "the file does not say their size"
    )
    raise CheckpointError(
        f"{path} has position embeddings for {_listed(patches)} patches, and {found}: pass "
        "checkpoint_img_size=(height, width), the image size that they were trained at, or create the model for that "
        "size (--input-size)"
    )


def _listed(patches: Mapping[str, int]) -> str:
    return ", ".join(map(str, patches.values()))


def _size(img_size: tuple[int, int] | None) -> str:
    return f"{img_size[0]} x {img_size[1]}" if img_size else "no"
