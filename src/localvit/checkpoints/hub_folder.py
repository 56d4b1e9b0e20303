"""Reading the folder of a model as timm and transformers share it: config.json with model.safetensors beside it.

No code in it is run, and nothing else is read: the names and arguments in config.json pass the same checks as those in
a checkpoint's header (`localvit.checkpoints.arguments`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localvit.checkpoints.contents import Checkpoint, stated_size
from localvit.models.localized import LOCALIZED
from localvit.utils.weight_files import CheckpointError, read_weight_file

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
"""The files of the folder."""
EXTRA = "localvit"
"""Entry of config.json for what timm has no place for."""
_NUMBER = (int, float)


def is_hub_folder(path: str | Path) -> bool:
    """Whether the path is a folder with a config.json."""
    return (Path(path) / CONFIG).is_file()


def read_hub_folder(folder: str | Path) -> Checkpoint:
    """The contents of a folder that `localvit.hub.save_hub_folder` or timm's `save_for_hf` has written.

    Raises CheckpointError, with the file and what to do, if a file is missing or damaged.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} has no {WEIGHTS}, the weights of its {CONFIG}: download the whole folder")
    raw = read_weight_file(folder / WEIGHTS)
    arguments = dict(config["model_args"] or {})
    name = config["architecture"]
    if name == LOCALIZED:
        name = arguments.pop("base", None)
        if not isinstance(name, str):
            raise _damaged(folder / CONFIG, "base")
    arguments["num_classes"] = config["num_classes"]
    extra = config[EXTRA] or {}
    about, class_names = extra.get("about", {}), config["label_names"]
    if not isinstance(about, dict):
        raise _damaged(folder / CONFIG, EXTRA)
    if class_names is not None and (
        not all(isinstance(each, str) for each in class_names) or len(class_names) != config["num_classes"]
    ):
        raise _damaged(folder / CONFIG, "label_names")
    return Checkpoint(
        path=folder / WEIGHTS,
        layout="localvit",
        raw=raw,
        has_header=True,
        name=name,
        args=arguments,
        img_size=stated_size(arguments.get("img_size")),
        class_names=class_names,
        preprocessing=_preprocessing(folder / CONFIG, config["pretrained_cfg"]),
        about=about,
    )


_TYPES: dict[str, tuple[type, ...]] = {
    "architecture": (str,),
    "num_classes": (int,),
    "pretrained_cfg": (dict,),
    "model_args": (dict, type(None)),
    "label_names": (list, type(None)),
    EXTRA: (dict, type(None)),
}


def _read_config(path: Path) -> dict[str, Any]:
    """The entries in `_TYPES`, None for those that are missing and may be."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(config, Mapping) or "architecture" not in config:
        raise CheckpointError(f"{path} is not of a timm model: it names no architecture")
    for key, types in _TYPES.items():
        if not isinstance(config.get(key), types):
            raise _damaged(path, key)
    return {key: config.get(key) for key in _TYPES}


def _preprocessing(path: Path, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `localvit.data.preprocessing.Preprocessing` that timm's configuration states."""
    valid = {
        "input_size": lambda value: stated_size(value[1:]) is not None,
        "crop_pct": lambda value: isinstance(value, _NUMBER),
        "crop_mode": lambda value: isinstance(value, str),
        "interpolation": lambda value: isinstance(value, str),
        "mean": lambda value: all(isinstance(each, _NUMBER) for each in value),
        "std": lambda value: all(isinstance(each, _NUMBER) and each > 0 for each in value),
    }
    stated = {key: cfg[key] for key in valid if cfg.get(key) is not None}
    for key, value in stated.items():
        is_list = isinstance(value, list)
        if is_list != (key in ("input_size", "mean", "std")) or not valid[key](value):
            raise _damaged(path, key)
    if "input_size" in stated:
        stated["input_size"] = stated["input_size"][1:]
    return stated


def _damaged(path: Path, key: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {key!r} is missing or not what it should be; download it again")
