"""ExecuTorch programs (.pte), for phones and embedded devices: one file, with the parts that XNNPACK computes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch.export import ExportedProgram

from localvit.exporters.registry import Format, register
from localvit.inference.export_metadata import Dynamic, ExportMetadata
from localvit.inference.quiet import without_messages
from localvit.inference.runtimes import METADATA_METHOD


@register
@dataclass(frozen=True, kw_only=True)
class ExecuTorch(Format):
    """Options of an ExecuTorch file: one image of one size, for which its memory is planned when it is written.

    The metadata is what the file's method `localvit` returns, as JSON. Every language that runs the file can call it.
    """

    dynamic: Dynamic = "none"
    """Only `none`: the file takes one image."""

    name: ClassVar[str] = "executorch"
    suffix: ClassVar[str] = ".pte"
    requires: ClassVar[tuple[str, ...]] = ("executorch.exir", "executorch.runtime")
    extra: ClassVar[str] = "executorch"
    opens_sides: ClassVar[bool] = False

    def check_installed(self) -> None:
        with without_messages():
            super().check_installed()

    def write(self, program: ExportedProgram, path: Path, metadata: ExportMetadata) -> None:
        with without_messages():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower

            lowered = to_edge_transform_and_lower(
                {"forward": program},
                partitioner=[XnnpackPartitioner()],
                constant_methods={METADATA_METHOD: json.dumps(metadata.to_strings())},
            )
            path.write_bytes(lowered.to_executorch().buffer)
