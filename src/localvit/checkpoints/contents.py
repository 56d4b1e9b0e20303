"""What a checkpoint file contains, and reading it.

Our layout is one safetensors file: the raw weights under `raw/`, the averaged ones under `ema/`, and in the header, as
JSON, everything needed to use them (the fields of `Checkpoint`). Published files are torch's, with the entries `model`
(raw weights), `model_ema` and `args`. Our training states are such files with the header as entry `localvit`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from localvit.checkpoints.mismatch import num_classes_of
from localvit.models.published_names import AVERAGED, RAW
from localvit.utils.weight_files import HEADER, CheckpointError, read_header, read_weight_file
from localvit.utils.wrappers import without_wrappers

FORMAT = 1
"""Version of the header."""

Weights = Literal["raw", "ema"]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a file contains."""

    path: Path
    """The file."""
    layout: Literal["localvit", "published"]
    """Which names the entries have: the model's or the published program's."""
    raw: dict[str, Tensor] = field(repr=False)
    """The trained weights."""
    ema: dict[str, Tensor] | None = field(default=None, repr=False)
    """Their moving average, if there is one."""
    has_header: bool = False
    """Whether the file describes its model completely, as files of this package do."""
    name: str | None = None
    """The architecture's name, if the file has it."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments that the model was made with."""
    img_size: tuple[int, int] | None = None
    """Height and width that the position embeddings were trained at, if the file has them."""
    class_names: list[str] | None = None
    """Names of the classes in the model's order, if the file has them."""
    preprocessing: dict[str, Any] | None = None
    """Fields of `localvit.data.preprocessing.Preprocessing`."""
    about: dict[str, Any] = field(default_factory=dict)
    """Anything else: versions, metrics."""

    def weights(self, which: Weights) -> dict[str, Tensor]:
        """The raw or the averaged weights. Raises CheckpointError if the file has no averaged ones."""
        if which not in ("raw", "ema"):
            raise ValueError(f"weights={which!r}: choose 'raw' or 'ema'")
        if which == "raw":
            return self.raw
        if self.ema is None:
            raise CheckpointError(f"{self.path} has no averaged weights: use weights='raw'")
        return self.ema


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a file in our layout, in the published one, or with a plain state dict. No code in it is run.

    Also reads a folder with a model of timm's layout (`localvit.checkpoints.hub_folder`).

    Raises FileNotFoundError or CheckpointError as `read_weight_file` does, and CheckpointError for a damaged header.
    """
    from localvit.checkpoints.hub_folder import is_hub_folder, read_hub_folder  # which imports this file

    path = Path(path)
    if is_hub_folder(path):
        return read_hub_folder(path)
    content = read_weight_file(path)
    header = read_header(path, HEADER) if path.suffix == ".safetensors" else None
    if header is not None:
        raw = {key.removeprefix(RAW): value for key, value in content.items() if key.startswith(RAW)}
        ema = {key.removeprefix(AVERAGED): value for key, value in content.items() if key.startswith(AVERAGED)}
        raw, ema = without_wrappers(raw), without_wrappers(ema)
        return Checkpoint(path=path, layout="localvit", raw=raw, ema=ema or None, **_header_fields(path, header))
    raw = content.get("model", content.get("state_dict", content))
    if not _is_state_dict(raw) or not raw:
        raise CheckpointError(f"{path} has no weights: expected tensors, or an entry 'model' of tensors")
    averaged = content.get("model_ema", content.get("state_dict_ema"))
    if averaged is not None and not _is_state_dict(averaged):
        raise CheckpointError(f"{path} is damaged: its averaged weights are not a dictionary of tensors")
    raw, averaged = without_wrappers(raw), without_wrappers(averaged) if averaged is not None else None
    if isinstance(content.get(HEADER), Mapping):  # a training state of this package
        fields = _header_fields(path, content[HEADER])
    else:
        fields = _published_fields(content, raw)
    return Checkpoint(path=path, layout="published", raw=raw, ema=averaged, **fields)


def _is_state_dict(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(key, str) and isinstance(entry, Tensor) for key, entry in value.items()
    )


def _published_fields(content: Mapping[str, Any], raw: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of `Checkpoint` that follow from a published file: its `args`, `epoch` and the shape of the head."""
    args = content.get("args")
    name, input_size = getattr(args, "model", None), getattr(args, "input_size", None)
    num_classes = num_classes_of(raw)
    return {
        "name": name if isinstance(name, str) else None,
        "args": {"num_classes": num_classes} if num_classes else {},
        "img_size": stated_size(input_size),
        "about": {"epoch": content["epoch"]} if isinstance(content.get("epoch"), int) else {},
    }


def stated_size(input_size: Any) -> tuple[int, int] | None:
    """An image size as the published program's `--input-size` gives it: one side, or (height, width)."""
    sides = list(input_size) if isinstance(input_size, list | tuple) else [input_size]
    if len(sides) not in (1, 2) or not all(type(side) is int and side > 0 for side in sides):
        return None
    return sides[0], sides[-1]


_HEADER_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "args": (dict,),
    "img_size": (list, tuple, type(None)),
    "class_names": (list, type(None)),
    "preprocessing": (dict, type(None)),
    "about": (dict,),
}


def _header_fields(path: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Checkpoint` in a header of `make_header`. Raises CheckpointError if it is damaged or newer."""
    if type(header.get("format")) is not int:
        raise CheckpointError(f"{path} has a damaged header: it has no format number; copy or save the file again")
    if header["format"] > FORMAT:
        raise CheckpointError(f"{path} was written by a newer localvit (format {header['format']}): upgrade localvit")
    damaged = [key for key, types in _HEADER_TYPES.items() if key not in header or not isinstance(header[key], types)]
    names, img_size = header.get("class_names"), header.get("img_size")
    if isinstance(names, list) and not all(isinstance(name, str) for name in names):
        damaged.append("class_names")
    if isinstance(img_size, list | tuple) and (len(img_size) != 2 or stated_size(img_size) is None):
        damaged.append("img_size")
    if damaged:
        raise CheckpointError(
            f"{path} has a damaged header: {', '.join(damaged)} missing or of the wrong type; copy or save it again"
        )
    fields = {key: header[key] for key in _HEADER_TYPES} | {"has_header": True}
    return fields | {"img_size": tuple(img_size) if img_size else None}
