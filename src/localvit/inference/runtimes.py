"""Runtimes that execute exported files: each loads one format, on the CPU, and says which version it is.

Shapes: B batch, H and W height and width in pixels, M classes.
"""

import contextlib
import functools
import importlib.metadata
import io
import json
import sys
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from localvit.inference.quiet import quiet, without_messages
from localvit.utils.files import size_of
from localvit.utils.weight_files import CheckpointError


class Runtime(ABC):
    """An exported file, loaded. It raises ImportError with what to install, or CheckpointError for a damaged file."""

    name: str
    """Runtime and version, such as "ONNX Runtime 1.32.0"."""
    metadata: Mapping[str, str]
    """The texts that the file carries."""
    input_shape: tuple[int | None, ...]
    """Batch, channels, height and width that the input takes; None where it takes any."""
    runs_code: ClassVar[bool] = False
    """Whether reading a file can run code in it."""
    is_folder: ClassVar[bool] = False
    """Whether its files are folders."""
    cannot_run: str = ""
    """Why this machine can read the file and not run it, or nothing."""

    @abstractmethod
    def __init__(self, path: Path) -> None: ...

    @abstractmethod
    def run(self, images_BCHW: np.ndarray) -> np.ndarray:
        """The file's output (B, M) for its input."""


class OnnxRuntime(Runtime):
    """ONNX files, by ONNX Runtime. Files that keep their weights in other files are refused."""

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise _missing("onnxruntime", path, "onnx", error) from error
        self.name = f"ONNX Runtime {onnxruntime.__version__}"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what fails is raised
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            # Read here, so that the file cannot name others that would be opened.
            self._session = onnxruntime.InferenceSession(path.read_bytes(), options, ["CPUExecutionProvider"])
        except OSError:
            raise
        except Exception as error:  # its own types, which share no base
            raise _damaged("an ONNX", path, error) from error
        self.metadata = self._session.get_modelmeta().custom_metadata_map
        [self._input, *others] = self._session.get_inputs()
        if others:
            raise CheckpointError(f"{path} has {1 + len(others)} inputs, and an exported classifier has one")
        self.input_shape = _fixed(self._input.shape)

    def run(self, images_BCHW: np.ndarray) -> np.ndarray:
        return np.asarray(self._session.run(None, {self._input.name: images_BCHW})[0])


@functools.cache
def openvino_core() -> Any:
    """OpenVINO's `Core`, the only one of the process, and never freed.

    Its CPU plugin gives the thread that loads it a stack for signals, and frees this memory with the last `Core`. If
    that happens on another thread, the next signal (Ctrl-C, or a child process that ends) crashes the first one.
    """
    import openvino

    return openvino.Core()


class OpenVINORuntime(Runtime):
    """OpenVINO's IR (.xml, with its weights in a .bin), by OpenVINO, with the precision set to float32.

    Left to itself, OpenVINO computes in bfloat16 on processors that have it.
    """

    def __init__(self, path: Path, precision: str | None = "f32") -> None:
        try:
            import openvino
        except ImportError as error:
            raise _missing("openvino", path, "openvino", error) from error
        self.name = f"OpenVINO {openvino.__version__.partition('-')[0]}"
        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
        if precision is not None:
            settings["INFERENCE_PRECISION_HINT"] = precision
        try:
            model = openvino_core().read_model(path)
            self.metadata = _rt_info(model)
            self._compiled = openvino_core().compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise _damaged("an OpenVINO", path, error) from error
        shape = model.inputs[0].get_partial_shape()
        self.input_shape = tuple(None if side.is_dynamic else side.get_length() for side in shape)

    @property
    def precision(self) -> str:
        """The precision that it computes in, such as "f32" or "bf16"."""
        return str(self._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())

    def run(self, images_BCHW: np.ndarray) -> np.ndarray:
        return np.array(self._compiled(images_BCHW)[0])


class TorchRuntime(Runtime):
    """torch.export's programs (.pt2), by torch itself, which unpickles their weights."""

    runs_code = True

    def __init__(self, path: Path) -> None:
        self.name = f"torch {torch.__version__}"
        extra = {METADATA_FILE: ""}
        try:
            with quiet():
                self._program = torch.export.load(path, extra_files=extra)
        except OSError:
            raise
        except Exception as error:  # any type, for a damaged archive
            raise _damaged("a torch.export", path, error) from error
        self.metadata = _json_texts(path, extra[METADATA_FILE])
        self._module = self._program.module()
        self.input_shape = input_shape_of(self._program)

    @torch.inference_mode()
    def run(self, images_BCHW: np.ndarray) -> np.ndarray:
        return self._module(torch.from_numpy(images_BCHW)).numpy()


class ExecuTorchRuntime(Runtime):
    """ExecuTorch's programs (.pte), by its runtime, with XNNPACK."""

    def __init__(self, path: Path) -> None:
        try:
            with quiet():
                from executorch.runtime import Runtime as Native
                from executorch.runtime import Verification
        except ImportError as error:
            raise _missing("executorch", path, "executorch", error) from error
        contents = path.read_bytes()
        self.name = f"ExecuTorch {importlib.metadata.version('executorch')}"
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # what the runtime prints about processor and file
                # Kept, because its methods use its memory.
                self._program = Native.get().load_program(contents, verification=Verification.InternalConsistency)
                self._method = self._program.load_method("forward")
                named = METADATA_METHOD in self._program.method_names
                texts = self._program.load_method(METADATA_METHOD).execute([])[0] if named else ""
        except (RuntimeError, KeyError) as error:
            raise _damaged("an ExecuTorch", path, error) from error
        self.metadata = _json_texts(path, texts)
        self.input_shape = tuple(self._method.metadata.input_tensor_meta(0).sizes())

    def run(self, images_BCHW: np.ndarray) -> np.ndarray:
        return self._method.execute([torch.from_numpy(images_BCHW)])[0].numpy()


