"""`localvit eval` as a person meets it: what is printed where, and one clear line for whatever is wrong."""

import io
import json
import os
import pty
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import localvit
from localvit_cli import main


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A checkpoint of two classes and folders of images, good and bad."""
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
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_line_is_all_of_standard_output(workplace, capsys):
    status, out, err = evaluate(
        workplace, capsys, "@/good.safetensors", "--data-set", "FOLDER", "--data-path", "@/good"
    )
    assert status == 0
    assert len(out.splitlines()) == 1
    assert out.startswith("* Acc@1 ")
    assert "raw weights of" in err  # which weights were used is said


def test_a_published_layout_without_names_counts_folders(workplace, capsys):
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


def test_options_that_change_no_result(workplace, capsys):
    asked = ["@/good.safetensors", "--data-set", "FOLDER", "--data-path", "@/good"]
    plain = evaluate(workplace, capsys, *asked)[1]
    for more in (["--batch-size", "1"], ["--channels-last"], ["--limit", "3"], ["--input-size", "32", "32"]):
        assert evaluate(workplace, capsys, *asked, *more)[1] == plain, more


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near(workplace, capsys, dtype):
    asked = ["@/good.safetensors", "--data-set", "FOLDER", "--data-path", "@/good"]
    plain, half = (evaluate(workplace, capsys, *asked, *more)[1] for more in ([], ["--dtype", dtype]))
    losses = [float(line.split()[-1]) for line in (plain, half)]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)  # bfloat16 keeps 8 bits of logits of about 0.1


def test_another_size_resamples_the_positions(workplace, capsys):
    asked = ["@/good.safetensors", "--data-set", "FOLDER", "--data-path", "@/good", "--input-size", "24", "40"]
    status, _, err = evaluate(workplace, capsys, *asked)
    assert status == 0
    assert "24 x 40" in err


def test_report(workplace, capsys, tmp_path):
    asked = ["@/good.safetensors", "--data-set", "FOLDER", "--data-path", "@/good", "--report", str(tmp_path / "r")]
    status, _, err = evaluate(workplace, capsys, *asked)
    assert status == 0
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["per_class.csv", "report.html", "results.json"]
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    assert results["count"] == 3
    assert results["model"] == "localvit_nano_patch4_32"
    assert "report.html" in err


def test_skipped_images_are_counted(workplace, capsys):
    asked = ["@/good.safetensors", "--data-set", "FOLDER", "--data-path", "@/broken", "--skip-unreadable"]
    status, out, err = evaluate(workplace, capsys, *asked)
    assert status == 0
    assert out.splitlines()[0] == "1 unreadable images left out of 2"
    assert "2.jpg" in err


GOOD = ["@/good.safetensors", "--data-set", "FOLDER", "--data-path", "@/good"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([*GOOD, "--batch-size", "0"], "batch_size=0"),
        ([*GOOD, "--workers", "-1"], "workers=-1"),
        ([*GOOD, "--input-size", "0"], "--input-size 0"),
        ([*GOOD, "--input-size", "1", "2", "3"], "--input-size 1 2 3"),
        ([*GOOD, "--device", "abacus"], "--device abacus"),
    ],
)
def test_flags_that_make_no_sense_are_status_2(workplace, arguments, says, capsys):
    arguments = [argument.replace("@", str(workplace)) for argument in arguments]
    assert main(["eval", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert says in said.err


@pytest.mark.parametrize(
    ("arguments", "says"),
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
        (["@/good.safetensors", "--data-set", "FOLDER", "--data-path", "@/good", "--weights", "ema"], "no averaged"),
        (["@/good.safetensors", "--data-set", "FOLDER", "--data-path", "@/good", "--input-size", "30"], "30"),
        (["@/good.safetensors", "--data-set", "FOLDER", "--data-path", "@/good", "--real-labels"], "ILSVRC2012"),
        (["@/good.safetensors", "--data-set", "FOLDER", "--data-path", "@/good", "--limit", "0"], "limit"),
        (["localvit_nano_patch4_32", "--data-set", "FOLDER", "--data-path", "@/good"], "No pretrained weights exist"),
    ],
)
def test_one_clear_line_for_what_is_wrong(workplace, capsys, arguments, says):
    status, out, err = evaluate(workplace, capsys, *arguments)
    assert status == 1
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("localvit: error:")]
    assert len(errors) == 1
    assert says in errors[0]
    assert "Traceback" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, so asking for one works")
def test_asking_for_a_missing_device_falls_back_with_a_warning(workplace, capsys):
    asked = [argument.replace("@", str(workplace)) for argument in ("@/good.safetensors", "--data-path", "@/good")]
    assert main(["eval", *asked, "--data-set", "FOLDER", "--device", "cuda", "--workers", "0"]) == 0
    assert "warning: no CUDA device on this machine; running on cpu" in capsys.readouterr().err


def test_bad_usage_is_status_2(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["eval", "model", "--nonsense"])
    assert exit_.value.code == 2


def test_a_terminal_gets_a_bar(workplace):
    """On a pseudo terminal the progress is a bar that is redrawn; in a pipe it is lines."""
    command = [
        sys.executable,
        "-m",
        "localvit",
        "eval",
        str(workplace / "good.safetensors"),
        "--data-set",
        "FOLDER",
    ]
    command += ["--data-path", str(workplace / "good"), "--device", "cpu", "--workers", "0"]
    leader, follower = pty.openpty()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=follower, env=os.environ | {"TERM": "xterm"}
    ) as process:
        os.close(follower)
        seen = io.BytesIO()
        try:
            while chunk := os.read(leader, 4096):
                seen.write(chunk)
        except OSError:  # Linux's way to say that the other end is closed
            pass
        out = process.stdout.read().decode()
    os.close(leader)
    assert out.startswith("* Acc@1")
    assert b"\x1b[" in seen.getvalue()
    assert b"3/3" in seen.getvalue()
