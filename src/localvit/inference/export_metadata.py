"""What an exported file says about itself, in the metadata of its own format.

Every value is a text: plain, or JSON where it is more than one. The preprocessing has timm's names (`input_size`,
`interpolation`, `crop_pct`, `crop_mode`, `mean`, `std`), as in a `pretrained_cfg`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

from localvit.data.classes import readable_class_names
from localvit.data.preprocessing import Preprocessing
from localvit.inference.calibration import Calibration
from localvit.utils.weight_files import CheckpointError

VERSION = 1
"""Version of the metadata."""

InputType = Literal["uint8", "float32"]
Dynamic = Literal["none", "batch", "size"]
Precision = Literal["float32", "float16", "int8"]
Part = Literal["resize", "preprocessing", "softmax"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True, kw_only=True)
class ExportMetadata:
    """All that is needed to use an exported file, and where it comes from."""

    architecture: str
    """Name of the model."""
    num_classes: int
    class_names: list[str] | None
    """Names of the classes in the order of the output, or None if they are unknown."""
    preprocessing: Preprocessing
    """How images are prepared, whether the file or its user does it."""
    input_type: InputType
    """uint8: RGB from 0 to 255. float32: RGB from 0 to 1, or normalized if the file does not normalize."""
    in_graph: tuple[Part, ...]
    """What the file does itself: `resize` (and crop), `preprocessing` (scale to [0, 1], normalize), `softmax`."""
    dynamic: Dynamic
    """Which of batch and image size its input leaves open; `size` means both."""
    precision: Precision = "float32"
    """float16: its weights are stored in it, and it computes in float32. int8: its products compute in it."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments that the model was made with."""
    weights: Literal["published", "own", "unknown"] = "unknown"
    """Released weights, those of one's own file, or those of a module in memory."""
    source: str = ""
    """What was exported, in words."""
    source_sha256: str = ""
    """Hash of the checkpoint file, if it was one."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of localvit and of the libraries that wrote the file."""
    about: dict[str, Any] = field(default_factory=dict)
    """What else the checkpoint says: the settings and metrics of its run."""

    def to_strings(self) -> dict[str, str]:
        """The metadata as texts by key, for any format."""
        values = self.to_values()
        strings = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
        return {"producer": "localvit"} | strings

    def to_values(self) -> dict[str, Any]:
        """The metadata by key, with what follows from them."""
        preprocessing = self.preprocessing.to_dict()
        preprocessing["input_size"] = (3, *self.preprocessing.input_size)
        described = readable_class_names(self.class_names, self.num_classes) if self.class_names else None
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return (
            {"localvit_export": VERSION}
            | values
            | {
                "preprocessing": preprocessing,
                "class_descriptions": described if described != self.class_names else None,
                "input": self.input_description,
                "output": self.output,
            }
        )

    @property
    def input_description(self) -> str:
        """The input in words."""
        if "preprocessing" not in self.in_graph:
            values = "normalized with mean and std"
        else:
            values = "values from 0 to 255" if self.input_type == "uint8" else "values from 0 to 1"
        size = "of any size" if "resize" in self.in_graph else "resized and cropped to the input size"
        return f"images (batch, 3, height, width), RGB, {self.input_type}, {values}, {size}"

    @property
    def temperature(self) -> float:
        """What logits are divided by where the file does the softmax: 1 for a model without a fitted temperature."""
        calibration = Calibration.of(self.about, self.source or "the file")
        return calibration.temperature if calibration else 1.0

    @property
    def output(self) -> str:
        """`probabilities` or `logits`, each (batch, num_classes)."""
        return "probabilities" if "softmax" in self.in_graph else "logits"

    @classmethod
    def from_strings(cls, path: Path, strings: Mapping[str, str]) -> Self:
        """The inverse of `to_strings`. Raises CheckpointError if the file has no such metadata, or damaged ones."""
        if "localvit_export" not in strings:
            raise CheckpointError(
                f"{path} was not exported by localvit, so its classes and preprocessing are unknown: "
                "write it with localvit export"
            )
        if strings["localvit_export"] != str(VERSION):
            raise CheckpointError(
                f"{path} was exported by another localvit (metadata {strings['localvit_export']}, here {VERSION}): "
                "upgrade localvit, or export the checkpoint again"
            )
        try:
            values: dict[str, Any] = {
                each.name: strings[each.name] if each.type in _TEXTS else json.loads(strings[each.name])
                for each in fields(cls)
                if each.name in strings or each.name not in _ADDED
            }
            values["in_graph"] = tuple(values["in_graph"])
            size = values["preprocessing"]["input_size"][1:]
            values["preprocessing"] = Preprocessing.from_dict(values["preprocessing"] | {"input_size": size})
            metadata = cls(**values)
            metadata.check()
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} has damaged metadata ({error}): export the checkpoint again") from error
        return metadata

    def check(self) -> None:
        """Raise ValueError for values that contradict each other or do not exist."""
        Calibration.of(self.about, "the file")  # a damaged temperature
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(f"{len(self.class_names)} class names for {self.num_classes} classes")
        for name, value, allowed in (
            ("input_type", self.input_type, get_args(InputType)),
            ("dynamic", self.dynamic, get_args(Dynamic)),
            ("precision", self.precision, get_args(Precision)),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: choose {', '.join(allowed)}")
        if unknown := [part for part in self.in_graph if part not in PARTS]:
            raise ValueError(f"in_graph={unknown[0]!r}: choose {', '.join(PARTS)}")


_ADDED = ("precision",)
"""Fields that older files lack."""
_TEXTS = (str, InputType, Dynamic, Precision, Literal["published", "own", "unknown"])
"""Types of the fields whose texts are not JSON."""
