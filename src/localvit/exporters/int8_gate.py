"""The gate of int8: the file runs beside its float32 file, and is kept only if it lost little.

Shapes: N images, B batch size, M classes.
"""

import functools
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from localvit.bench.measure import time_rounds, warm_up
from localvit.bench.prepare import BenchOptions
from localvit.exporters.int8 import Chosen, choose_images
from localvit.exporters.proof import ProofError, comparable
from localvit.exporters.registry import Format
from localvit.exporters.report import ExportReport, Int8Comparison, Int8Speed
from localvit.inference.exported import ExportedModel
from localvit.inference.runner import InferenceOptions, Runner, load_model
from localvit.utils.files import sha256_of, size_of

LEAST_AGREEMENT = 0.95
"""Least share of images with the same top class, where there are no labels. The images that change are those between
two classes, where about as many are gained as lost: of 5 %, a tenth more lost than gained is half a point of Acc@1."""
LARGEST_RMS_ERROR = 0.15
"""Largest error of logits, root mean square, relative to that of the logits. Of localvit_nano_patch4_32 on CIFAR-10,
quantized in several ways (benchmarks/int8_ways.py), files below it lost at most 0.6 points of Acc@1, and those above
0.17 lost 1.4 or more."""
_ROUNDS = 11
_LARGE_BATCH = 16


def quantize_with_proof(float32: Path, file: Path, settings: Format, report: ExportReport) -> ExportReport:
    """Quantize a file that was proven, into another folder, and compare both.

    Args:
        float32: The file.
        file: The file to write.
        settings: The format, with `int8`.
        report: The proof of the float32 file.

    Returns:
        The report, on the quantized file.

    Raises:
        ProofError: If it lost too much.
        DataError, UnreadableImage: If the images cannot be used.
    """
    int8 = settings.int8
    assert int8 is not None
    loaded = load_model(float32)
    reference = ExportedModel.open(float32)
    runner = Runner.of(loaded, options=InferenceOptions(workers=0, device=torch.device("cpu")))
    calibration, check = choose_images(int8, runner, reference)
    settings.write_int8(float32, file, list(calibration.inputs(runner, reference)), reference.metadata)
    quantized = ExportedModel.open(file)
    outcome = _run_both(reference, quantized, runner, check)
    comparison = Int8Comparison(
        images=check.description,
        calibration=calibration.description,
        max_drop=int8.max_drop,
        acc1_float32=_percent(outcome.correct_float32_N),
        acc1_int8=_percent(outcome.correct_int8_N),
        drop_standard_error=outcome.drop_standard_error,
        top1_agreement=outcome.same_N.double().mean().item(),
        rms_error=outcome.rms_error,
        bytes_float32=report.bytes,
        bytes_int8=sum(map(size_of, settings.files(file))),
        speeds=list(_speeds(reference, quantized, outcome.image_1CHW)),
    )
    report = replace(report, bytes=comparison.bytes_int8, sha256=sha256_of(file), int8=comparison)
    if reason := _reason_to_refuse(comparison):
        raise ProofError(f"{report.path} was not written: in int8, {reason}", report)
    return report


def _reason_to_refuse(comparison: Int8Comparison) -> str:
    """Why the file is refused, or nothing. Written so that NaN is refused."""
    if comparison.drop is not None:
        if not comparison.drop <= comparison.max_drop:
            return (
                f"Acc@1 drops by {comparison.drop:.2f} points on {comparison.images}; the limit is "
                f"{comparison.max_drop:g} (--max-drop)"
            )
        return ""
    if not comparison.top1_agreement >= LEAST_AGREEMENT:
        return (
            f"the top class stays the same on {comparison.top1_agreement:.1%} of {comparison.images}; the limit is "
            f"{LEAST_AGREEMENT:.0%}"
        )
    if not comparison.rms_error <= LARGEST_RMS_ERROR:
        return (
            f"logits differ by {comparison.rms_error:.2f} of their size on {comparison.images}; the limit is "
            f"{LARGEST_RMS_ERROR}"
        )
    return ""


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """What both files returned for the same N images."""

    same_N: Tensor
    """Whether the top class is the same."""
    correct_float32_N: Tensor | None
    """Whether the top class is the true one, if the images have labels."""
    correct_int8_N: Tensor | None
    rms_error: float
    image_1CHW: np.ndarray
    """One of the inputs."""

    @property
    def drop_standard_error(self) -> float | None:
        """Of the drop in points, from what each image lost: 1, 0 or -1."""
        if self.correct_float32_N is None or self.correct_int8_N is None:
            return None
        lost_N = self.correct_float32_N.double() - self.correct_int8_N.double()
        return 100 * lost_N.std(correction=0).item() / math.sqrt(len(lost_N))


@torch.inference_mode()
def _run_both(reference: ExportedModel, quantized: ExportedModel, runner: Runner, check: Chosen) -> _Outcome:
    same, correct_float32, correct_int8, errors, squares = [], [], [], [], []
    for positions, images_BCHW in check.batches(runner):
        given = reference.as_input(images_BCHW)
        expected_BM, found_BM = (each.logits(each.run(given)) for each in (reference, quantized))
        same.append(found_BM.argmax(1) == expected_BM.argmax(1))
        if check.labels is not None:
            labels_B = torch.tensor([check.labels[position] for position in positions])
            correct_float32.append(expected_BM.argmax(1) == labels_B)
            correct_int8.append((found_BM.argmax(1) == labels_B) & found_BM.isfinite().all(1))
        found_BM, expected_BM = comparable(found_BM, expected_BM, reference.metadata)
        errors.append((found_BM - expected_BM).square().sum())
        squares.append(expected_BM.square().sum())
    return _Outcome(
        same_N=torch.cat(same),
        correct_float32_N=torch.cat(correct_float32) if correct_float32 else None,
        correct_int8_N=torch.cat(correct_int8) if correct_int8 else None,
        rms_error=math.sqrt(sum(errors) / max(float(sum(squares)), 1e-300)),
        image_1CHW=given[:1],
    )


def _percent(correct_N: Tensor | None) -> float | None:
    return None if correct_N is None else 100 * correct_N.double().mean().item()


def _speeds(reference: ExportedModel, quantized: ExportedModel, image_1CHW: np.ndarray) -> Iterator[Int8Speed]:
    """Both files in turn, with one image and, where the batch is open, with more."""
    options = BenchOptions(device=torch.device("cpu"), rounds=_ROUNDS)
    batches = (1, _LARGE_BATCH) if reference.runtime.input_shape[0] is None else (1,)
    for batch in batches:
        images = np.repeat(image_1CHW, batch, axis=0)
        calls = {
            name: functools.partial(each.runtime.run, images)
            for name, each in (("float32", reference), ("int8", quantized))
        }
        calls_per_round = {name: warm_up(call, options.device) for name, call in calls.items()}
        seconds = time_rounds(calls, calls_per_round, options, lambda rounds: None)
        medians = {name: statistics.median(each) for name, each in seconds.items()}
        yield Int8Speed(batch=batch, float32=batch / medians["float32"], int8=batch / medians["int8"])
