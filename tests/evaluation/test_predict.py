"""Predictions for files, folders and patterns, in Python and on the command line, in every output format."""

import csv
import io
import json
import os
import signal
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from localvit import create_model, save_checkpoint
from localvit.data.classes import imagenet_synsets, readable_class_names
from localvit.data.folders import PathImages
from localvit.data.images import DataError, UnreadableImage, load_image
from localvit.data.preprocessing import Preprocessing
from localvit.evaluation.predict import Prediction, predict
from localvit.inference.runner import InferenceOptions
from localvit_cli import main
from localvit_cli.predict import Predict, _open_output
from localvit_cli.prediction_formats import WRITERS
from processes import run_localvit, start, status_of

NAMES = ["ant", 'a "big" crow, black', "bée\nor wasp"]
CPU = torch.device("cpu")
MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.7, 1.1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A nano LocalViT of three classes, with random weights large enough that images differ in their top class."""
    torch.manual_seed(3)
    model = create_model("localvit_nano_patch4_32", num_classes=3)
    torch.nn.init.normal_(model.head.weight)
    preprocessing = Preprocessing(input_size=(32, 32), crop_pct=1.0, mean=MEAN, std=STD)
    path = tmp_path_factory.mktemp("model") / "nano.safetensors"
    averaged = {key: value / 2 if key == "head.weight" else value for key, value in model.state_dict().items()}
    return save_checkpoint(model, path, class_names=NAMES, preprocessing=preprocessing.to_dict(), ema=averaged)


def noise(seed: int, height: int = 43, width: int = 53) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def by_hand(checkpoint: Path, path: Path, weights: str = "raw") -> np.ndarray:
    """Probabilities from PIL, NumPy and the model, called directly on one image."""
    from safetensors.torch import load_file

    model = create_model("localvit_nano_patch4_32", num_classes=3).eval()
    held = load_file(checkpoint)
    prefix = f"{weights}/"
    model.load_state_dict({key.removeprefix(prefix): value for key, value in held.items() if key.startswith(prefix)})
    image = Image.open(path).convert("RGB")
    width, height = image.size
    assert width > height
    wide = int(32 * width / height)
    left = round((wide - 32) / 2)
    image = image.resize((wide, 32), Image.Resampling.BICUBIC).crop((left, 0, left + 32, 32))
    values = (np.asarray(image) / 255.0 - MEAN) / STD
    with torch.no_grad():
        logits = model(torch.from_numpy(values.transpose(2, 0, 1)[None]).float())[0].double().numpy()
    odds = np.exp(logits - logits.max())
    return odds / odds.sum()


def run(*arguments: object) -> int:
    return main(["predict", *map(str, arguments), "--device", "cpu", "--workers", "0"])


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_probabilities_equal_those_computed_by_hand(checkpoint, tmp_path, capsys, weights):
    paths = [save(tmp_path / f"{seed}.png", noise(seed)) for seed in range(5)]
    assert run(checkpoint, *paths, "--format", "jsonl", "--weights", weights, "--batch-size", 2) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["file"] for row in rows] == [str(path) for path in paths]
    for row, path in zip(rows, paths, strict=True):
        expected = by_hand(checkpoint, path, weights)
        best = [(entry["class"], entry["name"]) for entry in row["predictions"]]
        assert best == [(index, NAMES[index]) for index in np.argsort(-expected).tolist()]
        probabilities = [entry["probability"] for entry in row["predictions"]]
        # Six digits are written; float32 logits of batches of 2 and 1 differ in the last bits.
        np.testing.assert_allclose(probabilities, np.sort(expected)[::-1], rtol=2e-5)


def test_all_formats_contain_the_same_values(checkpoint, tmp_path, capsys):
    paths = [save(tmp_path / name, noise(index)) for index, name in enumerate(("a\rb.png", 'ü,"\n.png'))]
    arguments = [checkpoint, paths[0], tmp_path / "missing.png", paths[1], "--topk", 2]
    output = {}
    for name in WRITERS:
        assert run(*arguments, "--format", name) == 1
        output[name] = capsys.readouterr().out
        written = tmp_path / "out" / name
        assert run(*arguments, "--format", name, "--output", written) == 1
        assert capsys.readouterr().out == ""
        assert written.read_bytes().decode() == output[name]
        assert list(written.parent.iterdir()) == [written]
        written.unlink()
    rows = json.loads(output["json"])
    assert [json.loads(line) for line in output["jsonl"].splitlines()] == rows
    assert [len(row["predictions"]) for row in rows] == [2, 0, 2]
    assert [row["error"] for row in rows] == [None, "no such file or folder", None]
    flat = []
    for row in rows:
        flat += [
            [row["file"], str(rank), str(best["class"]), best["name"], best["probability"], ""]
            for rank, best in enumerate(row["predictions"], start=1)
        ]
        flat += [[row["file"], "", "", "", "", row["error"]]] if row["error"] else []
    header, *lines = csv.reader(io.StringIO(output["csv"], newline=""))
    assert header == ["file", "rank", "class", "name", "probability", "error", "abstained"]
    assert {line[6] for line in lines} == {"false"}
    assert [[*line[:4], float(line[4]) if line[4] else "", line[5]] for line in lines] == flat
    table = output["table"].splitlines()
    assert len(table) == 1 + 3 + 2 + 3  # one line per image, class or error, also for names with a newline
    assert [line.split()[0] for line in table[2:4]] == [f"{100 * b['probability']:.2f}" for b in rows[0]["predictions"]]


def test_images_are_predicted_in_the_given_order_and_as_often_as_given(checkpoint, tmp_path, capsys):
    for name in ("d/b.png", "d/a.png", "d/c/z.png", "d/.hidden.png", "d/.git/x.png", "1.png"):
        save(tmp_path / name, noise(1))
    (tmp_path / "d" / "notes.txt").write_text("not an image")
    single = tmp_path / "1.png"
    run(checkpoint, single, tmp_path / "d", single, single, "--format", "jsonl", "--batch-size", 2)
    files = [json.loads(line)["file"] for line in capsys.readouterr().out.splitlines()]
    assert [Path(file).relative_to(tmp_path).as_posix() for file in files] == [
        *("1.png", "d/a.png", "d/b.png", "d/c/z.png", "1.png", "1.png")
    ]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.png", ["x.png"]),
        ("d/*.PNG", ["d/b.PNG"]),
        ("**/*.png", ["d/a[1].png", "d/e/c.png", "x.png"]),
        ("**", ["d/a[1].png", "d/b.PNG", "d/e/c.png", "x.png"]),
        ("./d/**", ["d/a[1].png", "d/b.PNG", "d/e/c.png"]),
        ("*", ["d/a[1].png", "d/b.PNG", "d/e/c.png", "x.png"]),
        ("d/[ab]*", ["d/a[1].png", "d/b.PNG"]),
        ("d/a[1].png", ["d/a[1].png"]),  # a file with exactly this name
        (".h/*", [".h/y.png"]),
    ],
)
def test_patterns(tmp_path, monkeypatch, pattern, expected):
    for name in ("x.png", "d/a[1].png", "d/b.PNG", "d/e/c.png", ".h/y.png", "d/.f/u.png"):
        save(tmp_path / name, noise(1, 2, 2))
    (tmp_path / "notes.txt").write_text("not an image")
    monkeypatch.chdir(tmp_path)
    assert PathImages([pattern]).paths == expected


@pytest.mark.parametrize(
    ("paths", "reason"),
    [
        ([], "no path was given"),
        (["missing.png"], "missing.png: no such file or folder"),
        (["empty"], "empty: a folder without images"),
        (["*.webp"], r"\*.webp: no image matches this pattern"),
        (["empty", "missing.png"], "empty: a folder without images; missing.png: no such file or folder"),
    ],
)
def test_no_image_at_all_is_an_error(tmp_path, monkeypatch, paths, reason):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("not an image")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=reason):
        PathImages(paths)


PIL_IMAGE = Image.new("RGB", (3, 5))


@pytest.mark.parametrize("images", [PIL_IMAGE, [PIL_IMAGE], np.zeros((5, 3, 3)), [b"a"], 7])
def test_what_is_not_a_path_is_an_error_that_names_the_type(images):
    with pytest.raises(TypeError, match=r"their paths, or as an ImageSequence .* a (Image|ndarray|bytes|int) "):
        predict("localvit_nano_patch4_32", images)


def _bad_files(folder: Path) -> dict[str, str]:
    """Creates files and folders without a readable image; returns part of the expected error of each."""
    save(folder / "good.png", noise(1))
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:-900])
    (folder / "text.jpg").write_text("not an image")
    (folder / "folder").mkdir()
    Image.fromarray(np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3)).save(folder / "float.tiff")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    return {
        "empty.jpg": "cannot identify",
        "cut.png": "cannot be read as an image",
        "text.jpg": "cannot identify",
        "folder": "a folder without images",
        "float.tiff": "32-bit pixels",
        "missing.jpg": "no such file or folder",
        "*.webp": "no image matches",
        "gone.png": "no such file",
    }


def test_unreadable_files_are_reported_and_the_others_predicted(checkpoint, tmp_path, capsys):
    bad = _bad_files(tmp_path)
    good = tmp_path / "good.png"
    paths = [good, *(path for name in bad for path in (tmp_path / name, good))]
    assert run(checkpoint, *paths, "--format", "json", "--batch-size", 3) == 1
    captured = capsys.readouterr()
    rows = json.loads(captured.out)
    assert [row["file"] for row in rows] == [str(path) for path in paths]
    for row in rows[::2]:
        assert row["error"] is None
        assert [best["class"] for best in row["predictions"]] == [best["class"] for best in rows[0]["predictions"]]
        # The same image in batches of other sizes: float32 logits differ in the last bits.
        probabilities = [[best["probability"] for best in each["predictions"]] for each in (row, rows[0])]
        np.testing.assert_allclose(*probabilities, rtol=2e-5)
    assert len(rows[0]["predictions"]) == 3
    for row, (name, reason) in zip(rows[1::2], bad.items(), strict=True):
        assert row["predictions"] == []
        assert reason in row["error"]
        assert f"{tmp_path / name}: {row['error']}\n" in captured.err
    assert f"{len(bad)} of {len(paths)} images have no prediction" in captured.err


def _animation(path: Path) -> None:
    frames = [Image.new("RGB", (5, 3), color) for color in ((200, 100, 50), (1, 2, 3))]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def _palette(path: Path) -> None:
    image = Image.new("P", (5, 3), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(path)


ODD_IMAGES = {
    "animated.gif": (_animation, (200, 100, 50)),
    "animated.png": (_animation, (200, 100, 50)),
    "palette.png": (_palette, (200, 100, 50)),
    "1x1.png": (lambda path: Image.new("RGB", (1, 1), (200, 100, 50)).save(path), (200, 100, 50)),
    "alpha.png": (lambda path: Image.new("RGBA", (5, 3), (200, 100, 50, 7)).save(path), (200, 100, 50)),
    "gray.png": (lambda path: Image.new("L", (5, 3), 77).save(path), (77, 77, 77)),
    "bit.png": (lambda path: Image.new("1", (5, 3), 1).save(path), (255, 255, 255)),
    # Each ink and black reduce the light: 255 * (1 - c) * (1 - k).
    "cmyk.tiff": (lambda path: Image.new("CMYK", (5, 3), (51, 102, 0, 51)).save(path), (163, 122, 204)),
    "16bit.png": (
        lambda path: Image.fromarray(np.full((3, 5), 77 * 256 + 200, dtype=np.uint16)).save(path),
        (77, 77, 77),
    ),
}


@pytest.mark.parametrize("name", ODD_IMAGES)
def test_odd_images_have_their_color(checkpoint, tmp_path, name):
    make, color = ODD_IMAGES[name]
    make(tmp_path / name)
    images = PathImages([str(tmp_path / name)])
    assert np.asarray(load_image(images, 0))[0, 0].tolist() == pytest.approx(color, abs=1)  # rounding of CMYK
    assert run(checkpoint, tmp_path / name) == 0


def test_names_that_are_not_utf8(checkpoint, tmp_path, capfd):
    save(tmp_path / "good.png", noise(1))
    odd = os.fsencode(tmp_path) + b"/caf\xe9.png"
    try:
        Path(os.fsdecode(odd)).write_bytes((tmp_path / "good.png").read_bytes())
        Path(os.fsdecode(odd.replace(b"caf", b"bad"))).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    for name in WRITERS:
        for extra in ([], ["--output", tmp_path / "out"]):
            assert run(checkpoint, tmp_path, "--format", name, *extra) == 1
            text = (tmp_path / "out").read_text(encoding="utf-8") if extra else capfd.readouterr().out
            assert "caf\\udce9.png" in text
            if name == "json":
                assert [os.fsencode(row["file"]) for row in json.loads(text)][1] == odd


class CountingImages(PathImages):
    """Counts how often an image is decoded."""

    loads = 0

    def load(self, index: int) -> Image.Image:
        self.loads += 1
        return super().load(index)


def test_images_are_decoded_as_predictions_are_consumed(tmp_path):
    images = CountingImages([str(save(tmp_path / "1.png", noise(1, 3, 3)))] * 3001)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 7)).eval()
    options = InferenceOptions(batch_size=5, workers=0, device=CPU)
    predictions = predict(model, images, Preprocessing(input_size=(4, 4)), options, topk=2)
    assert images.loads == 0
    taken = []
    for number in range(1, 14):
        taken.append(weakref.ref(next(predictions)))
        assert number <= images.loads < number + 5
    # Of the consumed predictions, only the current batch may still be in memory.
    assert sum(reference() is not None for reference in taken) <= 5
    assert sum(1 for _ in predictions) == 3001 - 13


@pytest.mark.parametrize("name", WRITERS)
def test_no_format_keeps_predictions_in_memory(name):
    made = []
    alive = []

    def predictions():
        for _ in range(3000):
            prediction = Prediction(file="x", classes=(1,), class_names=("b",), probabilities=(0.5,))
            made.append(weakref.ref(prediction))
            yield prediction
            del prediction
            alive.append(sum(reference() is not None for reference in made[-50:]))

    WRITERS[name](predictions(), io.StringIO())
    assert len(alive) == 3000
    assert max(alive) <= 2


def test_output_that_is_not_finite_is_an_error_of_the_image(tmp_path):
    class Broken(torch.nn.Module):
        def forward(self, images_BCHW):
            logits_BM = torch.zeros(len(images_BCHW), 4)
            logits_BM[1, 2] = float("nan")
            return logits_BM

    images = PathImages([str(save(tmp_path / "1.png", noise(1)))] * 3)
    options = InferenceOptions(workers=0, device=CPU)
    first, second, third = predict(Broken().eval(), images, Preprocessing(input_size=(4, 4)), options, topk=9)
    assert first.probabilities == third.probabilities == (0.25,) * 4
    assert second.error == "the model's output is not finite"
    assert second.classes == ()


def test_python_and_the_command_line_give_the_same_predictions(checkpoint, tmp_path, capsys):
    paths = [save(tmp_path / "photos" / f"{seed}.png", noise(seed)) for seed in range(3)]
    assert run(checkpoint, *paths, "--format", "jsonl", "--topk", 2) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    options = InferenceOptions(workers=0, device=CPU)
    for images in (paths, str(tmp_path / "photos"), tmp_path / "photos", f"{tmp_path}/photos/*.png"):
        predictions = list(predict(checkpoint, images, options=options, topk=2))
        assert [prediction.file for prediction in predictions] == [str(path) for path in paths]
        for prediction, row in zip(predictions, rows, strict=True):
            assert list(prediction.class_names) == [best["name"] for best in row["predictions"]]
            written = [best["probability"] for best in row["predictions"]]
            assert list(prediction.probabilities) == pytest.approx(written, rel=1e-6)  # six digits are written


def test_a_printed_prediction_shows_names_and_probabilities():
    prediction = Prediction(file="a.jpg", classes=(3, 1), class_names=("owl", "crow"), probabilities=(0.75, 0.0625))
    assert str(prediction) == "a.jpg: owl 75.0 %, crow 6.2 %"
    assert str(Prediction(file="b.jpg", error="no such file")) == "b.jpg: no such file"


@pytest.mark.parametrize(("topk", "expected"), [(1, 1), (3, 3), (50, 3)])
def test_topk_is_limited_to_the_number_of_classes(checkpoint, tmp_path, capsys, topk, expected):
    run(checkpoint, save(tmp_path / "1.png", noise(1)), "--topk", topk, "--format", "jsonl")
    assert len(json.loads(capsys.readouterr().out)["predictions"]) == expected


def test_topk_below_one(checkpoint, tmp_path, capsys):
    assert run(checkpoint, save(tmp_path / "1.png", noise(1)), "--topk", 0) == 1
    assert "localvit: error: topk=0 must be at least 1" in capsys.readouterr().err


def test_input_size(checkpoint, tmp_path, capsys):
    path = save(tmp_path / "1.png", noise(1))
    outputs = []
    for sides in ((), (32, 32), (48, 32)):
        run(checkpoint, path, "--format", "jsonl", *(["--input-size", *sides] if sides else []))
        captured = capsys.readouterr()
        outputs.append(captured.out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert "48 x 32" in captured.err


def test_readable_class_names():
    words = readable_class_names(imagenet_synsets(), 1000)
    assert [words[index].split(",")[0] for index in (0, 207, 999)] == ["tench", "golden retriever", "toilet tissue"]
    assert readable_class_names(["n01440764"], 1) == ["n01440764"]
    assert readable_class_names(None, 3) == ["0", "1", "2"]


def test_output_is_written_atomically(tmp_path):
    output = tmp_path / "predictions.csv"
    output.write_text("older")

    def interrupted():
        with _open_output(output) as stream:
            stream.write("half")
            stream.flush()
            assert output.read_text() == "older"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert output.read_text() == "older"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_a_full_disk_is_named(tmp_path):
    with (
        pytest.raises(OSError, match=r"No space left on device: .*predictions\.csv"),
        _open_output(tmp_path / "predictions.csv"),
    ):
        Path("/dev/full").write_text("a prediction")


def test_an_empty_path_is_not_the_current_folder(tmp_path, monkeypatch):
    """It comes from a variable of the shell that is not set."""
    save(tmp_path / "x.png", noise(1))
    monkeypatch.chdir(tmp_path)
    assert PathImages(["x.png", ""]).problems == {1: "an empty path"}
    with pytest.raises(DataError, match="an empty path"):
        PathImages([""])


def test_an_output_that_is_a_folder_is_refused_before_the_work(tmp_path):
    with pytest.raises(ValueError, match="not a regular file"):
        Predict(model="missing.safetensors", paths=("image.png",), output=tmp_path).run()


def test_an_output_that_is_a_link_is_refused_rather_than_replaced(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "stdout").symlink_to("file")
    with pytest.raises(ValueError, match="not a regular file"):
        Predict(model="missing.safetensors", paths=("image.png",), output=tmp_path / "stdout").run()


def test_a_json_array_is_closed_after_an_exception():
    def predictions():
        yield Prediction(file="x", classes=(1,), class_names=("b",), probabilities=(0.5,))
        raise RuntimeError("died")

    stream = io.StringIO()
    with pytest.raises(RuntimeError, match="died"):
        WRITERS["json"](predictions(), stream)
    assert [row["file"] for row in json.loads(stream.getvalue())] == ["x"]
    WRITERS["json"](iter(()), empty := io.StringIO())
    assert json.loads(empty.getvalue()) == []


def test_the_error_of_a_missing_file_names_it_once(tmp_path):
    images = PathImages([str(save(tmp_path / "1.png", noise(1))), "nowhere.png"])
    with pytest.raises(UnreadableImage, match=r"^nowhere.png: no such file or folder$"):
        load_image(images, 1)


def test_the_command_with_worker_processes(checkpoint, tmp_path, capfd):
    bad = _bad_files(tmp_path)
    assert main(["predict", str(checkpoint), str(tmp_path), "--format", "jsonl", "--device", "cpu"]) == 1
    printed = capfd.readouterr()
    assert "Traceback" not in printed.err
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [Path(row["file"]).name for row in rows] == sorted(
        [*(name for name in bad if (tmp_path / name).is_file() or name == "gone.png"), "good.png"]
    )
    assert [row["error"] is None for row in rows] == [Path(row["file"]).name == "good.png" for row in rows]


def test_a_closed_pipe_ends_silently_and_an_interrupt_prints_one_line(checkpoint, tmp_path):
    path = save(tmp_path / "1.png", noise(1))
    arguments = [checkpoint, *[path] * 20_000, "--format", "csv", "--batch-size", 1, "--device", "cpu"]
    for stop in ("close", "interrupt"):
        pipe, err = tmp_path / f"{stop} pipe", tmp_path / f"{stop} err"
        os.mkfifo(pipe)
        process = start(run_localvit, "predict", *arguments, out=pipe, err=err, own_session=True)
        with pipe.open() as out:
            assert out.readline().startswith('"file"')
            if stop == "interrupt":
                os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the worker processes get it too
                out.read()
        assert status_of(process, 60) == (130 if stop == "interrupt" else 0)
        errors = err.read_text()
        assert errors.endswith("localvit: interrupted\n") or stop == "close"
        assert "Traceback" not in errors
        assert "Exception" not in errors
