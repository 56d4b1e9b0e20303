"""`localvit eval`: what goes to standard output and standard error, and one clear line for each error."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import localvit
from localvit_cli import main
from terminals import run_on_terminal


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A checkpoint of two classes, and folders of good and bad images."""
    root = tmp_path_factory.mktemp("eval")
    torch.manual_seed(0)
    model = localvit.create_model("localvit_nano_patch4_32", num_classes=2)
    names = ["ape", "bat"]
    localvit.save_checkpoint(model, root / "good.safetensors", class_names=names)
    localvit.save_checkpoint(model, root / "nameless.pth", layout="published")
    noise = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    for path in ("good/ape/1.png", "good/bat/2.png", "good/bat/3.png", "other/cat/1.png", "broken/ape/1.png"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(root / path)
    (root / "broken" / "ape" / "2.jpg").write_bytes(b"\xff\xd8\xff")
    (root / "empty").mkdir()
    (root / "cut.safetensors").write_bytes((root / "good.safetensors").read_bytes()[:5000])
    return root


def evaluate(workplace, capsys, *arguments) -> tuple[int, str, str]:
    status = main(
        [
            "eval",
            *(argument.replace("@", str(workplace)) for argument in arguments),
            "--device",
            "cpu",
            "--workers",
            "0",
        ]
    )
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_standard_output_is_one_line(workplace, capsys):
    status, out, err = evaluate(
        workplace, capsys, "@/good.safetensors", "--data-set", "FOLDER", "--data-path", "@/good"
    )
    assert status == 0
    assert len(out.splitlines()) == 1
    assert out.startswith("* Acc@1 ")
    assert "raw weights of" in err
    assert "95 % interval of Acc@1: " in err  # of 3 images, at least half of the scale
    low, high = re.search(r"interval of Acc@1: (\S+) to (\S+) \(3 images\)", err).groups()
    assert float(high) - float(low) > 50


def test_without_class_names_classes_are_matched_by_position(workplace, capsys):
    named = evaluate(workplace, capsys, "@/good.safetensors", "--data-set", "FOLDER", "--data-path", "@/good")
    arguments = [
        "localvit_nano_patch4_32",
        "--checkpoint",
        "@/nameless.pth",
        "--data-set",
        "FOLDER",
        "--data-path",
        "@/good",
    ]
    nameless = evaluate(workplace, capsys, *arguments)
    assert nameless[0] == 0
    assert nameless[1] == named[1]


def test_options_that_do_not_change_the_result(workplace, capsys):
    arguments = ["@/good.safetensors", "--data-set", "FOLDER", "--data-path", "@/good"]
    plain = evaluate(workplace, capsys, *arguments)[1]
    for more in (["--batch-size", "1"], ["--channels-last"], ["--limit", "3"], ["--input-size", "32", "32"]):
        assert evaluate(workplace, capsys, *arguments, *more)[1] == plain, more


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close_to_float32(workplace, capsys, dtype):
    arguments = ["@/good.safetensors", "--data-set", "FOLDER", "--data-path", "@/good"]
    plain, half = (evaluate(workplace, capsys, *arguments, *more)[1] for more in ([], ["--dtype", dtype]))
    losses = [float(line.split()[-1]) for line in (plain, half)]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)  # bfloat16 keeps 8 bits of logits of about 0.1


def test_another_input_size_resamples_the_position_embedding(workplace, capsys):
    arguments = ["@/good.safetensors", "--data-set", "FOLDER", "--data-path", "@/good", "--input-size", "24", "40"]
    status, _, err = evaluate(workplace, capsys, *arguments)
    assert status == 0
    assert "24 x 40" in err


def test_report(workplace, capsys, tmp_path):
    arguments = ["@/good.safetensors", "--data-set", "FOLDER", "--data-path", "@/good", "--report", str(tmp_path / "r")]
    status, _, err = evaluate(workplace, capsys, *arguments)
    assert status == 0
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["per_class.csv", "report.html", "results.json"]
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    assert results["count"] == 3
    assert results["model"] == "localvit_nano_patch4_32"
    assert "report.html" in err


def test_skipped_images_are_counted(workplace, capsys):
    arguments = ["@/good.safetensors", "--data-set", "FOLDER", "--data-path", "@/broken", "--skip-unreadable"]
    status, out, err = evaluate(workplace, capsys, *arguments)
    assert status == 0
    assert out.splitlines()[0] == "skipped 1 unreadable of 2 images"
    assert "2.jpg" in err


