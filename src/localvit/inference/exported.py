"""Exported files as models: they take the images and return the logits that any model of this package does.

Shapes: B batch, H and W height and width in pixels, M classes of the model.
"""

from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from localvit.inference.export_metadata import ExportMetadata
from localvit.inference.runtimes import RUNTIMES, Runtime
from localvit.utils.weight_files import CheckpointError

SMALLEST = float(np.finfo(np.float32).tiny)
"""The least probability whose logarithm is taken; a smaller one would be minus infinity."""


def is_exported_path(source: str | Path) -> bool:
    """Whether `source` means an exported file, existing or not."""
    return Path(source).suffix in RUNTIMES


class ExportedModel(nn.Module):
    """A module that runs an exported file in its runtime, on the CPU.

    It takes images (B, 3, H, W) prepared by its preprocessing, and returns logits (B, M). The logarithm of
    probabilities is logits, up to a constant per image, which neither probabilities nor losses depend on, and divided
    by the temperature, if the model has one.
    """

    def __init__(self, path: Path, runtime: Runtime, metadata: ExportMetadata) -> None:
        super().__init__()
        self.path, self.runtime, self.metadata = path, runtime, metadata
        self.num_classes = metadata.num_classes
        mean, std = (
            torch.tensor(each).view(3, 1, 1) for each in (metadata.preprocessing.mean, metadata.preprocessing.std)
        )
        self._mean, self._std = mean, std
        self.eval()

    @classmethod
    def open(cls, path: Path, *, trusted: bool = False) -> Self:
        """Load a file; one that may run code when it is read only if it is `trusted`, as a file just written.

        Raises FileNotFoundError if there is no such file, CheckpointError if it is damaged, not one of this package or
        not to be trusted, and ImportError if its runtime is not installed.
        """
        kind = RUNTIMES[path.suffix]
        if not path.exists():
            raise FileNotFoundError(f"no exported file at {path}")
        if path.is_dir() and not kind.is_folder:
            raise CheckpointError(f"{path} is a folder: give the path of the exported file")
        if kind.is_folder and not path.is_dir():
            raise CheckpointError(f"{path} is a file, and {path.suffix} is a folder: export it again")
        if kind.runs_code and not trusted:
            raise CheckpointError(
                f"{path} is not opened: torch unpickles {path.suffix} files, which can run code. Give the checkpoint "
                "or the model as .onnx; if you trust the file, call torch.export.load yourself"
            )
        runtime = kind(path)
        return cls(path, runtime, ExportMetadata.from_strings(path, runtime.metadata))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, M) in float32 on the CPU."""
        return self.logits(self.run(self.as_input(images_BCHW.cpu())))

    def as_input(self, images_BCHW: Tensor) -> np.ndarray:
        """The file's input for prepared images: normalized ones, or whole ones if the file resizes itself."""
        if "resize" not in self.metadata.in_graph and "preprocessing" in self.metadata.in_graph:
            images_BCHW = (images_BCHW * self._std + self._mean).mul(255).round().clamp(0, 255).byte()
        if self.metadata.input_type == "uint8" or images_BCHW.is_floating_point():
            return images_BCHW.contiguous().numpy()
        return images_BCHW.float().div(255).numpy()

    def run(self, input_BCHW: np.ndarray) -> np.ndarray:
        """The file's output, for any number of images: where its batch size is fixed, in several calls.

        Raises RuntimeError on a machine that cannot run it.
        """
        self.check_runs_here()
        size = self.runtime.input_shape[0]
        if size is None or len(input_BCHW) == size:
            return self._checked(self.runtime.run(input_BCHW), len(input_BCHW))
        outputs = []
        for start in range(0, len(input_BCHW), size):
            part = input_BCHW[start : start + size]
            filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            outputs.append(self._checked(self.runtime.run(filled), size)[: len(part)])
        return np.concatenate(outputs)

    def logits(self, output_BM: np.ndarray) -> Tensor:
        """Logits, in float32, of the file's output."""
        output = torch.from_numpy(np.ascontiguousarray(output_BM)).float()
        if "softmax" not in self.metadata.in_graph:
            return output
        return output.clamp_min(SMALLEST).log() * self.metadata.temperature

    def check_runs_here(self) -> None:
        """Raise RuntimeError if this machine can read the file and not run it."""
        if self.runtime.cannot_run:
            raise RuntimeError(f"{self.path} cannot be run here: {self.runtime.cannot_run}")

    def _checked(self, output_BM: np.ndarray, batch: int) -> np.ndarray:
        if output_BM.shape != (batch, self.num_classes):
            raise CheckpointError(
                f"{self.path} returns an output of shape {output_BM.shape} for {batch} images, and its metadata say "
                f"{self.num_classes} classes: export the checkpoint again"
            )
        return output_BM
