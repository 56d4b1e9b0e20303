"""Without a network, a command that needs released weights says which flag takes a copy of the file."""

import socket
import urllib.request

import huggingface_hub.constants
import pytest
from PIL import Image

import localvit
from localvit.data.preprocessing import Preprocessing
from localvit.train.finetune import load_pretrained
from localvit.train.teacher import build_teacher
from localvit_cli import main


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """Downloads go to a closed port of this machine."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setattr(urllib.request, "_opener", None)  # It is made once, with the proxies of that moment.
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield


@pytest.mark.parametrize("model", ["localvit_tiny", "deit_tiny_patch16_224"])
@pytest.mark.parametrize("command", ["eval", "predict"])
def test_eval_and_predict(command, model, tmp_path, capsys):
    Image.new("RGB", (9, 9)).save(tmp_path / "0.png")
    arguments = ["--data-path", str(tmp_path)] if command == "eval" else [str(tmp_path / "0.png")]
    assert main([command, model, *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"could not download the weights of {model}" in line
    assert line.endswith("in another way and give the file with --checkpoint FILE")
    assert "overlay" not in line


def test_training(tmp_path):
    model = localvit.create_model("localvit_tiny", num_classes=3)
    packaged = "--model localvit_nano_patch4_32 --finetune localvit_nano_patch4_32"
    with pytest.raises(RuntimeError, match=rf"give the file with --finetune FILE, or .* in this package: {packaged}$"):
        load_pretrained(model, "localvit_tiny")
    with pytest.raises(RuntimeError, match=r"give the file with --teacher-checkpoint FILE$"):
        build_teacher("localvit_tiny", None, 1000, None, "cpu", preprocessing=Preprocessing())
