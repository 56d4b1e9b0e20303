"""What an export made, and how its output compares with the model's."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from localvit.utils.tables import format_table


@dataclass(frozen=True, kw_only=True)
class ProofCase:
    """The file and the model on one batch of images of one size."""

    batch: int
    height: int
    width: int
    max_abs: float
    """Largest absolute error of a logit."""
    max_rel: float
    """The same, relative to the largest logit of the model."""
    top1_agreement: float
    """Share of the images with the same top class, from 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Int8Speed:
    """Images per second of both files, measured in turn."""

    batch: int
    float32: float
    int8: float


@dataclass(frozen=True, kw_only=True)
class Int8Comparison:
    """A quantized file beside the float32 file that it was made from, in the same runtime."""

    images: str
    """How many images of what both ran on."""
    calibration: str
    """How many images of what it was calibrated with."""
    max_drop: float
    """How many points of Acc@1 it may lose; without labels, other limits apply."""
    acc1_float32: float | None
    """Top-1 accuracy in percent, if the images have labels."""
    acc1_int8: float | None
    drop_standard_error: float | None
    """Of the difference of both, in points."""
    top1_agreement: float
    """Share of the images with the same top class, from 0 to 1."""
    rms_error: float
    """Root mean square of the errors of logits, relative to that of the float32 logits."""
    bytes_float32: int
    bytes_int8: int
    speeds: list[Int8Speed]

    @property
    def drop(self) -> float | None:
        """How many points of Acc@1 are lost; None without labels."""
        if self.acc1_float32 is None or self.acc1_int8 is None:
            return None
        return self.acc1_float32 - self.acc1_int8

    def __str__(self) -> str:
        rows = [("size", f"{self.bytes_float32 / 1e6:.1f} MB", f"{self.bytes_int8 / 1e6:.1f} MB")]
        rows += [(f"images/s, batch {each.batch}", f"{each.float32:.1f}", f"{each.int8:.1f}") for each in self.speeds]
        if self.drop is not None:
            rows.append(("Acc@1", f"{self.acc1_float32:.2f}", f"{self.acc1_int8:.2f}"))
            rows.append(("drop, points", "", f"{self.drop:.2f} ± {self.drop_standard_error:.2f}"))
        rows += [("same top class", "", f"{self.top1_agreement:.1%}"), ("error of logits", "", f"{self.rms_error:.3f}")]
        return "\n".join(
            (
                format_table(rows, headings=("", "float32", "int8"), right=(1, 2)),
                "",
                f"on {self.images}; calibrated with {self.calibration}",
            )
        )


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """An exported file, and the proof that it computes what the model computes."""

    path: Path
    format: str
    runtime: str
    """Name and version of the file's runtime."""
    bytes: int
    """Size of all its files."""
    sha256: str
    """Hash of the file, or of the lines that `sha256sum` prints for the files of a folder."""
    fused: bool
    settings: dict[str, Any]
    """The options of the format."""
    tolerance: float
    """The largest relative error of a file that is kept."""
    images: str
    """Which images it was run on."""
    cases: list[ProofCase]
    notes: list[str] = field(default_factory=list)
    """What else is to be known, such as the error at the runtime's default precision."""
    not_run: str = ""
    """Why the file was not run beside the model, or nothing. Then there are no `cases`, and nothing is proven."""
    int8: Int8Comparison | None = None
    """How the file compares with the float32 file, whose proof `cases` are."""

    @property
    def report_path(self) -> Path:
        """Where the report is kept, beside the file."""
        return self.path.with_name(f"{self.path.name}.json")

    @property
    def max_abs(self) -> float | None:
        """The largest absolute error of a logit; None for a file that was not run."""
        return max((case.max_abs for case in self.cases), default=None)

    @property
    def max_rel(self) -> float | None:
        """The largest relative error of a logit; None for a file that was not run."""
        return max((case.max_rel for case in self.cases), default=None)

    @property
    def top1_agreement(self) -> float | None:
        """Share of all images with the same top class, from 0 to 1; None for a file that was not run."""
        if not self.cases:
            return None
        return sum(case.batch * case.top1_agreement for case in self.cases) / sum(case.batch for case in self.cases)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        totals = {"max_abs": self.max_abs, "max_rel": self.max_rel, "top1_agreement": self.top1_agreement}
        values = asdict(self) | {"path": str(self.path)} | totals
        if self.int8 is not None:
            values["int8"]["drop"] = self.int8.drop
        return values

    def to_json(self) -> str:
        """The report as it is kept beside the file."""
        return json.dumps(self.to_dict(), indent=2, default=str) + "\n"

    def __str__(self) -> str:
        written = f"{self.path}: {self.format}, {self.bytes / 1e6:.1f} MB"
        if self.not_run:
            return "\n".join(
                (
                    f"{written}, converted and NOT run beside the model: {self.not_run}",
                    f"for {self.runtime}; nothing is proven until it has run there beside the model",
                    *self.notes,
                )
            )
        rows = [
            (
                f"{case.batch} x {case.height} x {case.width}",
                f"{case.max_abs:.2e}",
                f"{case.max_rel:.2e}",
                f"{100 * case.top1_agreement:.0f} %",
            )
            for case in self.cases
        ]
        headings = ("images", "max abs error", "relative", "same top class")
        lines = [
            f"{written}, run by {self.runtime} beside the model",
            "",
            format_table(rows, headings=headings, right=(1, 2, 3)),
            "",
            f"logits on {self.images}; the limit is {self.tolerance:.0e} relative to the largest logit",
            *self.notes,
        ]
        if self.int8 is not None:
            lines += ["", "that was the float32 file; quantized from it:", str(self.int8)]
        return "\n".join(lines)
