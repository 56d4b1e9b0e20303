"""`localvit.export`: trace, write, run, compare; only then does the file get its name."""

import logging
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn

from localvit.checkpoints import versions
from localvit.data.preprocessing import Preprocessing
from localvit.exporters.graph import build_graph, logits_of, plain_copy, trace
from localvit.exporters.int8_gate import quantize_with_proof
from localvit.exporters.onnx import Onnx
from localvit.exporters.proof import ProofError, Reference, proof_shapes, prove, size_step
from localvit.exporters.registry import Format
from localvit.exporters.report import ExportReport
from localvit.exporters.source import Source, source_of
from localvit.inference.export_metadata import ExportMetadata
from localvit.inference.exported import ExportedModel
from localvit.inference.runner import LoadedModel
from localvit.utils.files import atomic_write, check_writable, put_in_place, sha256_of, size_of

logger = logging.getLogger(__name__)


def export(
    model: str | Path | nn.Module | LoadedModel,
    path: str | Path,
    settings: Format | None = None,
    *,
    class_names: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    checkpoint: Path | None = None,
    images: Sequence[np.ndarray] = (),
) -> ExportReport:
    """Write a classifier as a file that other runtimes execute, and prove that it computes the same.

    The file carries its class names, preprocessing and origin. It is loaded in its runtime and run beside the model;
    only if every error is below the format's tolerance does it get its name. `report_path` beside it keeps the report.
    On a machine that cannot run the format, the file is kept without proof, and the report says `not_run`.

    Args:
        model: a checkpoint file, a model's name (with its released weights), the result of `load_model`, or a module,
            on any device. It stays as it is.
        path: the file to write, or the folder of a format whose files are folders. What is there stays if the export
            fails.
        settings: the format and its options, such as `Onnx(dynamic="size")`; by default `Onnx()`.
        class_names: names of the classes, by default those of the checkpoint or the model.
        preprocessing: by default that of the checkpoint or the model.
        checkpoint: the file that a `LoadedModel` was loaded from.
        images: real images (3, H, W), uint8 RGB, for the proof; images of other sizes than these are drawn.

    Returns:
        The report.

    Raises:
        ProofError: if the file computes something else, or loses too much in int8. It is deleted.
        ImportError: if the format's packages are missing, with what to install.
        ValueError: if the model cannot be traced, has no preprocessing, or does not take what `settings` ask for.
        DataError, UnreadableImage: if the images for int8 cannot be used.
        OSError: if the file cannot be written.
    """
    settings, path = settings or Onnx(), Path(path)
    if path.suffix != settings.suffix:
        raise ValueError(f"{path} would be read as another format: let its name end in {settings.suffix}")
    settings.check_installed()
    check_writable(path, folder=settings.is_folder)
    if settings.int8 is not None:
        settings.int8.check_folders()
    source = source_of(model, class_names, preprocessing, checkpoint)
    reference = Reference(model=plain_copy(source.model), preprocessing=source.preprocessing)
    size = source.preprocessing.input_size
    num_classes = _num_classes(reference, size, source.class_names)
    step = size_step(reference.model, size) if settings.dynamic == "size" else 0
    metadata = _metadata(source, settings, num_classes)
    graph = build_graph(plain_copy(source.model), source.preprocessing, settings)
    graph.temperature = metadata.temperature
    logger.info(f"tracing {source.description}")
    program = trace(graph, settings, size, step)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        written = _subfolder(folder, "float32") / path.name
        settings.write(program, written, metadata)
        logger.info("running the file beside the model")
        shapes = proof_shapes(settings, size, step)
        if "resize" in settings.parts:
            shapes += [(1, *image.shape[1:]) for image in images]
        report = _prove(written, path, settings, reference, shapes, images)
        if settings.int8 is not None:
            logger.info("quantizing to int8, and comparing it with float32")
            float32, written = written, _subfolder(folder, "int8") / path.name
            report = quantize_with_proof(float32, written, settings, report)
        _keep(settings, written, path, report)
    return report


def _subfolder(folder: str, name: str) -> Path:
    path = Path(folder) / name
    path.mkdir()
    return path


def _num_classes(reference: Reference, size: tuple[int, int], class_names: Sequence[str] | None) -> int:
    """The classes of the model's logits. Raises ValueError if the names are not as many."""
    with torch.inference_mode():
        num_classes = logits_of(reference.model(torch.zeros(1, 3, *size))).shape[1]
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(f"{len(class_names)} class names for a model of {num_classes} classes")
    return num_classes


def _metadata(source: Source, settings: Format, num_classes: int) -> ExportMetadata:
    return ExportMetadata(
        architecture=source.name,
        num_classes=num_classes,
        class_names=source.class_names,
        preprocessing=source.preprocessing,
        input_type=settings.input_type if "preprocessing" in settings.parts else "float32",
        in_graph=settings.parts,
        dynamic=settings.dynamic,
        precision=settings.precision,
        arguments=source.arguments,
        weights=source.weights,
        source=source.description,
        source_sha256=source.sha256,
        versions=versions(),
        about=source.about,
    )


def _prove(
    written: Path,
    path: Path,
    settings: Format,
    reference: Reference,
    shapes: Sequence[tuple[int, int, int]],
    images: Sequence[np.ndarray],
) -> ExportReport:
    """The report on a file that was written and has no name yet. Raises ProofError for one that is wrong."""
    exported = ExportedModel.open(written, trusted=True)
    not_run = exported.runtime.cannot_run
    cases = [] if not_run else list(prove(exported, reference, shapes, images))
    report = ExportReport(
        path=path,
        format=settings.name,
        runtime=exported.runtime.name,
        bytes=sum(map(size_of, settings.files(written))),
        sha256=sha256_of(written),
        fused=settings.fuse,
        settings=asdict(settings),
        tolerance=settings.tolerance,
        images=f"{len(images)} given images, others drawn" if len(images) else "drawn images",
        cases=cases,
        notes=_notes(written, settings, exported, reference, shapes),
        not_run=not_run,
    )
    worst = max(cases, key=lambda case: case.max_rel, default=None)
    if worst is not None and not worst.max_rel <= settings.tolerance:
        raise ProofError(
            f"{path} was not written: {exported.runtime.name} computes logits that differ from the model's by "
            f"{worst.max_rel:.1e} of the largest one ({worst.batch} images of {worst.height} x {worst.width} pixels; "
            f"the limit is {settings.tolerance:.0e})",
            report,
        )
    return report


def _notes(
    written: Path,
    settings: Format,
    exported: ExportedModel,
    reference: Reference,
    shapes: Sequence[tuple[int, int, int]],
) -> list[str]:
    """A line for each other way to run the file: its largest error."""
    notes = []
    for how, runtime in settings.other_runtimes(written):
        other = ExportedModel(written, runtime, exported.metadata)
        worst = max(case.max_rel for case in prove(other, reference, shapes, ()))
        notes.append(f"{how}: {worst:.2e} relative")
    return notes


def _keep(settings: Format, written: Path, path: Path, report: ExportReport) -> None:
    """Give the files and the report their names, in a folder that is deleted afterwards."""
    for file in reversed(settings.files(written)):  # the file itself last, so that it never lacks its weights
        if file != written:
            shutil.copymode(written, file)
        put_in_place(file, path.with_name(file.name))
    with atomic_write(report.report_path) as temporary:
        temporary.write_text(report.to_json(), encoding="utf-8")
