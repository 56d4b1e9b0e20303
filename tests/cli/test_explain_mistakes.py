"""`localvit eval --explain`: the maps in the report are those of the images and classes beside them."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

import localvit
from localvit.explanations import draw_overlay, grad_cam
from localvit_cli import main

NANO = "localvit_nano_patch4_32"
CPU = ["--workers", "0", "--device", "cpu"]


@pytest.fixture
def folder(tmp_path):
    """Seven images of noise, and one that cannot be read, which shifts the positions of those after it."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(("bird", "cat", "frog", "ship", "truck", "deer", "dog")):
        (tmp_path / "images" / name).mkdir(parents=True)
        pixels = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((40, 36 + number), Image.Resampling.BICUBIC)
        image.save(tmp_path / "images" / name / "image.png")
    (tmp_path / "images" / "bird" / "a_broken.png").write_bytes(b"no image")
    return tmp_path / "images"


def shown(source):
    return Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,"))))


def test_each_mistake_has_the_maps_of_its_two_classes(folder, tmp_path, capsys):
    flags = ["--data-set", "FOLDER", "--data-path", str(folder), "--skip-unreadable", "--batch-size", "3"]
    assert main(["eval", NANO, *flags, *CPU, "--report", str(tmp_path / "plain")]) == 0
    plain = capsys.readouterr().out
    assert main(["eval", NANO, *flags, *CPU, "--report", str(tmp_path / "explained"), "--explain"]) == 0
    assert capsys.readouterr().out == plain
    for name in ("results.json", "per_class.csv"):
        texts = [(tmp_path / report / name).read_text() for report in ("plain", "explained")]
        assert re.sub('"seconds".*', "", texts[0]) == re.sub('"seconds".*', "", texts[1])

    page = (tmp_path / "explained" / "report.html").read_text()
    figures = re.findall(r"<figure class=.explained.>.*?</figure>", page, re.S)
    assert len(figures) >= 5  # noise is mostly misclassified
    ready = localvit.load_model(NANO)
    for figure in figures:
        path = re.search(r'class="path muted">(.*?)</div>', figure)[1]
        true, predicted = re.findall(r"<b>(.*?)</b>", figure)
        assert path.split("/")[0] == true
        sources = re.findall(r'src="(.*?)"', figure)
        with Image.open(folder / path) as image:
            tensor = ready.preprocessing.transform()(image.convert("RGB"))[None]
            crop = ready.preprocessing.resizing()(image.convert("RGB"))
        for source, name in zip(sources[1:], (true, predicted), strict=True):
            activation = grad_cam(ready.model, tensor, ready.class_names.index(name)).map_BHW[0]
            expected = draw_overlay(crop, activation)
            expected.thumbnail((168, 168))
            difference = np.abs(np.asarray(shown(source)).astype(int) - np.asarray(expected))
            assert difference.mean() < 4  # about 1 by the JPEG; the maps of two classes differ by 27
        expected = crop.resize((168, 168), Image.Resampling.NEAREST)
        assert np.abs(np.asarray(shown(sources[0])).astype(int) - np.asarray(expected)).mean() < 8


def test_explanations_need_a_report(folder, capsys):
    assert main(["eval", NANO, "--data-set", "FOLDER", "--data-path", str(folder), *CPU, "--explain"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "localvit: error: --explain shows what the model looks at in the report: add --report DIR"


def test_a_model_that_cannot_be_explained_is_refused_before_the_evaluation(folder, tmp_path, capsys):
    torch.manual_seed(0)
    model = localvit.create_model("test_resnet", num_classes=10, pretrained=False)
    localvit.save_checkpoint(model, tmp_path / "resnet.safetensors", class_names=localvit.load_model(NANO).class_names)
    flags = ["--data-set", "FOLDER", "--data-path", str(folder), *CPU, "--report", str(tmp_path / "report")]
    assert main(["eval", str(tmp_path / "resnet.safetensors"), *flags, "--explain"]) == 2
    printed = capsys.readouterr()
    *_, line = printed.err.splitlines()
    assert line.startswith("localvit: error: --explain: ResNet has no part that can be explained; supported are")
    assert printed.out == ""
    assert "images," not in printed.err  # no progress line
    assert not (tmp_path / "report").exists()
