"""Temperature scaling: one number that makes probabilities agree with the accuracy, fitted to held-out images.

On Calibration of Modern Neural Networks, arXiv 1706.04599, section 4.2. Logits are divided by the temperature that
minimizes the cross-entropy. The order of the classes, and so every accuracy, stays.

How well it works must be measured on other images than those it was fitted to. Here each image's probability comes from
a temperature that was fitted without it (cross-fitting in five parts); the temperature that is kept is fitted to all.

Shapes: N images, M classes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from localvit.evaluation.evaluate import Evaluation
from localvit.evaluation.metrics import Bin, expected_calibration_error, reliability, reliability_bins
from localvit.inference.calibration import LIMITS, Calibration

PARTS = 5
"""Parts of the images for cross-fitting."""
_ROWS = 4096  # taken to float64 at once, so that 50,000 images of 1,000 classes fit into memory
_GRADIENT = 1e-9
"""The gradient at the optimum, in nats per unit of 1 / temperature of logits whose standard deviation is 1."""


def fit_temperature(logits_NM: Tensor, labels_N: Tensor) -> float:
    """The temperature with the lowest cross-entropy.

    In 1 / temperature the cross-entropy is convex, so that a minimum is the minimum. Computed in float64.

    Args:
        logits_NM: Finite logits.
        labels_N: True classes.

    Raises:
        ValueError: There is no minimum: all images are classified correctly (the lower the temperature, the better), or
            the logits are no better than chance. Or it is outside of `LIMITS`.
    """
    if not logits_NM.isfinite().all():
        raise ValueError("the model's output is not finite on some images, so no temperature can be fitted")
    own_N = logits_NM.gather(1, labels_N[:, None])[:, 0]
    if bool((own_N >= logits_NM.amax(1)).all()):
        raise ValueError(
            f"all {len(labels_N):,} images are classified correctly, so a temperature cannot be fitted to them: use "
            "more images, on which the model makes mistakes"
        )
    # Logits of one scale make the problem equally well-conditioned for every model.
    scale = max(logits_NM.double().std(dim=1, correction=0).mean().item(), 1e-12)
    slope = torch.zeros((), dtype=torch.float64, requires_grad=True)  # 1 / temperature, of scaled logits
    if _gradient(slope, logits_NM, labels_N, scale) >= 0:
        raise ValueError(
            f"the model's logits are no better than chance on these {len(labels_N):,} images, so no temperature helps: "
            "check that the labels are right"
        )
    with torch.no_grad():
        slope.fill_(scale)  # temperature 1
    optimizer = torch.optim.LBFGS(
        [slope], max_iter=200, tolerance_grad=_GRADIENT, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        return _cross_entropy(slope, logits_NM, labels_N, scale)

    optimizer.step(closure)
    temperature = scale / slope.item()
    if not LIMITS[0] <= temperature <= LIMITS[1]:
        raise ValueError(
            f"the temperature that fits these {len(labels_N):,} images best is {temperature:.3g}, which makes no "
            "sense: use more images"
        )
    return temperature


def _cross_entropy(slope: Tensor, logits_NM: Tensor, labels_N: Tensor, scale: float) -> float:
    """The mean cross-entropy at a slope; adds its gradient to that of the slope."""
    total = 0.0
    for part_BM, labels_B in zip(logits_NM.split(_ROWS), labels_N.split(_ROWS), strict=True):
        loss = torch.nn.functional.cross_entropy(part_BM.double() / scale * slope, labels_B, reduction="sum")
        loss = loss / len(labels_N)
        loss.backward()
        total += loss.item()
    return total


def _gradient(slope: Tensor, logits_NM: Tensor, labels_N: Tensor, scale: float) -> float:
    slope.grad = None
    _cross_entropy(slope, logits_NM, labels_N, scale)
    assert slope.grad is not None
    return slope.grad.item()


def _parts(correct_N: Tensor) -> Tensor:
    """The part of each image for cross-fitting, 0 to `PARTS` - 1: each has its share of the mistakes, which a fit
    without any could not use."""
    part_N = torch.empty(len(correct_N), dtype=torch.int64)
    for is_correct in (False, True):
        indices = (correct_N == is_correct).nonzero().flatten()
        part_N[indices] = torch.arange(len(indices)) % PARTS
    return part_N


def cross_fitted(logits_NM: Tensor, labels_N: Tensor) -> Tensor:
    """For each image the temperature (N, 1) fitted to the images of the other parts. Raises as `calibrate`."""
    part_N = _parts(logits_NM.argmax(1) == labels_N)
    temperature_N1 = torch.ones(len(labels_N), 1, dtype=torch.float64)
    for part in range(PARTS):
        inside_N = part_N == part
        if inside_N.any():
            temperature_N1[inside_N] = fit_temperature(logits_NM[~inside_N], labels_N[~inside_N])
    return temperature_N1


def calibrate(evaluation: Evaluation) -> Calibration:
    """Fit a temperature to the images of an evaluation, and measure by cross-fitting what it does on others.

    Raises:
        ValueError: As `fit_temperature`, or with fewer than two mistakes, or for an evaluation without logits.
    """
    logits_NM, labels_N = _logits_of(evaluation), evaluation.labels_N
    num_wrong = int((logits_NM.argmax(1) != labels_N).sum())
    if num_wrong < 2:
        raise ValueError(
            f"the model misclassifies {num_wrong} of the {len(labels_N):,} images, and a temperature needs at least 2 "
            "mistakes to be fitted: use more images"
        )
    temperature = fit_temperature(logits_NM, labels_N)
    after = _effect(evaluation, cross_fitted(logits_NM, labels_N))
    return Calibration(
        temperature=temperature,
        num_images=len(labels_N),
        images=hash_of(evaluation.paths),
        ece_before=expected_calibration_error(reliability(evaluation)),
        ece_after=after.ece,
        loss_before=evaluation.loss,
        loss_after=after.loss,
    )


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What a temperature does to the probabilities of an evaluation."""

    bins: list[Bin]
    """Their reliability diagram."""
    ece: float
    """Their expected calibration error, 0 to 1."""
    loss: float
    """The mean cross-entropy in nats."""
    is_cross_fitted: bool = False
    """Whether each image has a temperature that was fitted to other ones, because these are the images that the model's
    temperature was fitted to."""


