"""The proof: the file runs in its runtime beside the model, on the same images.

The model is the one that was given, not fused and prepared as evaluation prepares it, so that the comparison covers
everything that the file does itself.

Shapes: B batch, H and W height and width in pixels, M classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from localvit.data.preprocessing import Preprocessing
from localvit.exporters.graph import logits_of
from localvit.exporters.registry import Format
from localvit.exporters.report import ExportReport, ProofCase
from localvit.inference.export_metadata import ExportMetadata
from localvit.inference.exported import ExportedModel

LEAST_SCALE = 1e-2
"""Logits smaller than this are compared with it, because a head of zeros has no largest logit."""
LEAST_PROBABILITY = 1e-30
"""Below it, float32 cannot hold probabilities precisely, so their logarithms are not compared."""
STEPS = (32, 14, 24, 20, 18, 16, 8, 4, 1)
"""By how many pixels images may grow, tried in this order; most models take multiples of one of them."""


class ProofError(RuntimeError):
    """The file does not compute what the model computes, and was deleted. `report` says what it computed."""

    def __init__(self, message: str, report: ExportReport) -> None:
        super().__init__(message)
        self.report = report


def size_step(model: nn.Module, size: tuple[int, int]) -> int:
    """By how many pixels the height and width of the model's images may change.

    Raises ValueError if the model takes images of one size only.
    """
    for step in STEPS:
        try:
            with torch.inference_mode():
                model(torch.zeros(1, 3, size[0] + step, size[1] + 2 * step))
        except (AssertionError, ValueError, RuntimeError):  # whatever a model raises for a size that it does not take
            continue
        return step
    raise ValueError(
        f"{type(model).__name__} takes images of {size[0]} x {size[1]} pixels only: make it with "
        "dynamic_img_size=True, or export it with another dynamic than size"
    )


def proof_shapes(settings: Format, size: tuple[int, int], step: int) -> list[tuple[int, int, int]]:
    """Batch, height and width of what the proof runs: the open sides at other values, one of them not square."""
    height, width = size
    shapes = [(1, height, width)]
    if settings.dynamic != "none":
        shapes.append((5, height, width))
    batch = 1 if settings.dynamic == "none" else 2
    if "resize" in settings.parts:
        return [(number, 2 * height + 3, 3 * width) for number, _, _ in shapes] + [
            (batch, height, width),
            (1, 4 * height + 11, height + 5),
            (1, height // 2 + 1, width),
        ]
    if settings.dynamic == "size":
        smaller = (height - step, width - step) if min(size) > 2 * step else (height + 3 * step, width + 3 * step)
        shapes += [
            (1, height + 2 * step, width + 2 * step),
            (batch, *smaller),
            (batch, height + step, width + 3 * step),
        ]
    return shapes


def drawn_images(batch: int, height: int, width: int) -> np.ndarray:
    """Random images (B, 3, H, W), uint8: large shapes of random colors, and noise."""
    generator = torch.Generator().manual_seed(1_000_003 * batch + 1009 * height + width)
    shapes = torch.rand(batch, 3, 5, 7, generator=generator)
    images = F.interpolate(shapes, size=(height, width), mode="bicubic", align_corners=False)
    images = images + 0.1 * torch.randn(batch, 3, height, width, generator=generator)
    return images.mul(255).round().clamp(0, 255).byte().numpy()


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The model, and how evaluation prepares its images."""

    model: nn.Module
    preprocessing: Preprocessing

    def prepared(self, images_BCHW: np.ndarray, metadata: ExportMetadata) -> Tensor:
        """The model's input: resized and cropped by PIL where the file does it, and normalized."""
        if "resize" in metadata.in_graph:
            transform = self.preprocessing.transform()
            return torch.stack([transform(Image.fromarray(image.transpose(1, 2, 0))) for image in images_BCHW])
        return self.preprocessing.normalized(torch.from_numpy(images_BCHW))

    @torch.inference_mode()
    def logits(self, prepared_BCHW: Tensor) -> Tensor:
        """Its logits (B, M)."""
        return logits_of(self.model(prepared_BCHW)).float()


def prove(
    exported: ExportedModel, reference: Reference, shapes: Sequence[tuple[int, int, int]], images: Sequence[np.ndarray]
) -> Iterator[ProofCase]:
    """Run the file beside the model.

    Args:
        exported: the file.
        reference: the model.
        shapes: batch, height and width of each case.
        images: real images (3, H, W), uint8, used for cases of their size; the others are drawn.
    """
    for batch, height, width in shapes:
        batch_BCHW = _images_of(images, batch, height, width)
        prepared = reference.prepared(batch_BCHW, exported.metadata)
        whole = "resize" in exported.metadata.in_graph
        given = exported.as_input(torch.from_numpy(batch_BCHW) if whole else prepared)
        yield compare(
            exported.logits(exported.run(given)), reference.logits(prepared), (batch, height, width), exported.metadata
        )


def compare(found_BM: Tensor, expected_BM: Tensor, shape: tuple[int, int, int], metadata: ExportMetadata) -> ProofCase:
    """The errors of logits."""
    agreement = (found_BM.argmax(1) == expected_BM.argmax(1)).double().mean().item()
    found_BM, expected_BM = comparable(found_BM, expected_BM, metadata)
    error = (found_BM - expected_BM).abs().nan_to_num(nan=float("inf")).max().item()
    scale = max(expected_BM.abs().max().item(), LEAST_SCALE)
    batch, height, width = shape
    return ProofCase(
        batch=batch, height=height, width=width, max_abs=error, max_rel=error / scale, top1_agreement=agreement
    )


def comparable(found_BM: Tensor, expected_BM: Tensor, metadata: ExportMetadata) -> tuple[Tensor, Tensor]:
    """Both logits in float64, zero where they cannot be compared.

    Those that come from probabilities are known up to a constant, so both are centered.
    """
    found_BM, expected_BM = found_BM.double(), expected_BM.double()
    if metadata.output != "probabilities":
        return found_BM, expected_BM
    counts = (expected_BM / metadata.temperature).log_softmax(1) > np.log(LEAST_PROBABILITY)
    found_BM, expected_BM = (_centered(logits, counts).masked_fill(~counts, 0) for logits in (found_BM, expected_BM))
    return found_BM, expected_BM


def _centered(logits_BM: Tensor, counts_BM: Tensor) -> Tensor:
    mean_B1 = logits_BM.masked_fill(~counts_BM, 0).sum(1, keepdim=True) / counts_BM.sum(1, keepdim=True)
    return logits_BM - mean_B1


def _images_of(images: Sequence[np.ndarray], batch: int, height: int, width: int) -> np.ndarray:
    fitting = [image for image in images if image.shape[1:] == (height, width)]
    if not fitting:
        return drawn_images(batch, height, width)
    return np.stack([fitting[index % len(fitting)] for index in range(batch)])
