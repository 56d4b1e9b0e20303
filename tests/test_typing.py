"""The public API from a user's side: a small program that uses it passes `mypy --strict`."""

import subprocess
import sys

import pytest

PROGRAM = """
from pathlib import Path

import torch
from torch import Tensor, nn

import localvit
from localvit.train import TrainConfig, build, fit

model: nn.Module = localvit.create_model("localvit_nano_patch4_32", num_classes=3)
names: list[str] = localvit.list_models()
feed_forward = localvit.LocalityFeedForward(8, 8, kernel_size=5, norm_layer=nn.BatchNorm2d, act_layer=nn.GELU)
out: Tensor = feed_forward(torch.zeros(1, 8, 3, 5))
adapted: nn.TransformerEncoder = localvit.localize(
    nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 1), localvit.Adapter(kernel_size=5), grid=(2, 3)
)
replaced: nn.Module = localvit.localize(model, localvit.Replace(act="hs", reduction=2))
fused: nn.Module = localvit.fuse(model.eval())
path: Path = localvit.save_checkpoint(model, "model.safetensors")
loaded, checkpoint = localvit.model_from_checkpoint(path)
class_names: list[str] | None = checkpoint.class_names
accuracy: float = localvit.evaluate(path, "images").acc1
for prediction in localvit.predict(path, ["image.png"], topk=2):
    probabilities: tuple[float, ...] = prediction.probabilities
config = TrainConfig(model="localvit_nano_patch4_32", data_set="DIGITS", epochs=1)
run = build(config)
fit(run)
"""


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """Runs `mypy --strict` on a program and returns what it prints."""
    folder = tmp_path_factory.mktemp("typing")

    def run(program: str) -> str:
        (folder / "program.py").write_text(program)
        command = [sys.executable, "-m", "mypy", "--strict", "program.py"]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200).stdout

    return run


def test_a_program_that_uses_the_api_type_checks(check):
    assert check(PROGRAM) == "Success: no issues found in 1 source file\n"


def test_wrong_uses_are_found(check):
    wrong = 'import localvit\nlocalvit.list_models(3)\nlocalvit.Adapter(kernel="3")\nx: str = localvit.fuse(1)\n'
    found = check(wrong)
    assert [line.split(":")[1] for line in found.splitlines() if ": error:" in line][:3] == ["2", "3", "4"]