GOOD = ["@/good.safetensors", "--data-set", "FOLDER", "--data-path", "@/good"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*GOOD, "--batch-size", "0"], "batch_size=0"),
        ([*GOOD, "--workers", "-1"], "workers=-1"),
        ([*GOOD, "--input-size", "0"], "--input-size 0"),
        ([*GOOD, "--input-size", "1", "2", "3"], "--input-size 1 2 3"),
        ([*GOOD, "--device", "abacus"], "--device abacus"),
    ],
)
def test_invalid_flag_values_exit_with_2(workplace, arguments, message, capsys):
    arguments = [argument.replace("@", str(workplace)) for argument in arguments]
    assert main(["eval", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["@/nowhere.pth"], "no checkpoint at"),
        (["@/cut.safetensors"], "truncated"),
        (["localvit_tiyn"], "did you mean localvit_tiny"),
        (["@/good.safetensors", "--data-path", "@/nowhere"], "no such folder"),
        (["@/good.safetensors", "--data-path", "@/good"], "no val/ folder"),
        (["@/good.safetensors"], "needs --data-path"),
        (["@/good.safetensors", "--data-set", "FOLDER", "--data-path", "@/empty"], "no class folders"),
        (["@/good.safetensors", "--data-set", "FOLDER", "--data-path", "@/other"], "'cat'"),
        (["@/good.safetensors", "--data-set", "FOLDER", "--data-path", "@/broken"], "2.jpg"),
        (["@/good.safetensors", "--data-set", "NONE", "--data-path", "@/good"], "--data-set NONE is not known"),
        (["@/good.safetensors", "--data-set", "imgnet"], "did you mean IMNET?"),
        (["@/good.safetensors", "--data-set", "FOLDER", "--data-path", "@/good", "--weights", "ema"], "no averaged"),
        (["@/good.safetensors", "--data-set", "FOLDER", "--data-path", "@/good", "--input-size", "30"], "30"),
        (["@/good.safetensors", "--data-set", "FOLDER", "--data-path", "@/good", "--real-labels"], "ILSVRC2012"),
        (["@/good.safetensors", "--data-set", "FOLDER", "--data-path", "@/good", "--limit", "0"], "limit"),
        (["localvit_tiny_mlp6_act1", "--data-set", "FOLDER", "--data-path", "@/good"], "No pretrained weights exist"),
    ],
)
def test_each_error_is_one_clear_line(workplace, capsys, arguments, message):
    status, out, err = evaluate(workplace, capsys, *arguments)
    assert status == 1
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("localvit: error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_device_falls_back_to_the_cpu_with_a_warning(workplace, capsys):
    arguments = [argument.replace("@", str(workplace)) for argument in ("@/good.safetensors", "--data-path", "@/good")]
    assert main(["eval", *arguments, "--data-set", "FOLDER", "--device", "cuda", "--workers", "0"]) == 0
    assert "warning: no CUDA device on this machine; running on cpu" in capsys.readouterr().err


def test_unknown_flags_exit_with_2(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["eval", "model", "--nonsense"])
    assert exit_.value.code == 2


def test_a_terminal_shows_a_progress_bar(workplace, tmp_path):
    """On a pseudo terminal, progress is a bar that is redrawn."""
    command = ["eval", str(workplace / "good.safetensors"), "--data-set", "FOLDER"]
    command += ["--data-path", str(workplace / "good"), "--device", "cpu", "--workers", "0"]
    program = f"import sys; from localvit_cli import main; sys.exit(main({command!r}))"
    shown, out = run_on_terminal(program, tmp_path, columns=80, outputs=("err",))
    assert out.startswith("* Acc@1")
    assert "\x1b[" in shown
    assert "3/3" in shown


def test_outputs_are_checked_before_the_evaluation(workplace, capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "report" / "report.html").mkdir(parents=True)
    for report in ("file", "file/report", "report", f"{'x' * 300}"):
        status, out, err = evaluate(workplace, capsys, *GOOD, "--report", str(tmp_path / report))
        assert (status, out) == (1, "")
        assert "cannot be written" in err
        assert "images" not in err.replace("choose another path", "")  # no progress line: nothing was evaluated
    assert (tmp_path / "file").read_text() == "mine"


def test_real_labels_need_the_classes_of_imagenet(workplace, capsys, tmp_path):
    """The labels are indices of ImageNet's 1,000 classes, which a model of two classes cannot predict."""
    (tmp_path / "ape").mkdir()
    (tmp_path / "bat").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "ape" / "ILSVRC2012_val_00000001.png")
    arguments = ["@/good.safetensors", "--data-set", "FOLDER", "--data-path", str(tmp_path), "--real-labels"]
    status, out, err = evaluate(workplace, capsys, *arguments)
    assert (status, out) == (1, "")
    assert "needs a model of the 1,000 classes of ImageNet-1k" in err


def test_the_result_is_printed_before_the_report_is_written(workplace, capsys, tmp_path, monkeypatch):
    def fill_the_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("localvit_cli.eval.write_report", fill_the_disk)
    status, out, err = evaluate(workplace, capsys, *GOOD, "--report", str(tmp_path / "report"))
    assert status == 1
    assert out.startswith("* Acc@1 ")
    assert "No space left" in err
