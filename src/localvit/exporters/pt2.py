"""torch.export's own programs (.pt2), for torch without the model's code: metadata in an extra file of the archive."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch.export import ExportedProgram

from localvit.exporters.registry import Format, register
from localvit.inference.export_metadata import ExportMetadata
from localvit.inference.quiet import quiet
from localvit.inference.runtimes import METADATA_FILE


@register
@dataclass(frozen=True, kw_only=True)
class TorchExport(Format):
    """Options of a .pt2 file."""

    fuse: bool = True
    """Export the graph of `localvit.fuse`, which torch runs faster."""

    name: ClassVar[str] = "pt2"
    suffix: ClassVar[str] = ".pt2"

    def write(self, program: ExportedProgram, path: Path, metadata: ExportMetadata) -> None:
        with quiet():
            torch.export.save(program, path, extra_files={METADATA_FILE: json.dumps(metadata.to_strings())})
