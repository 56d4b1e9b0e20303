"""`localvit info`: what a model is, or what a checkpoint file holds."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from localvit_cli import UsageError

if TYPE_CHECKING:
    from localvit.checkpoints.checkpoint import Checkpoint
    from localvit.data.preprocessing import Preprocessing

_NAMED = 5  # how many classes the text names


@dataclass(frozen=True, kw_only=True)
class Info:
    """Describe a model or a checkpoint file. Nothing is downloaded."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """The name of a model, or a checkpoint file."""
    localize: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="NAME=VALUE ...", help_behavior_hint="")] = None
    """Describe the model after localvit.localize with these arguments."""
    json: bool = False
    """Print JSON instead of text."""

    def run(self) -> int:
        """Print what is known; 1 for a file that is readable but fits no known model."""
        from localvit.data.preprocessing import Preprocessing
        from localvit.inference.runner import names_file
        from localvit.models.zoo import create_model
        from localvit_cli.named_values import named_values

        if names_file(self.model):
            if self.localize is not None:
                raise UsageError("--localize shows what would be put into a model of a name; a file is what it is")
            facts = _file_facts(Path(self.model))
        else:
            localize = None if self.localize is None else named_values("--localize", self.localize)
            model: Any = create_model(self.model, device="meta", localize=localize)
            facts = {"file": None, "model": _model_facts(model, Preprocessing.of_cfg(model.pretrained_cfg))}
        # Metrics in a checkpoint may be NaN, which JSON does not have.
        facts = json.loads(json.dumps(facts), parse_constant=lambda constant: None)
        print(json.dumps(facts, indent=2) if self.json else _text(facts))
        return 1 if facts["file"] and facts["file"]["problem"] else 0


def _file_facts(path: Path) -> dict[str, Any]:
    """What a file says of itself, and the model that it makes."""
    from localvit.checkpoints.checkpoint import read_checkpoint
    from localvit.inference.runner import ready_model

    checkpoint = read_checkpoint(path)
    problem = model = None
    try:
        ready = ready_model(str(path))
        class_names = ready.class_names
        model = _model_facts(ready.model, ready.preprocessing)
    except (ValueError, TypeError) as error:  # the file is still worth describing
        class_names = checkpoint.class_names
        problem = str(error)
    return {"file": _described(checkpoint, class_names) | {"problem": problem}, "model": model}


def _described(checkpoint: "Checkpoint", class_names: list[str] | None) -> dict[str, Any]:
    import hashlib

    with checkpoint.path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "path": str(checkpoint.path),
        "bytes": checkpoint.path.stat().st_size,
        "sha256": sha256,
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


def _model_facts(model: Any, preprocessing: "Preprocessing") -> dict[str, Any]:
    from localvit.inference.cost import count_multiply_adds, count_parameters, locality_report, summarize_blocks
    from localvit.models.zoo import published_model

    name = model.made_from["name"]
    published = published_model(name)
    cfg = model.pretrained_cfg
    in_chans = model.made_from["args"].get("in_chans", cfg["input_size"][0])
    input_size = (in_chans, *preprocessing.input_size)
    return {
        "name": name,
        "published_name": published.name if published else None,
        "friendly_name": published.friendly if published else None,
        "paper_name": published.paper_name if published else None,
        "architecture": type(model).__name__,
        "num_classes": model.num_classes,
        "input_size": input_size,
        "parameters": count_parameters(model),
        "multiply_adds": count_multiply_adds(model, input_size),
        "preprocessing": preprocessing.to_dict(),
        "published": {key: getattr(published, key) for key in ("acc1", "acc5", "loss")} if published else None,
        "weights_from": cfg.get("url") or cfg.get("hf_hub_id") or None,
        "blocks": [asdict(block) for block in summarize_blocks(model, input_size)],
        "locality": [asdict(part) for part in locality_report(model, input_size)],
    }


def _text(facts: dict[str, Any]) -> str:
    parts = [_file_text(facts["file"]) if facts["file"] else "", _model_text(facts["model"]) if facts["model"] else ""]
    return "\n\n".join(filter(None, parts))


def _file_text(file: dict[str, Any]) -> str:
    from localvit.utils.tables import columns

    names = file["class_names"]
    more = ", ..." if names and len(names) > _NAMED else ""
    rows = [
        ("file", file["path"]),
        ("size", f"{file['bytes']:,} bytes"),
        ("sha256", file["sha256"]),
        ("layout", file["layout"]),
        ("says it is", file["name"] or "nothing"),
        ("arguments", _listed(file["args"])),
        ("weights", f"{' and '.join(file['weights'])}, {file['tensors']} tensors each"),
        ("classes", f"{len(names):,}: {', '.join(names[:_NAMED])}{more}" if names else "no names"),
        ("preprocessing", _listed(file["preprocessing"] or {})),
        ("about", _listed(file["about"])),
    ]
    if file["problem"]:
        rows.append(("problem", file["problem"]))
    return columns(rows)


def _model_text(model: dict[str, Any]) -> str:
    from localvit.utils.tables import columns

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
        ("multiply-adds", f"{model['multiply_adds'] / 1e9:.3f} G an image (half the FLOPs)"),
        ("locality", _locality_text(model["locality"])),
        ("preprocessing", _listed(model["preprocessing"])),
        ("published", _listed({key: value for key, value in published.items() if value is not None})),
        ("released weights", model["weights_from"] or "-"),
    ]
    blocks = [
        (
            block["name"],
            block["kind"],
            "local" if block["local"] else "-",
            " x ".join(map(str, block["grid_size"])) if block["grid_size"] else "-",
            f"{block['parameters']:,}",
        )
        for block in model["blocks"]
    ]
    headings = ("block", "class", "locality", "grid", "parameters")
    return columns(rows) + (f"\n\n{columns([headings, *blocks], right=(4,))}" if blocks else "")


def _locality_text(parts: list[dict[str, Any]]) -> str:
    parameters, multiply_adds = (sum(part[key] for part in parts) for key in ("parameters", "multiply_adds"))
    added = (
        f"{parameters:,} parameters and {multiply_adds / 1e6:.1f} M multiply-adds of depth-wise convolution and gate"
    )
    return f"in {len(parts)} feed-forwards, {added}" if parts else "-"


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items()) or "-"
