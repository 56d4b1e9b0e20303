"""Checkpoints: what a file of weights holds, loading it strictly, and writing it in our format or the published one.

Ours is one safetensors file: the raw weights under `raw/`, the averaged ones under `ema/`, and in the header, as JSON,
everything needed to use them (`Checkpoint`'s fields). Published files are torch's, with entries `model` (raw),
`model_ema` and `args`.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from localvit.checkpoints.fit import classes_of, describe_mismatch, known_model, state_dict_mismatch
from localvit.models.positions import resample_state
from localvit.models.registry import own_names, published_key
from localvit.models.zoo import create_model, published_model
from localvit.utils.files import atomic_write
from localvit.utils.weight_files import CheckpointError, read_weight_file

HEADER = "localvit"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a file holds."""

    path: Path
    """Where it was read."""
    layout: Literal["localvit", "published"]
    """Whose names the weights go by."""
    raw: dict[str, Tensor]
    """The trained weights."""
    ema: dict[str, Tensor] | None = None
    """Their running average, if it was kept."""
    name: str | None = None
    """The architecture's name, if the file says it."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments that the architecture was made with."""
    img_size: tuple[int, int] | None = None
    """Height and width that the positions were learned on."""
    class_names: list[str] | None = None
    """Names of the classes in the model's order, if the file says them."""
    preprocessing: dict[str, Any] | None = None
    """Fields of `localvit.data.preprocessing.Preprocessing`."""
    about: dict[str, Any] = field(default_factory=dict)
    """Anything else: versions, metrics."""

    def weights(self, which: Literal["raw", "ema"]) -> dict[str, Tensor]:
        """The raw or the averaged weights. Raises CheckpointError when the file has no averaged ones."""
        if which not in ("raw", "ema"):
            raise ValueError(f"weights={which!r}: choose 'raw' or 'ema'")
        if which == "raw":
            return self.raw
        if self.ema is None:
            raise CheckpointError(f"{self.path} holds no averaged weights; use weights='raw'")
        return self.ema


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a file in our format, the published one, or one of a plain state dict, running none of its code.

    Raises FileNotFoundError or CheckpointError (see `read_weight_file`).
    """
    path = Path(path)
    content = read_weight_file(path)
    header = _header(path) if path.suffix == ".safetensors" else None
    if header is not None:
        raw = {key.removeprefix("raw/"): value for key, value in content.items() if key.startswith("raw/")}
        ema = {key.removeprefix("ema/"): value for key, value in content.items() if key.startswith("ema/")}
        return Checkpoint(path=path, layout="localvit", raw=raw, ema=ema or None, **_described(header))
    raw = content.get("model", content.get("state_dict", content))
    if not isinstance(raw, Mapping) or not raw or not all(isinstance(value, Tensor) for value in raw.values()):
        raise CheckpointError(f"{path} holds no weights: expected tensors, or an entry 'model' of tensors")
    if isinstance(content.get(HEADER), Mapping):  # a training state of ours
        return Checkpoint(
            path=path, layout="published", raw=dict(raw), ema=content.get("model_ema"), **_described(content[HEADER])
        )
    asked = content.get("args")
    return Checkpoint(
        path=path,
        layout="published",
        raw=dict(raw),
        ema=content.get("model_ema"),
        name=getattr(asked, "model", None),
        args={"num_classes": classes_of(dict(raw))} if classes_of(dict(raw)) else {},
        about={"epoch": content["epoch"]} if isinstance(content.get("epoch"), int) else {},
    )


def _described(header: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Checkpoint` that a header of `describe` holds."""
    fields = {key: header[key] for key in ("name", "args", "class_names", "preprocessing", "about")}
    return fields | {"img_size": tuple(header["img_size"]) if header["img_size"] else None}


def _header(path: Path) -> dict[str, Any] | None:
    with safetensors.safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(HEADER)
    if text is None:
        return None
    header = json.loads(text)
    if header["format"] > FORMAT:
        raise CheckpointError(f"{path} was written by a newer localvit (format {header['format']}); upgrade localvit")
    return header


def load_checkpoint(model: nn.Module, path: str | Path, weights: Literal["raw", "ema"] = "raw") -> Checkpoint:
    """Load a checkpoint's raw (or averaged) weights into `model`, strictly, and return what the file said.

    Positions are resampled when the model was made for another image size than the checkpoint's.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is damaged or unsafe; or it is of another architecture (named, if a known model fits),
            of another class count, or has missing or surplus keys. The model is then unchanged.
    """
    checkpoint = read_checkpoint(path)
    load_weights(model, checkpoint, weights)
    return checkpoint


def load_weights(model: Any, checkpoint: Checkpoint, weights: Literal["raw", "ema"] = "raw") -> None:
    """What `load_checkpoint` does, for a file that is read already. Raises as it does."""
    state_dict = weights_for(model, checkpoint, weights)
    img_size = checkpoint.img_size
    if checkpoint.layout == "published" and hasattr(model, "PUBLISHED_KEYS"):
        img_size = img_size or model.pretrained_cfg["input_size"][1:]
    if img_size:
        state_dict = resample_state(model, state_dict, img_size)
    _check_fit(checkpoint, state_dict, model.state_dict())
    model.load_state_dict(state_dict)


def weights_for(model: nn.Module, checkpoint: Checkpoint, weights: Literal["raw", "ema"] = "raw") -> dict[str, Tensor]:
    """A checkpoint's weights under the model's names; unknown entries keep theirs."""
    held = checkpoint.weights(weights)
    published = checkpoint.layout == "published" and hasattr(model, "PUBLISHED_KEYS")
    # A plain state dict may have our names, some of which are also published ones, of other entries.
    return own_names(held, model) if published and held.keys() != model.state_dict().keys() else held


