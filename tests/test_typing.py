"""The public API from a user's side: a small program that uses it passes `mypy --strict`, and a wrong one does not."""

import subprocess
import sys

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


WRONG = """
import localvit

localvit.list_models(3)
localvit.Adapter(kernel="3")
x: str = localvit.fuse(1)
"""

# No public signature names a type of these. With them, mypy reads three times as much.
SETTINGS = """
[tool.mypy]
strict = true

[[tool.mypy.overrides]]
module = [
    "torch._dynamo.*", "torch._functorch.*", "torch._inductor.*", "torch.ao.*", "torch.distributed.*",
    "torch.distributions.*", "torch.export.*", "torch.fx.*", "torch.jit.*", "torch.onnx.*", "torch.testing.*",
    "fastapi.*", "huggingface_hub.*", "jinja2.*", "matplotlib.*", "numpy.*", "PIL.*", "rich.*", "timm.*",
    "transformers.*",
]
follow_imports = "skip"
follow_imports_for_stubs = true
"""


def test_a_program_that_uses_the_api_type_checks_and_wrong_uses_are_found(tmp_path, pytestconfig):
    """Both in one run, with a cache that stays for later ones: checking torch takes most of the time."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "wrong.py").write_text(WRONG)
    (tmp_path / "pyproject.toml").write_text(SETTINGS)
    cache = pytestconfig.cache.mkdir("mypy")
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(cache), "program.py", "wrong.py"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200).stdout
    errors = [line.split(":")[:2] for line in found.splitlines() if ": error:" in line]
    assert [name for name, _ in errors] == ["wrong.py"] * len(errors), found
    assert sorted({number for _, number in errors}) == ["4", "5", "6"], found
