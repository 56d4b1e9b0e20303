"""The programs of examples/, run as they are, beside `localvit.predict`."""

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import localvit
from processes import free_port

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

EXAMPLES = Path(__file__).parents[2] / "examples"
WITHOUT_THIS_PACKAGE = "import runpy, sys; sys.modules.update(torch=None, localvit=None); sys.argv.pop(0); "


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> list[Path]:
    """Images of several sizes and modes, smaller and larger than the model's."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    paths = []
    for number, (height, width, mode) in enumerate(
        [(211, 307, "RGB"), (31, 29, "RGB"), (97, 61, "L"), (53, 71, "RGBA")]
    ):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        paths.append(folder / f"{number}.png")
        coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(paths[-1])
    return paths


def test_fifteen_lines_classify_as_predict_does(resizing, checkpoint, photographs):
    program = WITHOUT_THIS_PACKAGE + f"runpy.run_path({str(EXAMPLES / 'onnx_predict.py')!r}, run_name='__main__')"
    command = [sys.executable, "-c", program, "onnx_predict.py", resizing[0], *photographs]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    wanted = list(localvit.predict(checkpoint, photographs, topk=1))
    assert [line[:2] for line in lines] == [[each.file, each.class_names[0]] for each in wanted]
    # Printed with six digits; the resized pixels are equal.
    np.testing.assert_allclose(
        [float(line[2]) for line in lines], [each.probabilities[0] for each in wanted], atol=1e-5
    )


@pytest.fixture(scope="module")
def service(resizing):
    for module in ("fastapi", "uvicorn", "python_multipart"):
        pytest.importorskip(module)
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "rest_service:app", "--port", str(port), "--app-dir", EXAMPLES]
    environment = os.environ | {"MODEL": str(resizing[0])}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if "running on" in line:
                    break
            yield f"http://127.0.0.1:{port}/classify"
        finally:
            process.terminate()


def post(address: str, files: dict[str, bytes]) -> tuple[int, object]:
    """Status and content of the answer to some uploaded files."""
    boundary = uuid.uuid4().hex
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="images"; filename="{name}"\r\n\r\n'.encode() + content
        for name, content in files.items()
    ]
    body = b"\r\n".join([*parts, f"--{boundary}--\r\n".encode()])
    request = urllib.request.Request(
        address, body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}, method="POST"
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_the_service_classifies_several_images(service, checkpoint, photographs):
    status, found = post(service, {path.name: path.read_bytes() for path in photographs})
    assert status == 200
    for scores, wanted in zip(found, localvit.predict(checkpoint, photographs), strict=True):
        assert list(scores) == list(wanted.class_names)
        np.testing.assert_allclose(list(scores.values()), wanted.probabilities, atol=1e-5)


def test_the_service_says_what_is_wrong(service, photographs, tmp_path):
    image = photographs[1].read_bytes()
    huge = tmp_path / "huge.png"
    Image.new("1", (8000, 5001)).save(huge)
    for files, status, message in (
        ({f"{number}.png": image for number in range(17)}, 413, "17 images: send at most 16"),
        ({"large.png": image + bytes(10_000_000)}, 413, "large.png has more than 10,000,000 bytes"),
        ({"huge.png": huge.read_bytes()}, 413, "huge.png has more than 40,000,000 pixels"),
        ({"notes.txt": b"no image"}, 415, "notes.txt is not a JPEG, PNG or WebP image"),
        ({"cut.png": image[:100]}, 415, "cut.png is not a JPEG, PNG or WebP image"),
        ({}, 422, "images"),
    ):
        found, answer = post(service, files)
        assert (found, bool(re.search(re.escape(message), json.dumps(answer)))) == (status, True), answer
    assert post(service, {"good.png": image})[0] == 200


def test_the_service_does_not_start_with_a_model_of_one_size(tmp_path):
    """It would answer every image of another size with an internal error."""
    for module in ("onnxruntime", "fastapi", "python_multipart"):
        pytest.importorskip(module)
    onnx = pytest.importorskip("onnx")
    images, result = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, [1, 3, 32, 32])
        for name in ("images", "result")
    )
    node = onnx.helper.make_node("Identity", ["images"], ["result"])
    graph = onnx.helper.make_graph([node], "one_size", [images], [result])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.helper.set_model_props(model, {"class_names": '["ape"]'})
    onnx.save(model, tmp_path / "model.onnx")
    environment = os.environ | {"MODEL": str(tmp_path / "model.onnx")}
    command = [sys.executable, "-c", "import rest_service"]
    done = subprocess.run(command, cwd=EXAMPLES, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("takes images of one size only: export it with --include resize")
