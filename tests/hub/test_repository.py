"""Push and load through huggingface_hub itself, against a hub on this machine, and one line for each failure."""

import socket
import sys

import pytest
import timm
import torch
from hub_server import use_endpoint

import localvit
from localvit_cli import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = localvit.create_model("localvit_nano_patch4_32", num_classes=3, depth=2)
    path = tmp_path_factory.mktemp("hub") / "nano.safetensors"
    return localvit.save_checkpoint(model, path, class_names=["ape", "bat", "cow"])


def test_what_was_pushed_is_loaded_bit_exact_by_localvit_and_timm(checkpoint, hub, capsys):
    assert main(["push", str(checkpoint), "me/nano", "--private"]) == 0
    assert capsys.readouterr().out.endswith("/me/nano\n")
    assert set(hub.repositories["me/nano"]) == {"config.json", "model.safetensors", "README.md"}
    assert hub.private == {"me/nano": True}
    images = torch.randn(2, 3, 32, 32)
    expected = localvit.load_model(checkpoint).model(images)
    loaded = localvit.from_hub("me/nano")
    assert loaded.class_names == ["ape", "bat", "cow"]
    assert torch.equal(loaded.model(images), expected)
    assert torch.equal(timm.create_model("hf-hub:me/nano", pretrained=True).eval()(images), expected)


def test_the_command_line_loads_from_the_hub(checkpoint, hub, tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    localvit.push(localvit.load_model(checkpoint), "me/nano")
    shown = []
    for source in (str(checkpoint), "hf-hub:me/nano"):
        assert main(["predict", source, str(tmp_path / "red.png"), "--device", "cpu", "--workers", "0"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]


def push(checkpoint, capsys, *more) -> str:
    """The only line of a push that fails."""
    assert main(["push", str(checkpoint), "me/nano", *more]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    *_, line = printed.err.splitlines()
    assert "Traceback" not in printed.err
    return line


def test_a_repository_that_exists_is_only_changed_on_request(checkpoint, hub, capsys):
    hub.repositories["me/nano"] = {"README.md": b"mine"}
    assert "me/nano exists" in push(checkpoint, capsys)
    assert hub.repositories["me/nano"] == {"README.md": b"mine"}
    assert main(["push", str(checkpoint), "me/nano", "--update"]) == 0
    assert "model.safetensors" in hub.repositories["me/nano"]


def test_without_a_token(checkpoint, hub, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "no token" in push(checkpoint, capsys)
    assert hub.repositories == {}


def test_a_token_that_may_not_write(checkpoint, hub, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "may not write to me/nano (status 401)" in push(checkpoint, capsys)


def test_without_a_network(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub tries again for 23 seconds
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        use_endpoint(monkeypatch, address)
        assert f"{address} cannot be reached" in push(checkpoint, capsys)
        with pytest.raises(localvit.HubError, match="cannot be reached"):
            localvit.from_hub("me/nano")


def test_without_huggingface_hub(checkpoint, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in push(checkpoint, capsys)


def test_what_is_not_there(checkpoint, hub):
    with pytest.raises(localvit.HubError, match="has no model me/nothing"):
        localvit.from_hub("me/nothing")
    hub.repositories["me/text"] = {"README.md": b"text"}
    with pytest.raises(localvit.HubError, match="me/text has no config"):
        localvit.from_hub("me/text")
    with pytest.raises(ValueError, match="is not the name of a repository"):
        localvit.from_hub("nothing")


@pytest.mark.parametrize("arguments", [["FILE", "no-slash"], ["FILE", "a/b/c"], ["localvit_tiny", "me/nano"]])
def test_bad_usage(arguments, checkpoint):
    given = [str(checkpoint) if each == "FILE" else each for each in arguments]
    assert main(["push", *given]) == 2
