"""Writing a model as a folder that `timm.create_model("local-dir:...")` and transformers read.

timm writes config.json and the weights. Three things in its config.json are changed here:

- `model_args` are the arguments that a checkpoint records. timm adds the current class count, channels and pooling to
  them, and transformers passes the class count itself, so that it would be given twice.
- A localized model has the name `localvit_localized`, with the model that it was made from as an argument.
- The preprocessing is that of the trained model, without timm's recommendations for testing, which belong to the
  released weights.
"""

import json
import logging
import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models import save_for_hf

from localvit.checkpoints import make_header
from localvit.checkpoints.arguments import check_rebuilt
from localvit.checkpoints.hub_folder import CARD, CONFIG, EXTRA, WEIGHTS
from localvit.data.classes import imagenet_synsets
from localvit.hub.model_card import model_card
from localvit.inference.runner import LoadedModel
from localvit.models.localized import LOCALIZED
from localvit.utils.files import atomic_write, check_writable
from localvit.utils.wrappers import plain_weights

logger = logging.getLogger(__name__)

PRIVATE = frozenset(("data_path", "output_dir", "finetune", "teacher_checkpoint", "folder"))
"""Entries of what a checkpoint says about its run that are paths on the machine of the run."""
_OF_RELEASED_WEIGHTS = ("tag", "test_input_size", "test_crop_pct", "test_pool_size", "label_offset", "hf_hub_id", "url")


def save_hub_folder(loaded: LoadedModel, folder: str | Path, *, title: str | None = None) -> Path:
    """Write config.json, model.safetensors and the model card README.md into `folder`.

    Args:
        loaded: the model, from `localvit.load_model`.
        folder: is created if it is missing. It must be empty or contain these files only, which are replaced.
        title: heading of the model card and name in its examples, such as "user/name"; by default the folder's name.

    Returns:
        The folder.

    Raises:
        ValueError: if the model could not be loaded again (see `localvit.save_checkpoint`), or the folder contains
            something else.
        OSError: if the folder cannot be written.
    """
    folder = Path(folder)
    about = public(loaded.about)
    if loaded.weights == "ema" and about.pop("metrics", None) is not None:
        logger.warning("the metrics in the checkpoint are those of the raw weights, so the model card has none")
    header = make_header(loaded.model, loaded.class_names, loaded.preprocessing.to_dict(), about)
    check_rebuilt(folder, header, plain_weights(loaded.model.state_dict()), kind=type(loaded.model).__name__)
    if folder.is_dir() and (others := {path.name for path in folder.iterdir()} - {CONFIG, WEIGHTS, CARD}):
        raise ValueError(f"{folder} contains other files ({sorted(others)[0]}): give an empty folder")
    check_writable(folder / CONFIG)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as unfinished:
        for written in _write_files(loaded, header, Path(unfinished)):
            with atomic_write(folder / written.name) as path:
                shutil.move(written, path)
        card = model_card(loaded, header, title or folder.resolve().name)
        with atomic_write(folder / CARD) as path:
            path.write_text(card, encoding="utf-8", errors="backslashreplace")
    return folder


def _write_files(loaded: LoadedModel, header: Mapping[str, Any], folder: Path) -> list[Path]:
    save_for_hf(loaded.model, str(folder), safe_serialization=True)
    path = folder / CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    arguments = {key: value for key, value in header["args"].items() if key != "num_classes"}
    if "localize" in arguments:
        config["architecture"], arguments["base"] = LOCALIZED, header["name"]
    config["model_args"] = arguments
    names = header["class_names"]
    for key in ("label_names", "label_descriptions"):
        config.pop(key, None)
    if names is not None and names != imagenet_synsets():  # timm and transformers have words for ImageNet's
        config["label_names"] = names
    config["pretrained_cfg"] = _pretrained_cfg(config["pretrained_cfg"], loaded, arguments)
    config[EXTRA] = {"about": header["about"]}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return [folder / WEIGHTS, path]


def _pretrained_cfg(cfg: Mapping[str, Any], loaded: LoadedModel, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """timm's pretrained configuration with the model's own preprocessing."""
    preprocessing = loaded.preprocessing.to_dict()
    size = preprocessing.pop("input_size")
    kept = {key: value for key, value in cfg.items() if key not in _OF_RELEASED_WEIGHTS}
    return kept | preprocessing | {"input_size": [arguments.get("in_chans", 3), *size]}


def public(value: Any) -> Any:
    """What a checkpoint says about its run, without paths on the machine of the run, and None where a number is NaN or
    infinite, for which JSON has no word."""
    if isinstance(value, Mapping):
        return {key: public(item) for key, item in value.items() if key not in PRIVATE}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
