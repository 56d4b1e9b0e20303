"""Loading a checkpoint: into a model, or into a new model that is made as the file describes it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from localvit.checkpoints.arguments import check_arguments, model_without_memory
from localvit.checkpoints.contents import Checkpoint, Weights, read_checkpoint
from localvit.checkpoints.mismatch import describe_mismatch, known_model, num_classes_of, state_dict_mismatch
from localvit.checkpoints.trained_size import resizable_positions, trained_img_size
from localvit.models.factory import create_model, is_model
from localvit.models.family import Family
from localvit.models.positions import resample_state
from localvit.models.published_names import to_own_names
from localvit.utils.weight_files import CheckpointError
from localvit.utils.wrappers import is_quantized, is_sharded, unwrap


def load_checkpoint(
    model: nn.Module, path: str | Path, weights: Weights = "raw", *, checkpoint_img_size: tuple[int, int] | None = None
) -> Checkpoint:
    """Load the raw or averaged weights of a checkpoint into `model`, strictly; also into the model in a wrapper.

    Position embeddings are resampled if the model was made for another image size than the checkpoint's.

    Args:
        model: the model.
        path: the file.
        weights: the raw weights or the averaged ones.
        checkpoint_img_size: height and width that the checkpoint was trained at. Needed only if neither the file nor
            the number of its position embeddings tells it.

    Returns:
        What the file contains.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged or unsafe; if it is of another architecture (named in the message if it
            is a known one) or number of classes, or has missing or unexpected entries; or if the image size of its
            position embeddings is not known. The model is then unchanged.
    """
    checkpoint = read_checkpoint(path)
    load_weights(model, checkpoint, weights, checkpoint_img_size=checkpoint_img_size)
    return checkpoint


def load_weights(
    model: nn.Module,
    checkpoint: Checkpoint,
    weights: Weights = "raw",
    *,
    checkpoint_img_size: tuple[int, int] | None = None,
) -> None:
    """Do what `load_checkpoint` does, with a file that was read already. Raises what it raises."""
    model = unwrap(model)
    if is_sharded(dict(model.named_parameters())):
        raise CheckpointError(
            f"{checkpoint.path} cannot be loaded into a sharded model: load it before fully_shard, in every process"
        )
    fitted = _fitted_weights(model, checkpoint, weights, checkpoint_img_size)
    if is_quantized(dict(model.named_parameters())):
        raise CheckpointError(
            f"{checkpoint.path} cannot be loaded into a quantized model: load it before the model is quantized"
        )
    model.load_state_dict(fitted)


def weights_for(model: nn.Module, checkpoint: Checkpoint, weights: Weights = "raw") -> dict[str, Tensor]:
    """The weights of a checkpoint under the model's names. Unknown entries keep their names."""
    return to_own_names(checkpoint.weights(weights), model)


def _fitted_weights(
    model: nn.Module, checkpoint: Checkpoint, weights: Weights, img_size: tuple[int, int] | None
) -> dict[str, Tensor]:
    """The weights under the model's names, resampled to its grids. Raises CheckpointError if they do not fit."""
    state_dict, expected = weights_for(model, checkpoint, weights), model.state_dict()
    positions = resizable_positions(model, state_dict)
    without = [
        {key: value for key, value in entries.items() if key not in positions} for entries in (state_dict, expected)
    ]
    _check_fit(checkpoint, *without)
    if isinstance(model, Family) and positions:
        size = trained_img_size(model, checkpoint, state_dict, img_size)
        state_dict = resample_state(model, state_dict, size)
    return state_dict


def _check_fit(checkpoint: Checkpoint, state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError, with what does not fit and what to do, unless the entries are the expected ones."""
    path = checkpoint.path
    wrong = state_dict_mismatch(state_dict, expected)
    if not wrong:
        return
    if wrong.keys() == {"of another shape"} and all(key.startswith("head") for key in wrong["of another shape"]):
        theirs, ours = num_classes_of(state_dict), num_classes_of(expected)
        raise CheckpointError(
            f"{path} has {theirs} classes and the model {ours}: make the model with num_classes={theirs} to load it, "
            f"and then call model.reset_classifier({ours}) for a new head on these weights"
        )
    known = checkpoint.name if checkpoint.layout == "localvit" else known_model(checkpoint.raw)
    advice = f"; it is a {known}" if known else ""
    raise CheckpointError(f"{path} does not fit the model{advice}: {describe_mismatch(wrong)}")


def model_from_checkpoint(
    path: str | Path,
    weights: Weights = "raw",
    *,
    name: str | None = None,
    checkpoint_img_size: tuple[int, int] | None = None,
    **overrides: Any,
) -> tuple[nn.Module, Checkpoint]:
    """Make the model that a checkpoint is of, and load its weights.

    Args:
        path: the file.
        weights: the raw weights or the averaged ones.
        name: the model's name. By default the name in the file, or else the published model that has its entries.
        checkpoint_img_size: as in `load_checkpoint`.
        overrides: arguments of the model, such as `img_size`, in place of those in the file.

    Returns:
        The model, and what the file contains.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: as `load_checkpoint`; if no known model fits; or if the file asks for anything but an
            architecture, such as pretrained weights from another file or address.
        ValueError: for an unknown `name`.
    """
    checkpoint = read_checkpoint(path)
    name = name or _name_of(checkpoint)
    if checkpoint.has_header:
        check_arguments(checkpoint, name)
        described = model_without_memory(checkpoint, name)
        if described is not None:  # the file's own weights must fit before memory is allocated for them
            _check_fit(checkpoint, weights_for(described, checkpoint, weights), described.state_dict())
    model: Any = create_model(name, **checkpoint.args | overrides)
    if isinstance(model, Family) and not checkpoint.has_header and "img_size" not in overrides:
        _take_trained_size(model, checkpoint, weights, checkpoint_img_size)
    load_weights(model, checkpoint, weights, checkpoint_img_size=checkpoint_img_size)
    return model, checkpoint


def _name_of(checkpoint: Checkpoint) -> str:
    if checkpoint.name and is_model(checkpoint.name):
        return checkpoint.name
    name = known_model(checkpoint.raw)
    if name is None:
        stated = f"is of an unknown model, {checkpoint.name!r}," if checkpoint.name else "does not name its model,"
        raise CheckpointError(
            f"{checkpoint.path} {stated} and no published model has its entries: give the model's name"
        )
    return name


def _take_trained_size(
    model: Any, checkpoint: Checkpoint, weights: Weights, checkpoint_img_size: tuple[int, int] | None
) -> None:
    """Give the model the image size of a published checkpoint, if that is known and another one than the model's."""
    state_dict = weights_for(model, checkpoint, weights)
    if not resizable_positions(model, state_dict):
        return
    img_size = trained_img_size(model, checkpoint, state_dict, checkpoint_img_size)
    if model.position_grids(img_size) != model.position_grids():
        model.set_input_size(img_size)
        model.made_from["args"]["img_size"] = img_size