class CoreMLRuntime(Runtime):
    """Core ML's packages (.mlpackage), by Core ML, in float32 on the CPU: read everywhere, run on macOS only."""

    is_folder = True

    def __init__(self, path: Path) -> None:
        try:
            with without_messages():
                from coremltools.models import MLModel
        except ImportError as error:
            raise _missing("coremltools", path, "coreml", error) from error
        self.cannot_run = "" if sys.platform == "darwin" else "Core ML runs on macOS only"
        try:
            with without_messages():
                import coremltools

                units = coremltools.ComputeUnit.CPU_ONLY
                self._model = MLModel(str(path), compute_units=units, skip_model_load=bool(self.cannot_run))
            description = self._model.get_spec().description
            self.metadata = dict(description.metadata.userDefined)
            [given] = description.input
            self._image = given.type.WhichOneof("Type") == "imageType"
            size = given.type.imageType
            shape = (1, 3, size.height, size.width) if self._image else given.type.multiArrayType.shape
        except Exception as error:  # any type, for a damaged package
            raise _damaged("a Core ML", path, error) from error
        self.name = f"Core ML, specification {self._model.get_spec().specificationVersion}"
        self.input_shape = tuple(shape)
        self._input, self._probabilities = given.name, description.predictedProbabilitiesName
        self._output = self._probabilities or description.output[0].name

    def run(self, images_BCHW: np.ndarray) -> np.ndarray:
        given = Image.fromarray(images_BCHW[0].transpose(1, 2, 0)) if self._image else images_BCHW
        found = self._model.predict({self._input: given})[self._output]
        if not self._probabilities:
            return np.asarray(found)
        return np.array([[found[name] for name in json.loads(self.metadata["class_names"])]])


class LiteRTRuntime(Runtime):
    """LiteRT's programs (.tflite), by its interpreter, with XNNPACK."""

    def __init__(self, path: Path) -> None:
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise _missing("ai_edge_litert", path, "litert", error) from error
        contents = path.read_bytes()
        self.name = f"LiteRT {importlib.metadata.version('ai-edge-litert')}"
        try:
            self._interpreter = Interpreter(model_content=contents, num_threads=torch.get_num_threads())
            self._interpreter.allocate_tensors()
            [given], [output] = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        except (ValueError, RuntimeError) as error:
            raise _damaged("a LiteRT", path, error) from error
        self._input, self._output = given["index"], output["index"]
        self.metadata = _json_texts(path, _member(contents, METADATA_FILE))
        self.input_shape = tuple(map(int, given["shape"]))

    def run(self, images_BCHW: np.ndarray) -> np.ndarray:
        self._interpreter.set_tensor(self._input, np.ascontiguousarray(images_BCHW))
        self._interpreter.invoke()
        return self._interpreter.get_tensor(self._output)


METADATA_FILE = "localvit.json"
"""Name of the file with the metadata in a .pt2 archive, and in the one at the end of a .tflite file."""

METADATA_METHOD = "localvit"
"""Name of the method of a .pte file that returns the metadata."""

RUNTIMES: dict[str, type[Runtime]] = {
    ".onnx": OnnxRuntime,
    ".xml": OpenVINORuntime,
    ".pt2": TorchRuntime,
    ".pte": ExecuTorchRuntime,
    ".mlpackage": CoreMLRuntime,
    ".tflite": LiteRTRuntime,
}
"""The runtime for each suffix of exported files."""


AXES = ("batch", "channels", "height", "width")
"""Names of the input's sides."""


def input_shape_of(program: torch.export.ExportedProgram) -> tuple[int | None, ...]:
    """The sides of a traced program's only input; None for those that are open."""
    [shape] = [
        node.meta["val"].shape for node in program.graph.nodes if node.name in program.graph_signature.user_inputs
    ]
    return _fixed(shape)


def _fixed(shape: Iterable[Any]) -> tuple[int | None, ...]:
    return tuple(side if isinstance(side, int) else None for side in shape)


def _rt_info(model: Any) -> dict[str, str]:
    if not model.has_rt_info("localvit"):
        return {}
    return {key: str(value) for key, value in model.get_rt_info("localvit").value.items()}


def _member(contents: bytes, name: str) -> bytes:
    """A file of the archive at the end of `contents`; empty if there is none."""
    try:
        with zipfile.ZipFile(io.BytesIO(contents)) as archive:
            return archive.read(name)
    except (zipfile.BadZipFile, KeyError):
        return b""


def _json_texts(path: Path, text: str | bytes) -> dict[str, str]:
    try:
        texts = json.loads(text) if text else {}
    except ValueError as error:
        raise CheckpointError(f"{path} has damaged metadata ({error}): export the checkpoint again") from error
    return texts if isinstance(texts, dict) else {}


def _missing(package: str, path: Path, extra: str, error: ImportError) -> ImportError:
    return ImportError(f'running {path} needs {package} ({error}): pip install "localvit[{extra}]"')


def _damaged(kind: str, path: Path, error: Exception) -> CheckpointError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
    return CheckpointError(
        f"{path} is not {kind} file or is damaged ({size_of(path):,} bytes: {reason[:160]}); export it again"
    )
