"""Writing a checkpoint, in our layout or the published one, and the description of the model that goes into it."""

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from localvit.checkpoints.arguments import architecture_arguments, check_rebuilt, described_model, refused_arguments
from localvit.checkpoints.contents import FORMAT, HEADER
from localvit.checkpoints.mismatch import describe_mismatch, state_dict_mismatch
from localvit.models.positions import img_size_of
from localvit.models.published_names import AVERAGED, RAW, to_published_names
from localvit.models.registry import find_model
from localvit.utils.distributed import is_main
from localvit.utils.files import atomic_write
from localvit.utils.plain_values import plain
from localvit.utils.version import VERSION
from localvit.utils.weight_files import check_suffix
from localvit.utils.wrappers import is_sharded, plain_weights, unwrap


def save_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    layout: Literal["localvit", "published"] = "localvit",
    ema: Mapping[str, Tensor] | None = None,
    class_names: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model made by `create_model` to `path`, whole or not at all.

    A compiled model, one in DataParallel, DistributedDataParallel or a moving average of weights is written as the
    model itself. With weights that `fully_shard` has spread over processes, every process has to call it, and the
    first one writes.

    Args:
        model: the model.
        path: the file to write, `.safetensors` in our layout.
        layout: "localvit" for our safetensors file; "published" for a torch file that the published program reads,
            which contains only the weights.
        ema: averaged weights, a state dict of the same model.
        class_names: names of the classes in the model's order.
        preprocessing: `Preprocessing.to_dict()` of the images that the model was trained on.
        about: anything else that JSON can represent (metrics, a seed).

    Returns:
        The path.

    Raises:
        ValueError: for an unknown layout or a path of the other layout, if the number of class names is not the model's
            number of classes, if the model was not made by `create_model`, or if the file could not be loaded again
            because the layers have been changed (`fuse`, quantization, pruning).
    """
    model = unwrap(model)
    path = Path(path)
    if layout not in ("localvit", "published"):
        raise ValueError(f"layout={layout!r}: choose 'localvit' or 'published'")
    num_classes = getattr(model, "num_classes", None)
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(f"{len(class_names)} class names for a model of {num_classes} classes")
    made_from = getattr(model, "made_from", None)
    header = None
    if layout == "localvit" or (made_from and not refused_arguments(made_from["name"], plain(made_from["args"]))):
        header = make_header(model, class_names, preprocessing, about)
    state_dict = model.state_dict()
    raw = plain_weights(state_dict)
    averaged = plain_weights(ema) if ema is not None else None
    if header is not None:
        check_rebuilt(path, header, raw, kind=type(model).__name__)
    if averaged is not None and (wrong := state_dict_mismatch(averaged, raw)):
        raise ValueError(f"ema is not a state dict of this model: {describe_mismatch(wrong)}")
    check_suffix(path, safetensors=layout == "localvit")
    if is_sharded(state_dict) and not is_main():
        return path
    if layout == "published":
        entries = {"model": to_published_names(model, raw)}
        if averaged is not None:
            entries["model_ema"] = to_published_names(model, averaged)
        with atomic_write(path) as temporary:
            torch.save(entries, temporary)
        return path
    tensors = {RAW + key: value for key, value in raw.items()}
    tensors |= {AVERAGED + key: value for key, value in (averaged or {}).items()}
    with atomic_write(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={HEADER: json.dumps(header)})
    return path


def make_header(
    model: nn.Module,
    class_names: Sequence[str] | None,
    preprocessing: Mapping[str, Any] | None,
    about: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What a checkpoint says about a model in addition to its weights, in plain values, for `read_checkpoint`.

    The arguments are those of `save_checkpoint`.

    Raises ValueError if the model was not made by `create_model`, with an argument that a file cannot have, or if
    `preprocessing` or `about` cannot be written as JSON.
    """
    model = unwrap(model)
    made_from = getattr(model, "made_from", None)
    if made_from is None:
        raise ValueError("this model was not made by localvit.create_model, so a checkpoint could not rebuild it")
    arguments = plain(made_from["args"] | _changed_arguments(model, made_from))
    refused = refused_arguments(made_from["name"], arguments)
    if refused:
        raise ValueError(
            f"a checkpoint cannot rebuild this model: it was made with {', '.join(refused)}, and a checkpoint stores "
            "only plain arguments of the architecture"
        )
    img_size = img_size_of(model)
    arguments |= plain(_changed_patches(model, made_from["name"], arguments))
    arguments |= _changed_pool(model, made_from["name"], arguments)
    info = find_model(made_from["name"])
    header = {
        "format": FORMAT,
        "name": info.name if info else made_from["name"],
        "args": arguments,
        "img_size": img_size,
        "class_names": [str(name) for name in plain(class_names)] if class_names is not None else None,
        "preprocessing": plain(preprocessing),
        "about": versions() | plain(about or {}),
    }
    try:
        json.dumps(header)
    except TypeError as error:
        raise ValueError(f"preprocessing or about cannot be written to a checkpoint: {error}") from error
    return header


def _changed_arguments(model: Any, made_from: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for the model as it is now, where methods of it have changed it since it was made."""
    changed: dict[str, Any] = {"num_classes": getattr(model, "num_classes", None)}
    if (img_size := img_size_of(model)) and hasattr(model, "set_input_size"):
        changed["img_size"] = img_size
    allowed = architecture_arguments(made_from["name"])
    recorded = getattr(model, "_model_args", {})  # timm's, from 1.0.31 on
    changed |= {key: recorded[key] for key in ("patch_size", "window_size") if key in recorded and key in allowed}
    return changed


def _changed_patches(model: Any, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The patch size that `set_input_size` has given the model, which timm does not record before 1.0.31."""
    made = described_model(name, json.dumps(arguments, sort_keys=True))
    now, before = (getattr(getattr(each, "patch_embed", None), "patch_size", None) for each in (model, made))
    if now is None or before is None or now == before or "patch_size" not in architecture_arguments(name):
        return {}
    return {"patch_size": now}


def _changed_pool(model: Any, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for the pool that `reset_classifier` has given the model, if it was made with another one."""
    pool, allowed = getattr(model, "global_pool", None), architecture_arguments(name)
    made = described_model(name, json.dumps(arguments, sort_keys=True))
    if not isinstance(pool, str) or "global_pool" not in allowed or pool == getattr(made, "global_pool", pool):
        return {}
    # A new pool leaves the last norm where it is.
    norm = {"fc_norm": not isinstance(model.fc_norm, nn.Identity)} if "fc_norm" in allowed else {}
    return {"global_pool": pool} | norm


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    return {
        "localvit": VERSION,
        "torch": str(torch.__version__),  # a class of its own, which torch's weights_only refuses
        "timm": timm.__version__,
        "python": platform.python_version(),
    }
