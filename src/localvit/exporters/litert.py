"""LiteRT programs (.tflite), formerly TensorFlow Lite, for phones and embedded devices: one file, with its metadata."""

import importlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn
from torch.export import ExportedProgram

from localvit.exporters.registry import Format, register
from localvit.inference.export_metadata import Dynamic, ExportMetadata
from localvit.inference.quiet import without_messages
from localvit.inference.runtimes import METADATA_FILE


@register
@dataclass(frozen=True, kw_only=True)
class LiteRT(Format):
    """Options of a LiteRT file: one image of one size, in signature `serving_default` with the input `images` and
    the output `probabilities` or `logits`.

    At its end is an archive, as in TensorFlow Lite's files with metadata, which `unzip` opens too: `localvit.json` with
    the metadata, and `labels.txt` with a class name a line.
    """

    dynamic: Dynamic = "none"
    """Only `none`: the file takes one image."""

    name: ClassVar[str] = "litert"
    suffix: ClassVar[str] = ".tflite"
    requires: ClassVar[tuple[str, ...]] = ("ai_edge_litert.interpreter",)
    extra: ClassVar[str] = "litert"
    opens_sides: ClassVar[bool] = False

    def check_installed(self) -> None:
        super().check_installed()
        try:
            with without_messages():
                importlib.import_module("litert_torch")
        except ImportError as error:
            raise ImportError(
                f"export to litert needs litert_torch ({error}): pip install litert-torch, then localvit again, "
                "because their versions of typing-extensions differ"
            ) from error

    def write(self, program: ExportedProgram, path: Path, metadata: ExportMetadata) -> None:
        [example], _ = program.example_inputs
        with without_messages():
            import litert_torch

            named = _Named(program.module(), metadata.output)
            litert_torch.convert(named, sample_kwargs={"images": example}).export(str(path))
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(METADATA_FILE, json.dumps(metadata.to_strings()))
            if metadata.class_names is not None:
                archive.writestr("labels.txt", "".join(f"{name}\n" for name in metadata.class_names))


class _Named(nn.Module):
    """A program with names for its input and output, which the signature takes from a forward."""

    def __init__(self, program: nn.Module, output: str) -> None:
        super().__init__()
        self.program, self.output = program, output

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {self.output: self.program(images)}
