"""`localvit export`: a model as a file for other runtimes, with proof that it computes the same."""

import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from PIL import Image

from localvit.data.folders import PathImages
from localvit.data.images import load_image
from localvit.data.preprocessing import Preprocessing
from localvit.exporters import FORMATS, Format, Int8, ProofError, export
from localvit.inference.runner import LoadedModel, is_checkpoint_path, load_model
from localvit_cli import UsageError
from localvit_cli.eval import image_size
from localvit_cli.tyro_rules import optional

logger = logging.getLogger(__name__)

_DYNAMIC = "batch; none for formats that take one image"
_PROOF_IMAGES = 5
"""How many of the given images are run; the largest batch of the proof."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a model as a file for other runtimes, and run it beside the model.

    The report is printed, and kept as FILE.json.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A checkpoint file, or a model's name (downloads its released weights, unless --checkpoint is given)."""
    format: Literal["onnx", "openvino", "pt2", "executorch", "litert", "coreml"] = "onnx"
    """ONNX, OpenVINO's IR (.xml and .bin), a program of torch.export, of ExecuTorch (.pte) or of LiteRT (.tflite), or a
    package of Core ML (.mlpackage, a folder), which is run beside the model on macOS only."""
    output: Annotated[Path | None, optional("FILE", "the checkpoint's or model's name with the format's suffix")] = None
    """File to write."""
    dynamic: Annotated[Literal["none", "batch", "size"] | None, optional("", _DYNAMIC)] = None
    """What the input leaves open: nothing, the number of images, or number and size of the images."""
    include: Annotated[str | None, optional("PARTS", "preprocessing,softmax")] = None
    """What the file does itself, with commas between: preprocessing (scale and normalize), softmax. resize adds
    resizing and cropping, so that images of any size go in."""
    raw: bool = False
    """Include nothing: normalized images go in, and logits come out."""
    input_type: Literal["uint8", "float32"] = "uint8"
    """uint8 for RGB from 0 to 255, float32 for RGB from 0 to 1."""
    precision: Literal["float32", "float16"] = "float32"
    """float16 stores the weights in half the bytes; all layers still compute in float32."""
    opset: Annotated[int | None, optional("N", "20")] = None
    """Version of ONNX's operators."""
    fuse: Annotated[bool | None, optional("", "what the format's runtime runs faster")] = None
    """Export the fused model, or the model as it was trained."""
    checkpoint: Annotated[Path | None, optional("FILE")] = None
    """Weights for the named model."""
    weights: Literal["raw", "ema"] = "raw"
    """Use the raw or the averaged (EMA) weights of a checkpoint."""
    input_size: Annotated[tuple[int, ...], optional("PIXELS...", "the model's own")] = ()
    """Side of the input, or its height and width, in pixels."""
    images: Annotated[Path | None, optional("PATH", "drawn images")] = None
    """Images, or a folder of them, for the proof; with --int8, those without labels that it is checked on."""
    int8: bool = False
    """Quantize to int8 after training, if that costs little: smaller, and faster where the processor has int8."""
    calibrate: Annotated[Path | None, optional("DIR")] = None
    """Training images, without which int8 is not possible; 300 of them are used."""
    data_path: Annotated[Path | None, optional("DIR", "images of --images, or of --calibrate, without labels")] = None
    """Held-out images for --int8, in a folder per class."""
    max_drop: Annotated[float | None, optional("POINTS", "0.5")] = None
    """How much Acc@1 may drop with --int8, in points (percent); otherwise the file is deleted."""

    def run(self) -> None:
        """Export and print the report."""
        settings = self._settings()
        output = self.output or Path(f"{self._stem()}{settings.suffix}")
        if output.suffix != settings.suffix:
            raise UsageError(f"--output {output} must end in {settings.suffix}, as --format {self.format} writes it")
        try:
            settings.check_installed()
        except ImportError as error:
            raise ImportError(f"--format {self.format}: {error}") from error
        size = image_size(self.input_size)
        loaded = load_model(self.model, checkpoint=self.checkpoint, weights=self.weights, input_size=size)
        file = self.checkpoint or (Path(self.model) if is_checkpoint_path(self.model) else None)
        try:
            report = export(loaded, output, settings, checkpoint=file, images=self._images(loaded, settings))
        except ProofError as error:
            print(error.report, flush=True)
            raise
        print(report, flush=True)
        logger.info(f"report: {report.report_path}")

    def _settings(self) -> Format:
        """The format with its options. Raises UsageError for options that it does not have or that contradict."""
        if self.raw and self.include is not None:
            raise UsageError("--raw includes nothing: leave out --include, or --raw")
        options: dict[str, Any] = {"include": self._include(), "input_type": self.input_type}
        options["precision"] = self.precision
        options["int8"] = self._int8()
        own = FORMATS[self.format]
        known = {each.name for each in fields(own)}
        for name in ("dynamic", "opset", "fuse"):
            if (value := getattr(self, name)) is not None:
                if name not in known:
                    raise UsageError(f"--{name} has no effect with --format {self.format}: leave it out")
                options[name] = value
        try:
            return own(**options)
        except ValueError as error:
            raise UsageError(str(error)) from error

    def _int8(self) -> Int8 | None:
        """Raises UsageError for options that belong together and were not given together."""
        if not self.int8:
            for name in ("calibrate", "data_path", "max_drop"):
                if getattr(self, name) is not None:
                    raise UsageError(f"--{name.replace('_', '-')} belongs to --int8: add --int8, or leave it out")
            return None
        if self.calibrate is None:
            raise UsageError("--int8 needs --calibrate DIR, a folder of training images")
        drop = {} if self.max_drop is None else {"max_drop": self.max_drop}
        try:
            return Int8(calibrate=self.calibrate, data_path=self.data_path, images=self.images, **drop)
        except ValueError as error:
            raise UsageError(f"--max-drop: {error}") from error

    def _include(self) -> tuple[str, ...]:
        if self.raw:
            return ()
        named = [part.strip() for part in (self.include or "").split(",") if part.strip()]
        if self.include is not None and not named:
            raise UsageError("--include names nothing; --raw includes nothing")
        return tuple(named) if set(named) - {"resize"} else ("preprocessing", "softmax", *named)

    def _stem(self) -> Path:
        return Path(self.model).with_suffix("") if is_checkpoint_path(self.model) else Path(self.model)

    def _images(self, loaded: LoadedModel, settings: Format) -> list[np.ndarray]:
        """The first images of the folder, prepared as far as the file does not do it: uint8 (3, H, W)."""
        if self.images is None:
            return []
        paths = PathImages([str(self.images)])
        images = [load_image(paths, index) for index in range(min(_PROOF_IMAGES, len(paths)))]
        if "resize" in settings.parts:
            return [_pixels(image) for image in images]
        shown = loaded.preprocessing
        plain = Preprocessing.from_dict(shown.to_dict() | {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}).transform()
        return [plain(image).mul(255).round().byte().numpy() for image in images]


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)
