"""Writing the page, without a browser: what is refused, what stays, and how onnxruntime-web is fetched."""

import base64
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from exported_files import PREPROCESSING, linear_model, noise, tiny_model
from PIL import Image

import localvit_cli
from localvit.data.preprocessing import Preprocessing
from localvit.exporters import Onnx, export
from localvit.web_page import write_page
from localvit.web_page.resizer import write_resizer
from localvit.web_page.vendored import web_runtime

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CARRIED = ("model.onnx", "resizer.onnx", "worker.js", "ort.mjs", "ort.wasm", "ort-gpu.mjs", "ort-gpu.wasm")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    """A user's cache without onnxruntime-web."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "localvit"


@pytest.fixture
def fake_runtime(empty_cache) -> None:
    """Files in the cache as npm would have put them there, which no browser is going to run."""
    [version] = json.loads((ROOT / "src/localvit/web_page/npm/package.json").read_text())["dependencies"].values()
    folder = empty_cache / f"onnxruntime-web-{version}"
    folder.mkdir(parents=True)
    for name in (
        "ort.wasm.bundle.min.mjs",
        "ort-wasm-simd-threaded.wasm",
        "ort.webgpu.bundle.min.mjs",
        "ort-wasm-simd-threaded.asyncify.wasm",
    ):
        (folder / name).write_bytes(b"runtime")


def failing_npm(folder: Path, monkeypatch, message: str) -> None:
    folder.mkdir()
    npm = folder / "npm"
    npm.write_text(f"#!/bin/sh\necho 'npm error {message}' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_without_npm_the_command_says_what_to_install(empty_cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert localvit_cli.main(["demo", "--web", str(tmp_path / "page")]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "npm is not installed: install Node.js" in line
    assert str(empty_cache / "onnxruntime-web-") in line
    assert not (tmp_path / "page").exists()


def test_when_npm_fails_its_reason_is_shown_and_nothing_stays(empty_cache, tmp_path, monkeypatch):
    failing_npm(tmp_path / "bin", monkeypatch, "code ENOTFOUND")
    with pytest.raises(RuntimeError, match=r"npm could not fetch onnxruntime-web [\d.]+ \(code ENOTFOUND\): check the"):
        web_runtime()
    assert list(empty_cache.iterdir()) == []


def test_the_version_and_every_hash_are_pinned():
    npm = ROOT / "src/localvit/web_page/npm"
    [version] = json.loads((npm / "package.json").read_text())["dependencies"].values()
    packages = json.loads((npm / "package-lock.json").read_text())["packages"]
    assert packages["node_modules/onnxruntime-web"]["version"] == version
    assert all(package["integrity"].startswith("sha512-") for name, package in packages.items() if name)


def test_the_resizer_gives_the_pixels_of_evaluation(tmp_path):
    import onnxruntime

    preprocessing = Preprocessing(input_size=(24, 32), crop_pct=0.8, interpolation="bilinear")
    write_resizer(preprocessing, tmp_path / "resizer.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "resizer.onnx"))
    for height, width in ((53, 61), (401, 37), (7, 11), (24, 32)):
        image = noise(height, width, 3)
        [seen] = session.run(None, {"images": image.transpose(2, 0, 1)[None]})
        assert np.array_equal(seen[0].transpose(1, 2, 0), np.asarray(preprocessing.resizing()(Image.fromarray(image))))


def test_a_page_replaces_an_earlier_one_and_nothing_else(fake_runtime, tmp_path):
    file, page, other = tmp_path / "tiny.onnx", tmp_path / "page", tmp_path / "other"
    export(linear_model(), file, Onnx(dynamic="none"), preprocessing=PREPROCESSING)
    for path, content in (
        (page / "index.html", '<meta name="generator" content="localvit 0.0.1">'),
        (page / "carried" / "old.js", "old"),
        (other / "thesis.txt", "mine"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    index = write_page(file, page, webgpu=True)
    assert "Image classification" in index.read_text()
    assert 'id="gpu"' in index.read_text()
    names = {path.name for path in (page / "carried").iterdir()}
    assert names == {f"{name}.js" for name in CARRIED}
    text = (page / "carried" / "model.onnx.js").read_text()
    assert b"".join(map(base64.b64decode, re.findall(r'"([^"]*)",\n', text))) == file.read_bytes()

    with pytest.raises(FileExistsError, match="contains something else than a page"):
        write_page(file, other)
    with pytest.raises(FileExistsError, match="is a file: give the path of a folder"):
        write_page(file, other / "thesis.txt")
    assert (other / "thesis.txt").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "other", "page", "tiny.onnx", "tiny.onnx.json"}


def test_files_that_cannot_serve_are_refused(fake_runtime, tmp_path):
    raw = tmp_path / "raw.onnx"
    export(tiny_model(), raw, Onnx(include=(), dynamic="none"), preprocessing=PREPROCESSING)
    with pytest.raises(ValueError, match=r"raw\.onnx takes normalized images: export the checkpoint without --raw"):
        write_page(raw, tmp_path / "page")
    with pytest.raises(ValueError, match=r"model\.xml cannot run in a browser: give an \.onnx file"):
        write_page(tmp_path / "model.xml", tmp_path / "page")
    squashed = Preprocessing.from_dict(PREPROCESSING.to_dict() | {"crop_mode": "squash"})
    with pytest.raises(ValueError, match="only for a center crop"):
        write_resizer(squashed, tmp_path / "resizer.onnx")
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "a.onnx"], "--model has no effect without --web DIR"),
        (["--webgpu"], "--webgpu has no effect without --web DIR"),
        (["--web", "page", "--seed", "1"], "--seed has no effect with --web, which trains nothing"),
    ],
)
def test_options_that_would_be_ignored(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert localvit_cli.main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
