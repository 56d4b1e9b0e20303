"""`localvit.explain` and the files that it writes, on images as evaluation crops them."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import ONE_OF_EACH, image_size, small_model

import localvit
from localvit.data.folders import scan_folder
from localvit.data.preprocessing import Preprocessing
from localvit.evaluation.predict import predict
from localvit.explanations import attention_maps, class_overlays, draw_overlay, grad_cam, rollout, write_explanations
from localvit.explanations.overlay import colors, draw_explanation, enlarge, short_name
from localvit_cli import main

NANO = "localvit_nano_patch4_32"
OPTIONS = localvit.InferenceOptions(workers=0, batch_size=2, device=torch.device("cpu"), fuse=False)


@pytest.fixture
def images(tmp_path):
    """Three images that are not square, and one that cannot be read."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for number, name in enumerate(("a", "b", "c<d>")):
        pixels = rng.integers(0, 256, (40 + 8 * number, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize("method", ["attention", "rollout", "cam"])
def test_each_image_has_the_maps_of_its_own_forward_pass(images, method):
    ready = localvit.load_model(NANO)
    found = list(localvit.explain(ready, images, method, options=OPTIONS))
    predicted = list(predict(ready, images, options=OPTIONS, topk=1))
    assert [each.file for each in found] == [each.file for each in predicted]
    for each, prediction in zip(found, predicted, strict=True):
        if prediction.error:
            assert (each.error, each.maps, each.image) == (prediction.error, (), None)
            continue
        assert each.predicted == prediction.class_names[0]
        assert each.probability == pytest.approx(prediction.probabilities[0], abs=1e-6)
        with Image.open(each.file) as image:
            resized = ready.preprocessing.resizing()(image.convert("RGB"))
            tensor = ready.preprocessing.transform()(image.convert("RGB"))[None]
        assert np.abs(np.asarray(each.image).astype(int) - np.asarray(resized)).max() == 0
        expected = {
            "attention": lambda x=tensor: [each.on_grid().mean(1)[:, 0, 1:] for each in attention_maps(ready.model, x)],
            "rollout": lambda x=tensor: [rollout(ready.model, x).flatten(1)],
            "cam": lambda x=tensor: [grad_cam(ready.model, x).map_BHW.flatten(1)],
        }[method]()
        assert len(each.maps) == len(expected) == (6 if method == "attention" else 1)
        for heat, values in zip(each.maps, expected, strict=True):
            assert heat.values_HW.shape == (8, 8)
            torch.testing.assert_close(heat.values_HW.flatten(), values[0], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("method", ["attention", "rollout", "cam"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_family_and_its_fused_form(name, method):
    torch.manual_seed(0)
    model = small_model(name).eval()
    side = image_size(name)
    batch = torch.randn(3, 3, side, side)
    preprocessing = Preprocessing(input_size=(side, side))
    for each in (model, localvit.fuse(model)):
        found = list(localvit.explain(each, batch, method, preprocessing=preprocessing, options=OPTIONS))
        assert [one.file for one in found] == ["0", "1", "2"]
        sheet = draw_explanation(found[0])
        assert sheet.width > 224
        for heat in found[0].maps:
            assert heat.values_HW.ndim == 2
            assert (heat.values_HW >= 0).all()


def test_a_class_by_name_or_index(images):
    ready = localvit.load_model(NANO)
    by_name = next(localvit.explain(ready, images, target="ship", options=OPTIONS))
    by_index = next(localvit.explain(ready, images, target=8, options=OPTIONS))
    assert by_name.target == by_index.target == "ship"
    assert torch.equal(by_name.maps[0].values_HW, by_index.maps[0].values_HW)
    assert by_name.target_probability < by_name.probability or by_name.predicted == "ship"


@pytest.mark.parametrize("target", [np.int64(3), torch.tensor(3), np.array([3, 3]), torch.tensor([3, 3]), (3, 3)])
def test_a_class_as_any_kind_of_integer(target):
    model = small_model(NANO).eval()
    batch = torch.randn(2, 3, 32, 32)
    settings = {"preprocessing": Preprocessing(input_size=(32, 32)), "options": OPTIONS}
    found = list(localvit.explain(model, batch, target=target, **settings))
    assert [each.target for each in found] == ["3", "3"]


@pytest.mark.parametrize("target", [3.0, True, ["cat", "ship"], [0.5, 1.5], [[1], [2]]])
def test_a_class_that_is_not_an_integer(target):
    model = small_model(NANO).eval()
    with pytest.raises(ValueError, match="is neither the index of a class nor one index for each image"):
        localvit.explain(model, torch.randn(2, 3, 32, 32), target=target, preprocessing=Preprocessing())


@pytest.mark.parametrize(
    "batch", [torch.zeros(3, 32, 32), torch.zeros(2, 3, 32, 32, dtype=torch.uint8)], ids=["one image", "bytes"]
)
def test_a_tensor_that_is_not_a_prepared_batch(batch):
    with pytest.raises(ValueError, match=f"shape \\({batch.shape[0]}, .*{batch.dtype} must be a prepared batch"):
        localvit.explain(small_model(NANO).eval(), batch, preprocessing=Preprocessing())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "saliency"}, "method='saliency' is not known; choose one of attention, rollout, cam"),
        ({"method": "rollout", "target": 1}, "method='rollout' does not depend on a class: leave out target"),
        ({"target": "whale"}, "target 'whale' is not a class of the model; its classes are airplane, automobile"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(images, arguments, message):
    with pytest.raises(ValueError, match=message):
        localvit.explain(NANO, images, options=OPTIONS, **arguments)


def test_an_output_that_is_not_finite_has_no_maps():
    model = small_model(NANO).eval()
    model.head.weight.data.fill_(float("nan"))
    found = list(localvit.explain(model, torch.randn(1, 3, 32, 32), preprocessing=Preprocessing(input_size=(32, 32))))
    assert found[0].error == "the model's output is not finite"


def test_colors_get_lighter_and_an_overlay_shows_the_highest_patch():
    steps = colors(np.linspace(0, 1, 50)).astype(float)
    lightness = steps @ (0.299, 0.587, 0.114)
    assert (np.diff(lightness) > 0).all()
    heat = torch.zeros(4, 4)
    heat[1, 2] = 3.0
    drawn = np.asarray(draw_overlay(Image.new("RGB", (32, 32), (90, 90, 90)), heat, smallest_side=64)).astype(int)
    assert drawn.shape == (64, 64, 3)
    difference = np.abs(drawn - 90).sum(-1)
    row, column = np.unravel_index(difference.argmax(), difference.shape)
    assert (row // 16, column // 16) == (1, 2)
    assert difference[56:, :8].max() == 0
    gray = np.asarray(draw_overlay(Image.new("RGB", (32, 32), (200, 10, 10)), torch.zeros(4, 4)))
    assert (gray[..., 0] == gray[..., 1]).all()


def test_overlays_for_a_report(images):
    (images / "cat").mkdir()
    for path in images.glob("*.png"):
        path.rename(images / "cat" / path.name)
    labeled, _ = scan_folder(images)
    found = class_overlays(NANO, labeled, {2: (0, 1), 3: (8, 5), 0: (6, 3)}, OPTIONS)
    assert sorted(found) == [0, 3]  # 2 cannot be read
    assert class_overlays(NANO, labeled, {}, OPTIONS) == {}
    image, *overlays = found[0]
    for overlay, target in zip(overlays, (6, 3), strict=True):
        (expected,) = localvit.explain(NANO, images / "cat" / "a.png", target=target, options=OPTIONS)
        assert overlay.tobytes() == draw_overlay(expected.image, expected.maps[0].values_HW).tobytes()
        assert image.tobytes() == enlarge(expected.image).tobytes()


def test_a_class_for_each_image(images):
    ready = localvit.load_model(NANO)
    files = [images / f"{name}.png" for name in ("a", "broken", "b", "c<d>")]
    targets = [3, 0, 8, 1]
    found = list(localvit.explain(ready, files, target=targets, options=OPTIONS))
    assert [each.target for each in found] == ["cat", None, "ship", "automobile"]
    for file, target, each in zip(files, targets, found, strict=True):
        if each.error is None:
            (alone,) = localvit.explain(ready, file, target=target, options=OPTIONS)
            torch.testing.assert_close(each.maps[0].values_HW, alone.maps[0].values_HW, atol=1e-5, rtol=1e-3)
    batch = torch.randn(3, 3, 32, 32)
    assert [each.target for each in localvit.explain(ready, batch, target=[9, 0, 5], options=OPTIONS)] == [
        *("truck", "airplane", "dog")
    ]
    with pytest.raises(ValueError, match="2 target classes were given for 4 images"):
        localvit.explain(ready, files, target=[3, 0], options=OPTIONS)


def test_short_names():
    assert short_name("blocks.3.attn") == "block 4"
    assert short_name("stages.1.blocks.0.attn") == "stage 2 block 1"
    assert short_name("layers.0.blocks.1.attn") == "stage 1 block 2"
    assert short_name("blocks.0.attn_in") == "block 1 inner"


def test_the_command_writes_a_png_for_each_image_the_page_and_the_numbers(images, tmp_path, capsys):
    output = tmp_path / "out"
    flags = ["--workers", "0", "--device", "cpu", "--output", str(output), "--target", "ship"]
    assert main(["explain", NANO, str(images), *flags]) == 1  # one image is unreadable
    printed = capsys.readouterr()
    assert printed.out == f"{output / 'explain.html'}\n"
    assert "broken.png: cannot be read as an image" in printed.err
    assert "1 of 4 images have no explanation" in printed.err
    rows = json.loads((output / "explain.json").read_text())["images"]
    assert ["error" in row for row in rows] == [False, False, True, False]
    named = {row["png"] for row in rows if "png" in row}
    assert named == {path.name for path in output.glob("*.png")}
    assert {row["target"] for row in rows if "png" in row} == {"ship"}
    page = (output / "explain.html").read_text()
    assert len(re.findall(r'<img src="data:image/jpeg;base64,[A-Za-z0-9+/=]+"', page)) == 6
    assert "c&lt;d&gt;.png" in page
    assert "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "taken at the input of blocks.5.attn" in page
    style = page.split("<style>")[1].split("</style>")[0]
    assert set(re.findall(r"var\((--\w+)", style)) <= set(re.findall(r"(--\w+):", style)) | {
        "--share"
    }  # each color is defined


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.png"], "--output DIR is required"),
        (["--output", "out"], "no images given"),
        (
            ["x.png", "--output", "out", "--method", "rollout", "--target", "1"],
            "--target has no effect on",
        ),
        (["x.png", "--output", "out", "--limit", "3"], "--limit works with --method locality only"),
        (["x.png", "--output", "out", "--beside", NANO], "--beside works with --method locality only"),
        (["x.png", "--output", "out", "--method", "locality", "--limit", "0"], "--limit 0 must be at least 1"),
        (["x.png", "--output", "out", "--batch-size", "0"], "batch_size=0 must be at least 1"),
    ],
)
def test_bad_usage_is_one_line(capsys, arguments, message):
    assert main(["explain", NANO, *arguments]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"localvit: error: {message}")


def test_a_class_that_the_model_lacks_is_bad_usage(images, tmp_path, capsys):
    flags = ["--workers", "0", "--device", "cpu", "--output", str(tmp_path / "out")]
    assert main(["explain", NANO, str(images), *flags, "--target", "whale"]) == 2
    assert "--target 'whale' is not a class of the model" in capsys.readouterr().err
    assert main(["explain", "resnet18", str(images), *flags, "--checkpoint", "missing.safetensors"]) == 1
    assert not (tmp_path / "out" / "explain.html").exists()


def test_the_command_draws_what_locality_does(images, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    output = tmp_path / "out"
    (images / "broken.png").unlink()
    (images / "cat").mkdir()
    (images / "a.png").rename(images / "cat" / "a.png")
    flags = ["--workers", "0", "--device", "cpu", "--output", str(output), "--method", "locality"]
    assert main(["explain", NANO, str(images), *flags]) == 0
    written = [str(output / name) for name in ("locality.png", "locality.json", "explain.html")]
    assert capsys.readouterr().out.split() == written
    (found,) = json.loads((output / "locality.json").read_text())
    assert (found["model"], found["images"]) == (NANO, 1)


def test_without_matplotlib_the_command_says_what_to_install_before_it_starts(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "localvit.explanations.measures_files", raising=False)
    flags = ["--device", "cpu", "--output", str(tmp_path / "out"), "--method", "locality"]
    assert main(["explain", NANO, str(images), *flags]) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line == 'localvit: error: drawing what locality does needs matplotlib: pip install "localvit[plot]"'
    assert not (tmp_path / "out").exists()


def test_a_file_name_does_not_leave_the_folder(tmp_path):
    model = small_model(NANO).eval()
    batch = torch.randn(1, 3, 32, 32)
    (found,) = localvit.explain(model, batch, "rollout", preprocessing=Preprocessing(input_size=(32, 32)))
    found = replace(found, file="/etc/../\x1b中\udce9/..\udce9.png")
    assert write_explanations([found, replace(found, file="...")], tmp_path / "out", "rollout", model="m") == (2, 0)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["0001-___.png", "0002-___.png"]


def test_the_documents_python_runs(capsys):
    text = (Path(__file__).parents[2] / "docs" / "explain.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    for line in block.splitlines():
        if ".shape  # (" in line:  # the shape that the comment states
            expression, comment = line.split("  # ")
            block = block.replace(line, f"assert {expression} == {comment[: comment.index(')') + 1]}")
    exec(compile(block, "docs/explain.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 2
