"""`localvit info`: describe a model, a checkpoint file or an exported file."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from localvit.checkpoints import Checkpoint, read_checkpoint, versions
from localvit.data.preprocessing import Preprocessing
from localvit.inference.cost import count_multiply_adds, count_parameters, locality_report, summarize_blocks
from localvit.inference.exported import is_exported_path
from localvit.inference.runner import is_checkpoint_path, load_model
from localvit.models.factory import create_model
from localvit.models.packaged import PackagedWeights
from localvit.models.registry import find_model, packaged_weights
from localvit.utils.files import sha256_of
from localvit.utils.intervals import accuracy_interval, interval_text
from localvit.utils.tables import format_table
from localvit_cli import UsageError
from localvit_cli.exported_info import exported_facts, exported_text
from localvit_cli.streams import printable, printable_lines
from localvit_cli.tyro_rules import named_values

_SHOWN_CLASSES = 5


@dataclass(frozen=True, kw_only=True)
class Info:
    """Describe a model, a checkpoint file or an exported file. Nothing is downloaded."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """The name of a model, a checkpoint file, or a file of localvit export."""
    localize: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="NAME=VALUE ...", help_behavior_hint="")] = None
    """Describe the model after localvit.localize with these options."""
    json: bool = False
    """Print JSON instead of text."""

    def run(self) -> int:
        """Print the description. The exit status is 1 for a file that can be read but fits no known model."""
        if self.localize is not None and (is_exported_path(self.model) or is_checkpoint_path(self.model)):
            raise UsageError(f"--localize needs the name of a model; {self.model} is a file")
        if is_exported_path(self.model):
            exported = exported_facts(Path(self.model))
            print(json.dumps(exported, indent=2) if self.json else printable_lines(exported_text(exported)))
            return 0
        if is_checkpoint_path(self.model):
            facts = _file_facts(Path(self.model))
        else:
            localize = None if self.localize is None else named_values(self.localize)
            model: Any = create_model(self.model, device="meta", localize=localize)
            described = _model_facts(model, Preprocessing.from_pretrained_cfg(model.pretrained_cfg))
            facts = {"file": None, "model": described | {"packaged": _packaged_facts(packaged_weights(self.model))}}
        # Metrics in a checkpoint may be NaN, which JSON does not have.
        facts = json.loads(json.dumps(facts), parse_constant=lambda constant: None)
        print(json.dumps(facts, indent=2) if self.json else printable_lines(_text(facts)))
        return 1 if facts["file"] and facts["file"]["problem"] else 0


def _file_facts(path: Path) -> dict[str, Any]:
    """What the file contains, and facts on the model it makes; without a model, "problem" says why."""
    checkpoint = read_checkpoint(path)
    problem = model = None
    try:
        ready = load_model(str(path))
        class_names = ready.class_names
        model = _model_facts(ready.model, ready.preprocessing)
    except (ValueError, TypeError) as error:  # the file is still worth describing
        class_names = checkpoint.class_names
        problem = str(error)
    return {"file": _contents(checkpoint, class_names) | {"problem": problem}, "model": model}


def _contents(checkpoint: Checkpoint, class_names: list[str] | None) -> dict[str, Any]:
    return {
        "path": str(checkpoint.path),
        "bytes": checkpoint.path.stat().st_size,
        "sha256": sha256_of(checkpoint.path),
        "layout": checkpoint.layout,
        "name": checkpoint.name,
        "args": checkpoint.args,
        "img_size": checkpoint.img_size,
        "weights": ["raw"] if checkpoint.ema is None else ["raw", "ema"],
        "tensors": len(checkpoint.raw),
        "class_names": class_names,
        "preprocessing": checkpoint.preprocessing,
        "about": checkpoint.about,
    }


def _model_facts(model: Any, preprocessing: Preprocessing) -> dict[str, Any]:
    name = model.made_from["name"]
    registered = find_model(name)
    published = registered if registered and registered.paper_name else None
    cfg = model.pretrained_cfg
    in_chans = model.made_from["args"].get("in_chans", cfg["input_size"][0])
    input_size = (in_chans, *preprocessing.input_size)
    return {
        "name": name,
        "published_name": published.name if published else None,
        "friendly_name": published.alias if published else None,
        "paper_name": published.paper_name if published else None,
        "architecture": type(model).__name__,
        "num_classes": model.num_classes,
        "input_size": input_size,
        "parameters": count_parameters(model),
        "multiply_adds": count_multiply_adds(model, input_size),
        "preprocessing": preprocessing.to_dict(),
        "published": {key: getattr(published, key) for key in ("acc1", "acc5", "loss")} if published else None,
        "weights_from": cfg.get("url") or cfg.get("hf_hub_id") or None,
        "packaged": None,
        "blocks": [asdict(block) for block in summarize_blocks(model, input_size)],
        "locality": [asdict(part) for part in locality_report(model, input_size)],
    }


def _packaged_facts(packaged: PackagedWeights | None) -> dict[str, Any] | None:
    """Weights that this package contains, with the 95 % interval of their accuracy."""
    if packaged is None:
        return None
    return asdict(packaged) | {"acc1_interval": accuracy_interval(packaged.acc1, packaged.num_images)}


def _text(facts: dict[str, Any]) -> str:
    file, model = facts["file"], facts["model"]
    parts = [_file_text(file)] if file else []
    if model:
        parts.append(_model_text(model))
    if model and model["blocks"]:
        parts.append(_blocks_text(model["blocks"]))
    if file and "config" in file["about"]:
        settings = list(_flat(file["about"]["config"]))
        parts.append(format_table(settings, headings=("training setting", "value")))
    return "\n\n".join(parts)


def _file_text(file: dict[str, Any]) -> str:
    names = file["class_names"]
    shown = ", ".join(map(printable, (names or [])[:_SHOWN_CLASSES]))
    more = ", ..." if names and len(names) > _SHOWN_CLASSES else ""
    about = dict(file["about"])
    writers = [f"{library} {about.pop(library)}" for library in versions() if library in about]
    about.pop("config", None)
    if "epoch" in about:
        about["epoch"] += 1  # files count from 0
    if "metrics" in about:
        about["metrics"] = _with_intervals(about["metrics"], about.get("test_images"))
    rows = [
        ("file", file["path"]),
        ("size", f"{file['bytes']:,} bytes"),
        ("sha256", file["sha256"]),
        ("layout", file["layout"]),
        ("made for", file["name"] or "-"),
        ("arguments", _lines(file["args"])),
        ("weights", f"{' and '.join(file['weights'])}, {file['tensors']} tensors each"),
        ("classes", f"{len(names):,}: {shown}{more}" if names else "without names"),
        ("preprocessing", _lines(file["preprocessing"] or {})),
        ("written by", ", ".join(writers) or "-"),
        *((name.replace("_", " "), _lines(value)) for name, value in about.items()),
    ]
    if file["problem"]:
        rows.append(("problem", file["problem"]))
    return format_table(rows)


def _with_intervals(metrics: Mapping[str, Any], count: object) -> dict[str, Any]:
    """The metrics without the epoch, accuracies with their 95 % interval where the number of images is known."""
    shown = {name: value for name, value in metrics.items() if name != "epoch"}
    for name in ("test_acc1", "test_acc5"):
        value = shown.get(name)
        if type(count) is int and count > 0 and isinstance(value, int | float) and 0 <= value <= 100:
            shown[name] = f"{value:.6g} (95 % interval {interval_text(value, count)})"
    return shown


def _model_text(model: dict[str, Any]) -> str:
    others = [model[key] for key in ("published_name", "friendly_name", "paper_name")]
    published = model["published"] or {}
    channels, height, width = model["input_size"]
    rows = [
        ("model", model["name"]),
        ("also called", ", ".join(name for name in others if name and name != model["name"]) or "-"),
        ("architecture", model["architecture"]),
        ("classes", f"{model['num_classes']:,}"),
        ("input", f"{height} x {width} pixels, {channels} channels"),
        ("parameters", f"{model['parameters']:,}"),
        ("multiply-adds", f"{model['multiply_adds'] / 1e9:.3f} G per image (half the FLOPs)"),
        ("locality", _locality_text(model["locality"])),
        ("preprocessing", _lines(model["preprocessing"])),
        ("published", _lines({key: value for key, value in published.items() if value is not None})),
    ]
    if packaged := model["packaged"]:
        rows += _packaged_rows(packaged)
    # On a line of its own, an address is rarely too long to be copied in one piece.
    return format_table(rows) + (f"\nreleased weights:\n{model['weights_from']}" if model["weights_from"] else "")


def _packaged_rows(packaged: dict[str, Any]) -> list[tuple[str, str]]:
    low, high = packaged["acc1_interval"]
    return [
        ("weights", f"in this package: tag {packaged['tag']}, trained on {packaged['data_set']}"),
        ("their classes", ", ".join(packaged["class_names"])),
        (
            "their accuracy",
            f"Acc@1 {packaged['acc1']:.2f} % (95 % interval {low:.2f} to {high:.2f}), Acc@5 {packaged['acc5']:.2f} %, "
            f"loss {packaged['loss']:.3f}, on {packaged['num_images']:,} test images",
        ),
        ("their data", packaged["source"]),
    ]


def _blocks_text(blocks: list[dict[str, Any]]) -> str:
    rows = [
        (
            block["name"],
            block["kind"],
            "yes" if block["local"] else "-",
            " x ".join(map(str, block["grid_size"])) if block["grid_size"] else "-",
            f"{block['parameters']:,}",
        )
        for block in blocks
    ]
    return format_table(rows, headings=("block", "class", "locality", "grid", "parameters"), right=(4,))


def _locality_text(parts: list[dict[str, Any]]) -> str:
    if not parts:
        return "-"
    parameters, multiply_adds = (sum(part[key] for part in parts) for key in ("parameters", "multiply_adds"))
    return (
        f"{len(parts)} feed-forwards, with {parameters:,} parameters and {multiply_adds / 1e6:.1f} M multiply-adds of "
        "depth-wise convolutions and gates"
    )


def _lines(value: Any) -> str:
    """A line per entry of a mapping, or one value."""
    if isinstance(value, Mapping):
        return "\n".join(f"{name}: {text}" for name, text in _flat(value)) or "-"
    return _value_text(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names, with a dot before those of a nested mapping, and values as text."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _value_text(value)


def _value_text(value: Any) -> str:
    if value is None or value in ([], {}):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(_value_text, value)) if isinstance(value, list) else str(value)
