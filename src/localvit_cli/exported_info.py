"""What an exported file says about itself, for `localvit info`."""

from pathlib import Path
from typing import Any

from localvit.inference.exported import ExportedModel
from localvit.inference.runtimes import AXES
from localvit.utils.files import sha256_of, size_of
from localvit.utils.tables import format_table
from localvit_cli.streams import printable

_SHOWN_CLASSES = 5


def exported_facts(path: Path) -> dict[str, Any]:
    """The file, its runtime and its metadata. Raises what `ExportedModel.open` raises."""
    exported = ExportedModel.open(path)
    return {
        "path": str(path),
        "bytes": size_of(path),
        "sha256": sha256_of(path),
        "runtime": exported.runtime.name,
        "cannot_run": exported.runtime.cannot_run,
        "input_shape": list(exported.runtime.input_shape),
        **exported.metadata.to_values(),
    }


def exported_text(facts: dict[str, Any]) -> str:
    """The facts as a table."""
    names = facts["class_descriptions"] or facts["class_names"] or []
    shown = ", ".join(map(printable, names[:_SHOWN_CLASSES])) + (", ..." if len(names) > _SHOWN_CLASSES else "")
    axes = zip(AXES, facts["input_shape"], strict=True)
    rows = [
        ("file", facts["path"]),
        ("size", f"{facts['bytes']:,} bytes"),
        ("sha256", facts["sha256"]),
        ("runs in", facts["runtime"] + (f"; not here: {facts['cannot_run']}" if facts["cannot_run"] else "")),
        ("architecture", facts["architecture"]),
        ("arguments", _lines(facts["arguments"])),
        ("classes", f"{facts['num_classes']:,}: {shown}" if names else f"{facts['num_classes']:,}, without names"),
        ("input", facts["input"]),
        ("input shape", " x ".join(axis if side is None else str(side) for axis, side in axes)),
        ("output", f"{facts['output']} (batch, {facts['num_classes']})"),
        ("precision", facts["precision"]),
        ("does itself", ", ".join(facts["in_graph"]) or "nothing but the model"),
        ("preprocessing", _lines(facts["preprocessing"])),
        ("made from", facts["source"]),
        ("weights", facts["weights"] + (f", sha256 {facts['source_sha256']}" if facts["source_sha256"] else "")),
        ("written by", ", ".join(f"{library} {version}" for library, version in facts["versions"].items())),
        *(
            (key.replace("_", " "), _lines(value))
            for key, value in facts["about"].items()
            if key in ("epoch", "metrics", "calibration")
        ),
    ]
    return format_table(rows)


def _lines(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_lines(each)}" for key, each in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(map(_lines, value)) or "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