def _check_fit(checkpoint: Checkpoint, state_dict: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError, saying what does not fit and what to do, unless the entries are the wanted ones."""
    path = checkpoint.path
    wrong = state_dict_mismatch(state_dict, wanted)
    if not wrong:
        return
    if wrong.keys() == {"of another shape"} and all(key.startswith("head") for key in wrong["of another shape"]):
        holds, has = classes_of(state_dict), classes_of(wanted)
        raise CheckpointError(
            f"{path} has {holds} classes and the model {has}: make the model with num_classes={holds} to load it, "
            f"and call model.reset_classifier({has}) afterwards to put a new head on these weights"
        )
    known = None if checkpoint.layout == "localvit" else known_model(checkpoint.raw)
    if checkpoint.layout == "localvit" and checkpoint.name:
        known = checkpoint.name
    advice = f"; it is a {known}" if known else ""
    raise CheckpointError(f"{path} does not fit the model{advice}: {describe_mismatch(wrong)}")


def model_from_checkpoint(
    path: str | Path, weights: Literal["raw", "ema"] = "raw", *, name: str | None = None, **overrides: Any
) -> tuple[nn.Module, Checkpoint]:
    """Rebuild the model that a checkpoint holds and load it.

    Args:
        path: the file.
        weights: the raw or the averaged ones.
        name: the model's name. By default what the file says, or else the published model whose entries it has.
        overrides: arguments that go before those that the file says, such as `img_size`.

    Raises:
        FileNotFoundError, CheckpointError: as `load_checkpoint`, and when no known model fits.
        ValueError: for a `name` that is not known.
    """
    checkpoint = read_checkpoint(path)
    if name is None and checkpoint.name and timm.is_model(checkpoint.name):
        name = checkpoint.name
    name = name or known_model(checkpoint.raw)
    if name is None:
        said = f"says its model is {checkpoint.name!r}, which is not known" if checkpoint.name else "names no model"
        raise CheckpointError(f"{path} {said}, and no published model has its entries: give the model's name")
    model = create_model(name, **checkpoint.args | overrides)
    load_weights(model, checkpoint, weights)
    return model, checkpoint


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
    """Write `model`, made by `create_model`, to `path`, whole or not at all; returns the path.

    Args:
        layout: "localvit" for our safetensors file; "published" for a torch file that the published program reads,
            which holds the weights alone.
        ema: averaged weights, a state dict of the same model.
        class_names: names of the classes in the model's order.
        preprocessing: `Preprocessing.to_dict()` of the images that the model was trained for.
        about: anything else that JSON can hold (metrics, a seed).

    Raises:
        ValueError: for an unknown layout, class names that do not count the model's classes, or a model that does not
            know how it was made.
    """
    path = Path(path)
    if layout not in ("localvit", "published"):
        raise ValueError(f"layout={layout!r}: choose 'localvit' or 'published'")
    num_classes = getattr(model, "num_classes", None)
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(f"{len(class_names)} class names for a model of {num_classes} classes")
    with atomic_write(path) as unfinished:
        if layout == "published":
            averaged = {"model_ema": published_state(model, ema)} if ema is not None else {}
            torch.save({"model": published_state(model, model.state_dict())} | averaged, unfinished)
        else:
            tensors = {f"raw/{key}": value for key, value in model.state_dict().items()}
            tensors |= {f"ema/{key}": value for key, value in (ema or {}).items()}
            # Copies, since the format refuses tensors that share memory, and an average may share counters.
            copies = {
                key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()
            }
            header = describe(model, class_names, preprocessing, about)
            safetensors.torch.save_file(copies, unfinished, metadata={HEADER: json.dumps(header)})
    return path


def describe(
    model: nn.Module,
    class_names: Sequence[str] | None,
    preprocessing: Mapping[str, Any] | None,
    about: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What a checkpoint says of a model, beside its weights, in plain values. Arguments are `save_checkpoint`'s."""
    made_from = getattr(model, "made_from", None)
    if made_from is None:
        raise ValueError("this model does not know how it was made; make it with localvit.create_model")
    img_size = img_size_of(model)
    # What may have changed since the model was made.
    present = {"num_classes": getattr(model, "num_classes", None)}
    if img_size and hasattr(model, "set_input_size"):
        present["img_size"] = img_size
    published = published_model(made_from["name"])
    return {
        "format": FORMAT,
        "name": published.name if published else made_from["name"],
        "args": made_from["args"] | present,
        "img_size": img_size,
        "class_names": list(class_names) if class_names is not None else None,
        "preprocessing": dict(preprocessing) if preprocessing is not None else None,
        "about": versions() | dict(about or {}),
    }


def img_size_of(model: nn.Module) -> tuple[int, int] | None:
    """Height and width that the model's first embedding of patches, if it has one, is made for."""
    sizes = (getattr(module, "img_size", None) for module in model.modules())
    return next((size for size in sizes if isinstance(size, tuple)), None)


def versions() -> dict[str, str]:
    """The versions of what computes, for the record."""
    return {
        "localvit": version("localvit"),
        "torch": str(torch.__version__),  # its own class is no plain text
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


def published_state(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under the published names, with the entries that the published program computes and stores."""
    computed: dict[str, Tensor] = getattr(model, "published_buffers", dict)()
    return {published_key(model, key): value for key, value in state_dict.items()} | computed
