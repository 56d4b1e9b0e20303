"""Outputs that are not finite: such an image has no prediction and counts as wrong, and the command fails."""

import math

import pytest
import torch
from PIL import Image
from torch import nn

import localvit
from localvit.data.preprocessing import Preprocessing
from localvit.evaluation.evaluate import evaluate
from localvit.evaluation.metrics import correct_images, count_mistakes, per_class
from localvit.evaluation.report.files import write_report
from localvit.inference.runner import InferenceOptions
from localvit_cli import main

OPTIONS = InferenceOptions(batch_size=3, workers=0, device=torch.device("cpu"))
INF, NAN = math.inf, math.nan


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two images of class a and three of class b, each of one gray value: 0, 50, 100, 150, 200."""
    root = tmp_path_factory.mktemp("images")
    for number, class_name in enumerate("aabbb"):
        (root / class_name).mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (50 * number,) * 3).save(root / class_name / f"{number}.png")
    return root


class Lookup(nn.Module):
    """Returns the row of logits for the gray value of an image."""

    def __init__(self, logits_NM):
        super().__init__()
        self.register_buffer("logits_NM", torch.tensor(logits_NM))
        self.num_classes = len(logits_NM[0])

    def forward(self, images_BCHW):
        return self.logits_NM[(images_BCHW.mean((1, 2, 3)) * 255 / 50).round().long()]


def evaluated(logits_NM, folder):
    size = Preprocessing(input_size=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0)
    return evaluate(Lookup(logits_NM).eval(), folder, size, OPTIONS, class_names=["a", "b", "c"])


@pytest.mark.parametrize("bad", [NAN, INF], ids=["nan", "inf"])
@pytest.mark.parametrize("column", [0, 1, 2])
def test_an_image_without_a_finite_output_counts_as_wrong(folder, tmp_path, bad, column):
    """Whatever class has the logit, also the true one. The other images: right, wrong as b, right, right."""
    logits_NM = [[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
    logits_NM[3][column] = bad
    found = evaluated(logits_NM, folder)
    assert (found.acc1, found.acc5) == (60.0, 80.0)
    assert math.isnan(found.loss)
    assert correct_images(found).tolist() == [True, False, True, False, True]
    assert count_mistakes(found) == {(0, 1): 1}
    assert [(row.images, row.correct, row.most_common_wrong) for row in per_class(found)] == [(2, 1, 1), (3, 2, None)]
    assert "(5 images, 1 without a finite output)" in str(found)
    with pytest.raises(FloatingPointError, match=r"not finite on 1 of 5 images, which count as wrong: b/3.png$"):
        found.check_finite()
    write_report(found, tmp_path, dataset_root=None, about={})
    assert "1 of 1 misclassified image." in (tmp_path / "report.html").read_text()


def test_a_masked_class_is_no_reason_to_count_an_image_as_wrong(folder):
    found = evaluated([[2.0, 0.0, -INF]] * 2 + [[0.0, 1.0, -INF]] * 3, folder)
    assert (found.acc1, found.acc5) == (100.0, 100.0)
    found.check_finite()


@pytest.mark.parametrize("row", [[NAN, 0.0, 0.0], [0.0, NAN, 0.0], [NAN] * 3, [INF] * 3, [-INF] * 3], ids=str)
def test_a_model_without_a_finite_output_has_no_result(folder, row):
    with pytest.raises(FloatingPointError, match=r"the model's output is not finite on 5 of 5 images.*: a/0.png, a/1"):
        evaluated([row] * 5, folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model with a NaN in its head."""
    torch.manual_seed(0)
    model = localvit.create_model("localvit_nano_patch4_32", num_classes=2, depth=1, img_size=8)
    with torch.no_grad():
        model.head.weight[1, 3] = NAN
    path = tmp_path_factory.mktemp("model") / "nan.safetensors"
    localvit.save_checkpoint(model, path, class_names=["a", "b"])
    return str(path)


def test_the_command_fails_and_says_on_how_many_images(folder, checkpoint, tmp_path, capsys):
    flags = ["--data-set", "FOLDER", "--data-path", str(folder), "--workers", "0", "--device", "cpu"]
    assert main(["eval", checkpoint, *flags, "--report", str(tmp_path / "report")]) == 1
    printed = capsys.readouterr()
    assert "Acc@1" not in printed.out
    assert printed.err.splitlines()[-1].startswith(
        "localvit: error: the model's output is not finite on 5 of 5 images, which count as wrong: a/0.png, a/1.png"
    )


def test_the_command_prints_the_result_of_the_others_before_it_fails(folder, tmp_path, capsys):
    """In float16, whose largest number is 65,504. The patches of black images are 48 values of about -2.1."""
    model = localvit.create_model("localvit_nano_patch4_32", num_classes=2, depth=1, img_size=8)
    nn.init.constant_(model.patch_embed.proj.weight, 1000)
    nn.init.constant_(model.head.weight, 0)
    nn.init.constant_(model.head.bias, 0)
    localvit.save_checkpoint(model, tmp_path / "large.safetensors", class_names=["a", "b"])
    flags = ["--data-set", "FOLDER", "--data-path", str(folder), "--workers", "0", "--device", "cpu"]
    assert main(["eval", str(tmp_path / "large.safetensors"), *flags, "--dtype", "float16"]) == 1
    printed = capsys.readouterr()
    # The darkest and the brightest image overflow. The others have equal logits, so the first class is predicted.
    assert printed.out.splitlines()[-1] == "* Acc@1 20.000 Acc@5 60.000 loss nan"
    assert "not finite on 2 of 5 images, which count as wrong: a/0.png, b/4.png" in printed.err.splitlines()[-1]
