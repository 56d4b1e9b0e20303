"""Writing a checkpoint, in our layout or the published one, and the description of the model that goes into it."""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from localvit.checkpoints.arguments import refused_arguments
from localvit.checkpoints.contents import FORMAT, HEADER
from localvit.models.positions import img_size_of
from localvit.models.published_names import AVERAGED, RAW, to_published_names
from localvit.models.registry import find_model
from localvit.utils.files import atomic_write


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

    Args:
        model: the model.
        path: the file to write.
        layout: "localvit" for our safetensors file; "published" for a torch file that the published program reads,
            which contains only the weights.
        ema: averaged weights, a state dict of the same model.
        class_names: names of the classes in the model's order.
        preprocessing: `Preprocessing.to_dict()` of the images that the model was trained on.
        about: anything else that JSON can represent (metrics, a seed).

    Returns:
        The path.

    Raises:
        ValueError: for an unknown layout, if the number of class names is not the model's number of classes, or if the
            model was not made by `create_model`.
    """
    path = Path(path)
    if layout not in ("localvit", "published"):
        raise ValueError(f"layout={layout!r}: choose 'localvit' or 'published'")
    num_classes = getattr(model, "num_classes", None)
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(f"{len(class_names)} class names for a model of {num_classes} classes")
    if layout == "published":
        entries = {"model": to_published_names(model, model.state_dict())}
        if ema is not None:
            entries["model_ema"] = to_published_names(model, ema)
        with atomic_write(path) as temporary:
            torch.save(entries, temporary)
        return path
    tensors = {RAW + key: value for key, value in model.state_dict().items()}
    tensors |= {AVERAGED + key: value for key, value in (ema or {}).items()}
    # Copies: the format refuses tensors that share memory, and an average may share counters with the model.
    copies = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    header = make_header(model, class_names, preprocessing, about)
    with atomic_write(path) as temporary:
        safetensors.torch.save_file(copies, temporary, metadata={HEADER: json.dumps(header)})
    return path


def make_header(
    model: nn.Module,
    class_names: Sequence[str] | None,
    preprocessing: Mapping[str, Any] | None,
    about: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What a checkpoint says about a model in addition to its weights, in plain values, for `read_checkpoint`.

    The arguments are those of `save_checkpoint`.

    Raises ValueError if the model was not made by `create_model`, or with an argument that a file cannot have.
    """
    made_from = getattr(model, "made_from", None)
    if made_from is None:
        raise ValueError("this model was not made by localvit.create_model, so a checkpoint could not rebuild it")
    refused = refused_arguments(made_from["name"], made_from["args"])
    if refused:
        raise ValueError(
            f"a checkpoint cannot rebuild this model: it was made with {', '.join(refused)}, and a checkpoint stores "
            "only plain arguments of the architecture"
        )
    img_size = img_size_of(model)
    # These may have changed since the model was made.
    current: dict[str, Any] = {"num_classes": getattr(model, "num_classes", None)}
    if img_size and hasattr(model, "set_input_size"):
        current["img_size"] = img_size
    info = find_model(made_from["name"])
    return {
        "format": FORMAT,
        "name": info.name if info else made_from["name"],
        "args": made_from["args"] | current,
        "img_size": img_size,
        "class_names": list(class_names) if class_names is not None else None,
        "preprocessing": dict(preprocessing) if preprocessing is not None else None,
        "about": versions() | dict(about or {}),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    return {
        "localvit": version("localvit"),
        "torch": str(torch.__version__),  # a class of its own, which torch's weights_only refuses
        "timm": timm.__version__,
        "python": platform.python_version(),
    }