def effect_of(evaluation: Evaluation, calibration: Calibration) -> Effect:
    """What the temperature of a model does to the probabilities of an evaluation, which must have its logits.

    On the images that it was fitted to, it would look better than it is, so there the result is that of cross-fitting.

    Raises:
        ValueError: The evaluation has no logits.
    """
    if hash_of(evaluation.paths) != calibration.images:
        return _effect(evaluation, calibration.temperature)
    temperature_N1 = cross_fitted(_logits_of(evaluation), evaluation.labels_N)
    return replace(_effect(evaluation, temperature_N1), is_cross_fitted=True)


def _effect(evaluation: Evaluation, temperature: float | Tensor) -> Effect:
    log_probabilities_NM = (_logits_of(evaluation).double() / temperature).log_softmax(1)
    labels_N = evaluation.labels_N
    confidences_N, classes_N = log_probabilities_NM.exp().max(1)
    bins = reliability_bins(confidences_N, classes_N == labels_N)
    loss = torch.nn.functional.nll_loss(log_probabilities_NM, labels_N).item()
    return Effect(bins=bins, ece=expected_calibration_error(bins), loss=loss)


def _logits_of(evaluation: Evaluation) -> Tensor:
    if evaluation.logits_NM is None:
        raise ValueError("this evaluation has no logits: evaluate with keep_logits=True")
    return evaluation.logits_NM


def hash_of(paths: Sequence[str]) -> str:
    """A hash of the names of images, in any order."""
    return hashlib.sha256("\0".join(sorted(paths)).encode(errors="surrogateescape")).hexdigest()
