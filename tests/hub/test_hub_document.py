"""The commands and snippets of docs/hub.md, in order, against a hub on this machine."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

import localvit
from localvit_cli import main

DOCUMENT = (Path(__file__).parents[2] / "docs" / "hub.md").read_text()


def test_every_block_runs(hub, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    model = localvit.create_model("localvit_nano_patch4_32", num_classes=3, depth=1)
    localvit.save_checkpoint(model, "runs/mine/best.safetensors", class_names=["ape", "bat", "cow"])
    Image.new("RGB", (40, 50), "red").save("photo.jpg")
    names: dict = {}
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", DOCUMENT, flags=re.MULTILINE | re.DOTALL)
    for kind, block in blocks:
        if kind == "python":
            exec(compile(block, "hub.md", "exec"), names)
            continue
        for line in block.splitlines():
            assert main(shlex.split(line, comments=True)[1:]) == 0, line
    assert [kind for kind, _ in blocks] == ["bash", "python", "bash", "python", "python"]
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(names["model"](images), names["loaded"].model(images))
    assert names["classify"].model.config.id2label[2] == "cow"
