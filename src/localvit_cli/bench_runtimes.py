"""`localvit bench --runtime`: models prepared in several runtimes, by exporting them to temporary files."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from localvit.bench.prepare import BenchModel, BenchOptions, load, of_exported, prepare, prepare_exported
from localvit.exporters import CoreML, ExecuTorch, Format, LiteRT, Onnx, OpenVINO, export
from localvit.inference.exported import ExportedModel, is_exported_path
from localvit.inference.runtimes import OpenVINORuntime, openvino_core
from localvit_cli import UsageError

logger = logging.getLogger(__name__)

RUNTIMES = (
    "torch",
    "torch-compile",
    "onnxruntime",
    "onnxruntime-int8",
    "openvino",
    "openvino-bfloat16",
    "openvino-int8",
    "executorch",
    "coreml",
    "litert",
)
"""What `--runtime` takes."""
_FORMATS: dict[str, type[Format]] = {
    "onnxruntime": Onnx,
    "openvino": OpenVINO,
    "executorch": ExecuTorch,
    "coreml": CoreML,
    "litert": LiteRT,
}
_SUFFIXES = {kind.suffix: runtime for runtime, kind in _FORMATS.items()}
_CALIBRATION_IMAGES = 8  # of noise: the speed does not depend on the ranges


def parse_runtimes(text: str) -> list[str]:
    """The runtimes of `--runtime`. Raises UsageError for one that does not exist."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if unknown := [name for name in names if name not in RUNTIMES]:
        raise UsageError(f"--runtime {unknown[0]} is not known: choose from {', '.join(RUNTIMES)}")
    if not names:
        raise UsageError(f"--runtime names nothing: choose from {', '.join(RUNTIMES)}")
    return names


def prepare_all(
    names: Sequence[str],
    baseline: str | None,
    runtimes: Sequence[str],
    options: BenchOptions,
    size: tuple[int, int] | None,
    folder: Path,
) -> list[BenchModel]:
    """Every model in every runtime, and exported files in theirs; the baseline in all of these, once.

    Exported files are written to `folder`, each with its proof.

    Raises:
        ValueError, ProofError: If a model cannot run in a runtime, or a runtime not on this machine.
    """
    if any(runtime not in ("torch", "torch-compile") for runtime in runtimes):
        _check(options)
    if "openvino-bfloat16" in runtimes:
        _check_bfloat16()
    models: list[BenchModel] = []
    needed: list[str] = []
    for name in dict.fromkeys((*names, *([] if baseline is None else [baseline]))):
        if is_exported_path(name):
            if size is not None:
                raise UsageError(f"--input-size has no effect on {name}, an exported file: leave it out")
            model = prepare_exported(Path(name), options)
            is_int8 = model.module.metadata.precision == "int8"
            needed.append(_SUFFIXES[Path(name).suffix] + ("-int8" if is_int8 else ""))
            models.append(model)
        else:
            needed += runtimes if name in names else []
            wanted = runtimes if name in names else list(dict.fromkeys(needed))
            models += _in_runtimes(name, wanted, options, size, folder)
    return models


def _check(options: BenchOptions) -> None:
    if options.train or options.device.type != "cpu":
        raise UsageError("--runtime: other runtimes than torch run inference on the CPU: add --device cpu, not --train")


def _check_bfloat16() -> None:
    """Raise ValueError for a processor without it, where OpenVINO would compute in float32 and not say so."""
    OpenVINO().check_installed()
    if "BF16" not in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise ValueError(
            "openvino-bfloat16 cannot be measured, as this processor has no bfloat16: leave it out of --runtime"
        )


def _in_runtimes(
    name: str, runtimes: Sequence[str], options: BenchOptions, size: tuple[int, int] | None, folder: Path
) -> Iterator[BenchModel]:
    plain = prepare(name, options, size)
    exports = _Exports(name, size, folder)
    for runtime in runtimes:
        if runtime == "torch":
            yield plain
        elif runtime == "torch-compile":
            compiled = prepare(name, replace(options, compile=True), size)
            yield replace(compiled, runtime="torch, compiled")
        else:
            logger.info(f"{name}: exporting for {runtime}")
            model = of_exported(name, exports.open(runtime), options)
            shown = f"{model.runtime} bfloat16" if runtime == "openvino-bfloat16" else model.runtime
            yield replace(plain, runtime=shown, module=model.module)


class _Exports:
    """The files of one model, each written when it is first needed."""

    def __init__(self, name: str, size: tuple[int, int] | None, folder: Path) -> None:
        self.loaded = load(name, size)
        self.folder = folder / name.replace("/", "-")

    def open(self, runtime: str) -> ExportedModel:
        kind, _, precision = runtime.partition("-")
        path, settings = self._float32(kind)
        if precision == "int8":
            path = self._int8(path, settings)
        exported = ExportedModel.open(path)
        if precision == "bfloat16":
            own = OpenVINORuntime(path, precision="bf16")
            exported = ExportedModel(path, own, exported.metadata)
        return exported

    def _float32(self, kind: str) -> tuple[Path, Format]:
        settings = _FORMATS[kind](include=())
        path = self.folder / f"model{settings.suffix}"
        if not path.exists():
            export(self.loaded, path, settings)
        return path, settings

    def _int8(self, float32: Path, settings: Format) -> Path:
        """Quantized without a check: models by name have random weights, which have no accuracy to lose."""
        path = self.folder / "int8" / float32.name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            metadata = ExportedModel.open(float32).metadata
            height, width = metadata.preprocessing.input_size
            noise = np.random.default_rng(0).standard_normal((_CALIBRATION_IMAGES, 1, 3, height, width), np.float32)
            settings.write_int8(float32, path, list(noise), metadata)
        return path
