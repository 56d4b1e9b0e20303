"""`pretrained=True` through timm's download code, from a server on the loopback address."""

import argparse
import socket
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import localvit
from published import published_state


class RecordingHandler(SimpleHTTPRequestHandler):
    """Serves a folder and records the requested paths."""

    requested: list[str] = []  # noqa: RUF012

    def do_GET(self):
        self.requested.append(self.path)
        super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def release(tmp_path, monkeypatch):
    """A server that has the released file of LocalViT-T, and an empty download cache."""
    folder = tmp_path / "release"
    folder.mkdir()
    state = published_state("localvit_tiny_mlp4_act3_r192")
    averaged = {key: value * 0 for key, value in state.items()}
    settings = argparse.Namespace(model="localvit_tiny_mlp4_act3_r192")
    torch.save({"model": state, "model_ema": averaged, "epoch": 299, "args": settings}, folder / "localvit_t.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    RecordingHandler.requested.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(RecordingHandler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/localvit_t.pth", state
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_file_is_downloaded_once_and_its_raw_weights_are_loaded(release, tmp_path):
    url, state = release
    for _ in range(2):
        model = localvit.create_model("localvit_tiny", pretrained=True, pretrained_cfg_overlay={"url": url})
        torch.testing.assert_close(model.head.weight, torch.nn.Parameter(state["head.weight"]), rtol=0, atol=0)
        weight = model.blocks[5].mlp.conv[3].weight
        torch.testing.assert_close(weight, torch.nn.Parameter(state["blocks.5.conv.conv.3.weight"]), rtol=0, atol=0)
    assert RecordingHandler.requested == ["/localvit_t.pth"]
    assert len(list((tmp_path / "cache").rglob("localvit_t.pth"))) == 1


def test_a_local_file_replaces_the_download(release, tmp_path):
    _, state = release
    overlay = {"file": str(tmp_path / "release" / "localvit_t.pth")}
    model = localvit.create_model("localvit_tiny", pretrained=True, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(model.head.bias, torch.nn.Parameter(state["head.bias"]), rtol=0, atol=0)
    assert RecordingHandler.requested == []


def test_pretrained_weights_adapt_to_other_classes_channels_and_sizes(release):
    """As for any pretrained timm model: a new head, adapted channels, resampled positions, the rest as released."""
    url, state = release
    arguments = {"num_classes": 7, "in_chans": 1, "img_size": (160, 192), "pretrained_cfg_overlay": {"url": url}}
    model = localvit.create_model("localvit_tiny", pretrained=True, **arguments)
    assert model(torch.randn(1, 1, 160, 192)).shape == (1, 7)
    summed = state["patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(model.patch_embed.proj.weight.detach(), summed)
    whole = localvit.create_model("localvit_tiny", pretrained=True, pretrained_cfg_overlay={"url": url})
    whole.set_input_size((160, 192))
    torch.testing.assert_close(model.pos_embed, whole.pos_embed, rtol=0, atol=0)


def test_a_failed_download_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with socket.socket() as closed:  # bound but not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/localvit_t.pth"
        with pytest.raises(RuntimeError) as error:
            localvit.create_model("localvit_tiny", pretrained=True, pretrained_cfg_overlay={"url": url})
    assert url in str(error.value)
    assert 'pretrained_cfg_overlay={"file": "localvit_t.pth"}' in str(error.value)


def test_a_model_without_released_weights_raises():
    with pytest.raises(RuntimeError, match="localvit_tiny_mlp6_act1"):
        localvit.create_model("localvit_tiny_mlp6_act1", pretrained=True)
