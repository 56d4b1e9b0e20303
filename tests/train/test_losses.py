"""The class-weighted loss: its minimum, its gradient and its value in closed form."""

import pytest
import torch
from timm.data import Mixup
from tiny import STILL, tiny_config

from localvit.train.augmentation import build_mixup
from localvit.train.builder import build
from localvit.train.config import TrainConfig
from localvit.train.losses import DistillationLoss, cross_entropy

COUNTS = (240, 8)
LABELS = [0] * COUNTS[0] + [1] * COUNTS[1]
UNMIXED = {"mixup": 0.0, "cutmix": 0.0}


def balanced(num_classes=2, **settings):
    return cross_entropy(TrainConfig(class_weights="balanced", **settings), LABELS, num_classes).double()


def smoothed(labels_B, num_classes=2, smoothing=0.1):
    return torch.nn.functional.one_hot(labels_B, num_classes).double() * (1 - smoothing) + smoothing / num_classes


def gradient(loss, logits_BM, targets):
    logits_BM = logits_BM.detach().requires_grad_()
    return torch.autograd.grad(loss(logits_BM, targets), logits_BM)[0]


def test_separable_images_of_a_common_class_are_not_assigned_to_the_rare_one():
    """The minimum over all logits is the smoothed target: 0.95 for the right class. With a weight for each class of the
    target it is 0.39, because the wrong class has 1.55 / (1.55 + 1) of the weighted target."""
    loss, labels_B = balanced(**UNMIXED), torch.tensor(LABELS)
    logits_BM = torch.zeros(len(LABELS), 2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits_BM], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(logits_BM, labels_B)
        value.backward()
        return value

    optimizer.step(closure)
    right_B = logits_BM.softmax(1)[range(len(LABELS)), labels_B]
    torch.testing.assert_close(right_B, torch.full_like(right_B, 0.95), rtol=1e-4, atol=0)  # the optimizer's tolerance


def mixed_targets():
    """Targets of timm's mixup for images of both classes, which contain the smoothing."""
    mixup = build_mixup(TrainConfig(mixup_mode="elem"), num_classes=2)
    assert isinstance(mixup, Mixup)
    torch.manual_seed(0)
    return mixup(torch.randn(6, 3, 8, 8), torch.tensor([0, 0, 0, 0, 1, 1]))[1].double()


@pytest.mark.parametrize(
    ("settings", "targets"), [(UNMIXED, torch.tensor([0, 1, 0, 0])), ({}, mixed_targets())], ids=["smoothed", "mixed"]
)
def test_the_minimum_is_at_the_target(settings, targets):
    probabilities_BM = smoothed(targets) if targets.ndim == 1 else targets
    found = gradient(balanced(**settings), probabilities_BM.log(), targets)
    assert found.abs().max() < 1e-12


def test_an_image_counts_with_the_weight_of_its_class():
    """The gradient of image i is w_i / sum(w) (softmax_i - target_i), and w is 1/240 to 1/8."""
    labels_B = torch.tensor([0, 1, 0])
    logits_BM = torch.tensor([[0.3, -1.1], [2.0, 0.7], [-0.2, 0.5]], dtype=torch.float64)
    weights_B = 1 / torch.tensor(COUNTS, dtype=torch.float64)[labels_B]
    expected = (weights_B / weights_B.sum())[:, None] * (logits_BM.softmax(1) - smoothed(labels_B))
    # The weights are made in float32.
    torch.testing.assert_close(gradient(balanced(**UNMIXED), logits_BM, labels_B), expected, rtol=1e-6, atol=0)


def test_a_mixed_image_counts_with_the_mean_weight_of_its_classes():
    targets_BM = mixed_targets()
    logits_BM = torch.linspace(-1, 2, targets_BM.numel(), dtype=torch.float64).view_as(targets_BM)
    weights_B = targets_BM @ (1 / torch.tensor(COUNTS, dtype=torch.float64))
    losses_B = -(targets_BM * logits_BM.log_softmax(1)).sum(1)
    expected = (weights_B * losses_B).sum() / weights_B.sum()
    torch.testing.assert_close(balanced()(logits_BM, targets_BM), expected, rtol=1e-6, atol=0)


def test_a_class_without_images_weighs_nothing():
    """And the mean weight of the others is 1."""
    weight_M = balanced(num_classes=5, **UNMIXED).weight_M
    torch.testing.assert_close(weight_M[:2], torch.tensor([2 * 8 / 248, 2 * 240 / 248]).double(), rtol=1e-6, atol=0)
    assert weight_M[2:].tolist() == [0, 0, 0]


def test_without_smoothing_it_is_torchs_weighted_mean():
    labels_B = torch.tensor([0, 1, 0, 0, 1])
    logits_BM = torch.linspace(-2, 1, 10, dtype=torch.float64).view(5, 2)
    loss = balanced(**UNMIXED, label_smoothing=0.0)
    expected = torch.nn.CrossEntropyLoss(weight=loss.weight_M)(logits_BM, labels_B)
    torch.testing.assert_close(loss(logits_BM, labels_B), expected, rtol=1e-12, atol=0)


def test_distillation_weights_the_loss_of_the_class_token():
    labels_B = torch.tensor([0, 1])
    teacher = torch.nn.Identity()
    loss = DistillationLoss(balanced(**UNMIXED), teacher, "hard", alpha=0.25, tau=1.0)
    class_token_BM = smoothed(labels_B).log().requires_grad_()
    other_BM = torch.zeros(2, 2, dtype=torch.float64)
    loss(torch.eye(2, dtype=torch.float64), (class_token_BM, other_BM), labels_B).backward()
    assert class_token_BM.grad.abs().max() < 1e-12


def test_class_weights_for_a_loss_of_ones_own_are_refused(tiny_digits, tmp_path):
    config = tiny_config(tiny_digits, tmp_path / "run", class_weights="balanced", **STILL)
    with pytest.raises(ValueError, match=r"class_weights=balanced has no effect on a criterion of your own"):
        build(config, criterion=torch.nn.CrossEntropyLoss())
    assert not (tmp_path / "run").exists()
