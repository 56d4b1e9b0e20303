"""The formats, by name: each is one file with one class, which holds its options and writes it."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
from torch.export import ExportedProgram

from localvit.exporters.int8 import Int8
from localvit.inference.export_metadata import PARTS, Dynamic, ExportMetadata, InputType, Part
from localvit.inference.runtimes import Runtime


@dataclass(frozen=True, kw_only=True)
class Format(ABC):
    """What every format has in common. A subclass adds its own options, and is registered with `register`.

    Raises ValueError for a value that does not exist.
    """

    dynamic: Dynamic = "batch"
    """What the input leaves open: `none`, the `batch`, or batch and image `size`."""
    include: tuple[Part, ...] = ("preprocessing", "softmax")
    """What the file does itself: `preprocessing` (scale and normalize), `softmax`, `resize` (resize, crop and
    preprocessing). With () it takes normalized images and returns logits."""
    input_type: InputType = "uint8"
    """uint8: RGB from 0 to 255; float32: RGB from 0 to 1. Without `preprocessing` always float32."""
    fuse: bool = False
    """Export the graph of `localvit.fuse`. The runtimes fold batch norms themselves, and are faster without."""
    precision: Literal["float32", "float16"] = "float32"
    """float16 stores weights in half the bytes; all layers still compute in float32."""
    int8: Int8 | None = None
    """Quantize to int8, if it costs little."""

    name: ClassVar[str]
    """Its name on the command line."""
    suffix: ClassVar[str]
    """How its files are named."""
    requires: ClassVar[tuple[str, ...]] = ()
    """The modules that it needs, all installed by one extra."""
    extra: ClassVar[str] = ""
    """That extra."""
    stores_float16: ClassVar[bool] = False
    """Whether its `write` knows float16."""
    opens_sides: ClassVar[bool] = True
    """Whether its input can leave the batch and the image size open."""
    has_uint8: ClassVar[bool] = True
    """Whether its graphs take tensors of uint8; otherwise they are traced with float32 of the same values."""
    is_folder: ClassVar[bool] = False
    """Whether its files are folders."""
    quantizes: ClassVar[bool] = False
    """Whether it has `write_int8`."""

    def __post_init__(self) -> None:
        if unknown := [part for part in self.include if part not in PARTS]:
            raise ValueError(f"include={unknown[0]!r}: choose {', '.join(PARTS)}")
        if self.dynamic not in ("none", "batch", "size"):
            raise ValueError(f"dynamic={self.dynamic!r}: choose none, batch or size")
        if self.input_type not in ("uint8", "float32"):
            raise ValueError(f"input_type={self.input_type!r}: choose uint8 or float32")
        if self.precision not in ("float32", "float16"):
            raise ValueError(f"precision={self.precision!r}: choose float32 or float16")
        if self.precision == "float16" and not self.stores_float16:
            able = ", ".join(name for name, each in FORMATS.items() if each.stores_float16)
            raise ValueError(f"precision='float16' is not written as {self.name}: choose {able}")
        if self.precision == "float16" and self.int8 is not None:
            raise ValueError("int8 and precision='float16' contradict each other: leave one of them out")
        if not self.opens_sides and (self.dynamic != "none" or "resize" in self.include):
            asked = "include='resize'" if self.dynamic == "none" else f"dynamic={self.dynamic!r}"
            able = ", ".join(name for name, each in FORMATS.items() if each.opens_sides)
            raise ValueError(f"{asked} is not written as {self.name}, which takes one image of one size: choose {able}")
        if self.int8 is not None and not self.quantizes:
            able = ", ".join(name for name, each in FORMATS.items() if each.quantizes)
            raise ValueError(f"int8 is not written as {self.name}: choose {able}")
        if self.int8 is not None and "resize" in self.include:
            raise ValueError("int8 and include='resize' contradict each other: in int8, resizing would not be exact")
        if "resize" in self.include and self.dynamic == "size":
            raise ValueError(
                "dynamic='size' and include='resize' contradict each other: resized in the file, images of any size "
                "become the model's size; choose one of them"
            )

    @property
    def tolerance(self) -> float:
        """The largest error of logits, relative to the largest logit, of a file that is kept.

        float16 rounds each weight by up to 5e-4 of itself, so errors near 1e-3 are expected.
        """
        return 5e-3 if self.precision == "float16" else 1e-4

    @property
    def parts(self) -> tuple[Part, ...]:
        """`include` in the order in which the graph does it; resizing includes preprocessing."""
        included = {*self.include, *(("preprocessing",) if "resize" in self.include else ())}
        return tuple(part for part in PARTS if part in included)

    @abstractmethod
    def write(self, program: ExportedProgram, path: Path, metadata: ExportMetadata) -> None:
        """Write the traced program, with the metadata, to a file in an empty folder."""

    def write_int8(self, float32: Path, path: Path, inputs: Sequence[np.ndarray], metadata: ExportMetadata) -> None:
        """Write the file `float32` that `write` made, quantized by what it computes for each of the inputs."""
        raise NotImplementedError

    def files(self, path: Path) -> list[Path]:
        """All files that `write` makes for `path`."""
        return [path]

    def other_runtimes(self, path: Path) -> list[tuple[str, Runtime]]:
        """Other ways to run a file that its users may meet, in words; the report says their errors."""
        return []

    def check_installed(self) -> None:
        """Raise ImportError, with what to install, if a module that it needs is missing."""
        for module in self.requires:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise ImportError(
                    f'export to {self.name} needs {module} ({error}): pip install "localvit[{self.extra}]"'
                ) from error

    def with_options(self, **options: object) -> Self:
        """The same format with other options."""
        return replace(self, **options)  # type: ignore[arg-type]  # checked by dataclass


FORMATS: dict[str, type[Format]] = {}
"""Every format by its name on the command line."""


def register(cls: type[Format]) -> type[Format]:
    """Add a format to the registry."""
    FORMATS[cls.name] = cls
    return cls
