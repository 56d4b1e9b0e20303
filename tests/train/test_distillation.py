"""Distillation: the losses against their formulas, and the teacher's preprocessing and order of classes."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

import localvit
from localvit.data.preprocessing import Preprocessing
from localvit.train.losses import DistillationLoss
from localvit.train.teacher import Teacher, build_teacher, check_student
from localvit.utils.weight_files import CheckpointError
from published import published_state

NANO = "localvit_nano_patch4_32"
B, M = 5, 7
CPU = torch.device("cpu")


class Constant(nn.Module):
    """A teacher with the same output for all images."""

    def __init__(self, logits_BM):
        super().__init__()
        self.logits_BM = nn.Parameter(logits_BM)

    def forward(self, images_BCHW):
        return self.logits_BM


def logits(seed, scale=2.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(0, scale, (B, M)))


def log_softmax(x):
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def expected_loss(kind, alpha, tau, class_token, distillation_token, teacher, targets):
    """The formula, with probabilities (B, M) as targets."""
    base = -(targets * log_softmax(class_token)).sum(1).mean()
    if kind == "hard":
        distillation = -log_softmax(distillation_token)[np.arange(B), teacher.argmax(1)].mean()
    else:
        ours, theirs = log_softmax(distillation_token / tau), log_softmax(teacher / tau)
        distillation = (np.exp(theirs) * (theirs - ours)).sum() * tau**2 / (B * M)
    return (1 - alpha) * base + alpha * distillation


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("kind", "tau"), [("hard", 1.0), ("hard", 3.0), ("soft", 1.0), ("soft", 3.0), ("soft", 0.5)])
def test_closed_form(kind, tau, alpha, mixed):
    outputs, teacher = (logits(0), logits(1)), logits(2)
    classes = torch.tensor([3, 0, 6, 2, 2])
    targets = F.one_hot(classes, M).double()
    if mixed:
        targets = 0.7 * targets + 0.3 * targets.flip(0)
    loss = DistillationLoss(nn.CrossEntropyLoss(), Constant(teacher), kind, alpha=alpha, tau=tau)
    value = loss(torch.zeros(B, 3, 2, 2), outputs, targets if mixed else classes)
    expected = expected_loss(kind, alpha, tau, *(each.numpy() for each in (*outputs, teacher, targets)))
    # float64 sums of few numbers in another order
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_soft_loss_is_zero_if_the_teacher_agrees():
    same = logits(4)
    loss = DistillationLoss(nn.CrossEntropyLoss(), Constant(same), "soft", alpha=1.0, tau=2.0)
    outputs = (logits(0), same.clone().requires_grad_())
    value = loss(torch.zeros(B, 3, 2, 2), outputs, torch.arange(B))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-15)
    assert outputs[1].grad.abs().max() < 1e-15


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_half_precision_logits_are_processed_in_float32(kind):
    """Under autocast the logits are bfloat16; the loss is computed in float32."""
    teacher, class_token, distillation_token = (logits(seed, 8.0).bfloat16() for seed in (2, 0, 1))
    classes = torch.tensor([3, 0, 6, 2, 2])
    loss = DistillationLoss(nn.CrossEntropyLoss(), Constant(teacher), kind, alpha=1.0, tau=3.0)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(torch.zeros(B, 3, 2, 2), (class_token, distillation_token), classes)
    targets = F.one_hot(classes, M).double()
    expected = expected_loss(
        kind, 1.0, 3.0, *(each.double().numpy() for each in (class_token, distillation_token, teacher, targets))
    )
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected, rel=1e-5)  # float32; bfloat16 would be off by 4e-3


def distilled(num_classes=M, **arguments):
    torch.manual_seed(0)
    return localvit.create_model(NANO, num_classes=num_classes, distilled=True, depth=2, **arguments)


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_has_gradients_for_both_heads_and_none_for_the_teacher(kind, dtype):
    student = distilled()
    check_student(student)
    student.set_distilled_training(True)
    torch.manual_seed(1)
    teacher_model = timm.create_model("test_resnet", num_classes=M)
    teacher = Teacher(teacher_model, (0.5,) * 3, (0.5,) * 3, (48, 48), [*range(1, M), 0])
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    loss = DistillationLoss(nn.CrossEntropyLoss(), teacher, kind, alpha=0.5, tau=2.0).train()
    assert list(loss.parameters()) == []
    assert list(loss.state_dict()) == []
    assert not any(module.training for module in teacher.modules())
    images, targets = Mixup(mixup_alpha=1.0, num_classes=M)(torch.randn(4, 3, 32, 32), torch.tensor([0, 3, 6, 1]))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        value = loss(images, student.train()(images), targets)
    assert torch.isfinite(value)
    value.backward()
    for head in (student.head, student.head_dist, student.blocks[0].attn.qkv):
        assert head.weight.grad.abs().max() > 0
    assert student.dist_token.grad.abs().max() > 0
    for parameter in teacher.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
    for key, value in teacher.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


@pytest.mark.parametrize(("alpha", "head", "other"), [(0.0, "head", "head_dist"), (1.0, "head_dist", "head")])
def test_alpha_chooses_the_head(alpha, head, other):
    student = distilled()
    student.set_distilled_training(True)
    loss = DistillationLoss(nn.CrossEntropyLoss(), Constant(logits(2).float()), "hard", alpha=alpha, tau=1.0)
    images = torch.randn(B, 3, 32, 32)
    loss(images, student.train()(images), torch.arange(B)).backward()
    assert getattr(student, head).weight.grad.abs().max() > 0
    assert not getattr(student, other).weight.grad.any()


def normalized(values, mean, std):
    return (values - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def test_images_are_renormalized_for_the_teacher():
    values = torch.rand(2, 3, 160, 160)
    model = timm.create_model("test_vit", num_classes=M).eval()
    mean, std = (0.1, 0.5, 0.7), (0.9, 0.2, 0.4)
    teacher = Teacher(model, mean, std, None, None)
    ours = teacher(normalized(values, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    # Two normalizations in a row for one, in float32
    torch.testing.assert_close(ours, model(normalized(values, mean, std)).detach(), rtol=1e-4, atol=1e-5)
    assert not ours.requires_grad
    same = Teacher(model, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, None, None)
    torch.testing.assert_close(same(values), model(values).detach(), rtol=0, atol=0)


CLASSES = ["ape", "bat", "cow", "dog", "eel", "fox", "gnu"]


def saved_teacher(path, class_names=CLASSES, preprocessing=None):
    torch.manual_seed(2)
    model = localvit.create_model(NANO, num_classes=len(class_names or CLASSES), depth=2)
    localvit.save_checkpoint(model, path, class_names=class_names, preprocessing=preprocessing)
    return model.eval()


def test_classes_are_matched_by_name(tmp_path, caplog):
    model = saved_teacher(tmp_path / "teacher.safetensors")
    order = [3, 0, 6, 1, 5, 2, 4]
    shuffled = [CLASSES[index] for index in order]
    teacher = build_teacher(
        str(tmp_path / "teacher.safetensors"),
        None,
        M,
        shuffled,
        CPU,
        preprocessing=Preprocessing.published((32, 32)),
    )
    images = torch.randn(3, 3, 32, 32)
    theirs, ours = model(images), teacher(images)
    for index, name in enumerate(shuffled):
        torch.testing.assert_close(ours[:, index], theirs[:, CLASSES.index(name)].detach(), rtol=0, atol=0)
    assert caplog.messages == []


def test_preprocessing_of_a_checkpoint_is_used(tmp_path):
    mean, std = (0.3, 0.4, 0.6), (0.25, 0.5, 0.125)
    preprocessing = Preprocessing(input_size=(32, 32), mean=mean, std=std).to_dict()
    model = saved_teacher(tmp_path / "teacher.safetensors", preprocessing=preprocessing)
    teacher = build_teacher(
        str(tmp_path / "teacher.safetensors"), None, M, CLASSES, CPU, preprocessing=Preprocessing.published((32, 32))
    )
    values = torch.rand(2, 3, 32, 32)
    ours = teacher(normalized(values, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    # Two normalizations in a row for one, in float32
    torch.testing.assert_close(ours, model(normalized(values, mean, std)).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "resized", "message"),
    [
        ("vit_tiny_patch16_224", True, "224 x 224 pixels, and the student's have 48 x 32: they are resized"),
        ("test_resnet", False, "160 x 160 pixels, and the student's have 48 x 32, which it accepts without resizing"),
    ],
)
def test_images_of_another_size(name, resized, message, tmp_path, caplog):
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=M).eval()
    torch.save(model.state_dict(), tmp_path / "teacher.pth")
    teacher = build_teacher(
        name,
        tmp_path / "teacher.pth",
        M,
        CLASSES,
        CPU,
        preprocessing=Preprocessing.published((48, 32)),
    )
    assert len(caplog.messages) == 2
    assert "has no class names" in caplog.messages[0]
    assert message in caplog.messages[1]
    values = torch.rand(2, 3, 48, 32)
    resized_images = normalized(values, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    if resized:
        resized_images = F.interpolate(resized_images, (224, 224), mode="bicubic", antialias=True)
    ours = teacher(normalized(values, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    # Normalized before and after resizing; float32
    torch.testing.assert_close(ours, model(resized_images).detach(), rtol=1e-4, atol=1e-4)


def test_released_weights_of_a_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    state = published_state("localvit_tiny_mlp4_act3_r192")
    torch.save({"model": state}, tmp_path / "hub" / "checkpoints" / "localvit_t.pth")  # as if downloaded before
    teacher = build_teacher("localvit_tiny", None, 1000, None, CPU, preprocessing=Preprocessing.published((224, 224)))
    torch.testing.assert_close(teacher.model.head.weight.detach(), state["head.weight"], rtol=0, atol=0)
    with pytest.raises(ValueError, match="has 1000 classes and the student 7"):
        build_teacher("localvit_tiny", None, M, CLASSES, CPU, preprocessing=Preprocessing.published((224, 224)))
    names = [str(number) for number in range(1000)]
    with pytest.raises(ValueError, match=r"lacks 1000 of the 1000 classes \(0, 1, 10, 100, 101, \.\.\.\)"):
        build_teacher("localvit_tiny", None, 1000, names, CPU, preprocessing=Preprocessing.published((224, 224)))


@pytest.mark.parametrize(
    ("teacher", "class_names", "error", "message"),
    [
        ("teacher.safetensors", [*CLASSES[:-1], "yak"], ValueError, r"lacks 1 of the 7 classes \(yak\)"),
        ("teacher.safetensors", CLASSES[:-1], ValueError, "has 7 classes and the student 6"),
        ("nowhere.safetensors", CLASSES, FileNotFoundError, "nowhere"),
        ("localvit_tiny_mlp6_act1", CLASSES, CheckpointError, "no weights of localvit_tiny_mlp6_act1 were released"),
        ("regnety_16", CLASSES, ValueError, "'regnety_16'; did you mean regnety_16"),
    ],
)
def test_unusable_teachers_are_refused(teacher, class_names, error, message, tmp_path, monkeypatch):
    saved_teacher(tmp_path / "teacher.safetensors")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message) as refusal:
        build_teacher(
            teacher, None, len(class_names), class_names, CPU, preprocessing=Preprocessing.published((32, 32))
        )
    assert "\n" not in str(refusal.value)


def test_a_student_without_the_token_is_refused():
    with pytest.raises(ValueError, match="add --model-args distilled=true"):
        check_student(localvit.create_model(NANO, depth=1))
    check_student(timm.create_model("deit_tiny_distilled_patch16_224", device="meta"))


@pytest.mark.parametrize(
    "prepare", [lambda model: model, lambda model: (model.set_distilled_training(True), model.eval())]
)
def test_outputs_of_one_head_are_refused(prepare):
    student = distilled()
    prepare(student)
    loss = DistillationLoss(nn.CrossEntropyLoss(), Constant(logits(2).float()), "hard", alpha=0.5, tau=1.0)
    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match=r"set_distilled_training\(True\)"):
        loss(images, student(images), torch.arange(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "none"}, "kind='none': choose 'hard' or 'soft'"),
        ({"alpha": 1.5}, "alpha=1.5 must be in"),
        ({"alpha": float("nan")}, "alpha=nan must be in"),
        ({"tau": 0.0}, "tau=0.0 must be above 0"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        DistillationLoss(nn.CrossEntropyLoss(), nn.Identity(), **{"kind": "hard", "alpha": 0.5, "tau": 1.0} | changes)
