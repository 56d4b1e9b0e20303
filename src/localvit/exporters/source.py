"""What is exported: a model with its classes, its preprocessing, and where it comes from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from localvit.data.classes import model_class_names
from localvit.data.preprocessing import Preprocessing
from localvit.inference.exported import ExportedModel
from localvit.inference.runner import LoadedModel, is_checkpoint_path, load_model
from localvit.models.positions import img_size_of
from localvit.utils.files import sha256_of
from localvit.utils.plain_values import plain
from localvit.utils.wrappers import unwrap


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model, and what a file of it has to say."""

    model: Any
    name: str
    class_names: list[str] | None
    preprocessing: Preprocessing
    description: str
    weights: Literal["published", "own", "unknown"]
    sha256: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def source_of(
    model: str | Path | nn.Module | LoadedModel,
    class_names: Sequence[str] | None,
    preprocessing: Preprocessing | None,
    checkpoint: Path | None = None,
) -> Source:
    """The source for any model: a file, a name, a module, or the result of `load_model`.

    What is not given is taken from the checkpoint or the model. `checkpoint` is the file that a `LoadedModel` is of.

    Raises ValueError for a module without preprocessing if none is given, and as `load_model` does.
    """
    if isinstance(model, nn.Module):
        return _of_module(model, class_names, preprocessing)
    if isinstance(model, LoadedModel):
        loaded = model
    else:
        loaded = load_model(model)
        checkpoint = Path(model) if is_checkpoint_path(str(model)) else None
    if isinstance(loaded.model, ExportedModel):
        raise ValueError(f"{loaded.model.path} is an exported file: export the checkpoint that it was made from")
    return Source(
        model=loaded.model,
        name=loaded.name,
        class_names=list(class_names) if class_names is not None else loaded.class_names,
        preprocessing=preprocessing or loaded.preprocessing,
        # Without the folder, which is nobody else's business.
        description=loaded.description.replace(str(checkpoint), checkpoint.name) if checkpoint else loaded.description,
        weights="own" if checkpoint else "published",
        sha256=sha256_of(checkpoint) if checkpoint else "",
        arguments=_arguments(loaded.model),
        about=loaded.about,
    )


def _of_module(model: nn.Module, class_names: Sequence[str] | None, preprocessing: Preprocessing | None) -> Source:
    model = unwrap(model)
    kind = type(model).__name__
    pretrained_cfg: Any = getattr(model, "pretrained_cfg", None)
    if preprocessing is None:
        if not pretrained_cfg:
            raise ValueError(f"{kind} does not define its preprocessing; give preprocessing=")
        preprocessing = Preprocessing.from_pretrained_cfg(pretrained_cfg, img_size_of(model))
    made_from = getattr(model, "made_from", None) or {}
    return Source(
        model=model,
        name=made_from.get("name", kind),
        class_names=model_class_names(model, class_names) if class_names or pretrained_cfg else _labels(model),
        preprocessing=preprocessing,
        description=f"{kind} in memory",
        weights="unknown",
        arguments=_arguments(model),
    )


def _labels(model: Any) -> list[str] | None:
    """Names of the classes in a configuration of transformers, unless they are only numbered."""
    names = getattr(getattr(model, "config", None), "id2label", None)
    if not names or all(str(name) == f"LABEL_{index}" for index, name in names.items()):
        return None
    return [str(names[index]) for index in sorted(names)]


def _arguments(model: Any) -> dict[str, Any]:
    return dict(plain((getattr(model, "made_from", None) or {}).get("args", {})))
