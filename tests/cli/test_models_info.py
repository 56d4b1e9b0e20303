"""`localvit models` and `localvit info`, and the counts they show."""

import copy
import hashlib
import json
from pathlib import Path

import pytest
import torch
import tyro

from localvit import create_model, list_models, save_checkpoint
from localvit.data.preprocessing import Preprocessing
from localvit.inference.cost import count_multiply_adds, count_parameters, summarize_blocks
from localvit.inference.fusion import fuse
from localvit.models.registry import registered_models
from localvit_cli import UsageError
from localvit_cli.info import Info
from localvit_cli.models import Models
from published import GOLDEN, golden_model


def vit_multiply_adds(embed_dim: int, depth: int, tokens: int, patch: int, classes: int, feed_forward: int) -> int:
    """The closed form for a plain vision transformer; `feed_forward` is the count of one block's feed-forward."""
    embedding = (tokens - 1) * 3 * patch * patch * embed_dim
    attention = tokens * embed_dim * 4 * embed_dim + 2 * tokens * tokens * embed_dim
    return embedding + depth * (attention + feed_forward) + embed_dim * classes


def test_multiply_adds_of_deit_match_the_closed_form():
    expected = vit_multiply_adds(192, 12, 197, 16, 1000, feed_forward=197 * 2 * 192 * 768)
    model = create_model("deit_tiny_patch16_224")
    assert count_multiply_adds(model, (3, 224, 224)) == expected
    assert round(expected / 1e9, 3) == 1.254


def test_multiply_adds_of_localvit_match_the_closed_form():
    hidden, bottleneck = 768, 4
    feed_forward = 196 * (2 * 192 * hidden + 9 * hidden) + 2 * hidden * bottleneck
    expected = vit_multiply_adds(192, 12, 197, 16, 1000, feed_forward)
    assert count_multiply_adds(create_model("localvit_tiny", device="meta"), (3, 224, 224)) == expected
    assert round(expected / 1e9, 3) == 1.266


def test_all_multiply_adds_of_a_fused_model_are_counted():
    """A fused model may run in operators that torch's counter does not know."""
    model = create_model("localvit_swin_tiny", img_size=64, num_classes=7).eval()
    assert count_multiply_adds(fuse(model), (3, 64, 64)) == count_multiply_adds(model, (3, 64, 64))


def test_counting_does_not_change_the_model():
    model = create_model("localvit_nano_patch4_32", num_classes=3, local_blocks="1")
    before = copy.deepcopy(model.state_dict())
    small, wide = (count_multiply_adds(model, (3, *size)) for size in ((32, 32), (32, 64)))
    assert wide > small
    summarize_blocks(model, (3, 32, 32))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules() if type(module).__name__ == "LocalityMlp")
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


def test_blocks_and_grids():
    model = create_model("localvit_nano_patch4_32", local_blocks="2-3,6", img_size=(28, 44))
    blocks = summarize_blocks(model, (3, 28, 44))
    assert [block.name for block in blocks] == [f"blocks.{index}" for index in range(6)]
    assert [block.local for block in blocks] == [False, True, True, False, False, True]
    assert [block.grid_size for block in blocks] == [None, (7, 11), (7, 11), None, None, (7, 11)]
    outside = count_parameters(model) - sum(block.parameters for block in blocks)
    assert outside == sum(p.numel() for name, p in model.named_parameters() if not name.startswith("blocks."))
    assert summarize_blocks(create_model("resnet18", device="meta"), (3, 64, 64)) == []


def test_grids_shrink_along_a_pyramid():
    blocks = summarize_blocks(create_model("localvit_swin_tiny", device="meta"), (3, 224, 224))
    assert [block.grid_size for block in blocks] == [(side, side) for side in (56, 56, 28, 28, *[14] * 6, 7, 7)]


@pytest.fixture(scope="module")
def listed() -> list[dict]:
    """The output of `localvit models --json`."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out:
        tyro.cli(Models, args=["--json"]).run()
    return json.loads(out.getvalue())


def test_parameter_counts_are_the_published_ones(listed):
    by_name = {model["name"]: model for model in listed}
    golden = sorted(path.stem for path in (GOLDEN / "models").glob("*.json"))
    assert sorted(by_name) == sorted([*golden, "localvit_nano_patch4_32"])
    for name in golden:
        published = golden_model(name)
        if not any(kind == "frozen parameter" for _, _, kind in published["state_dict"]):  # T2T's: see test_registry
            assert by_name[name]["parameters"] == published["parameters"]
    assert by_name["localvit_nano_patch4_32"]["input_size"] == [3, 32, 32]
    assert by_name["localvit_nano_patch4_32"]["paper_name"] is None


def test_stated_counts_are_those_of_the_models(listed):
    """Multiply-adds; `tests/models/test_registry.py` checks the parameters. Building the models takes seconds."""
    for model in listed:
        made = create_model(model["name"], device="meta")
        assert model["multiply_adds"] == count_multiply_adds(made, tuple(model["input_size"])), model["name"]


def test_the_list_builds_no_model(monkeypatch, capsys):
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda *_: pytest.fail("a model is built"))
    Models(json=True).run()
    assert len(json.loads(capsys.readouterr().out)) == len(registered_models())


def test_the_list_has_every_name_and_published_number(listed):
    names = {name for model in listed for name in (model["name"], model["friendly_name"]) if name}
    assert names == set(list_models())
    published = {model.name: model for model in registered_models()}
    for model in listed[:-1]:
        expected = published[model["name"]]
        assert (model["acc1"], model["acc5"], model["weights_url"]) == (expected.acc1, expected.acc5, expected.url)
        assert 0.9e9 < model["multiply_adds"] < 6e9


def test_the_list_fits_80_columns_with_a_model_per_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    first = registered_models()[:1]
    monkeypatch.setattr("localvit_cli.models.registered_models", lambda: first)
    tyro.cli(Models, args=[]).run()
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    table, names, released, notes = out.split("\n\n")
    assert table.splitlines()[-1].split() == ["localvit_tiny", "LocalViT-T", "5.91", "1.266", "224", "74.838", "92.610"]
    assert names.splitlines()[1].split() == ["localvit_tiny", "localvit_tiny_mlp4_act3_r192"]
    assert released == "Weights are released for localvit_tiny."
    assert "half the FLOPs" in notes.replace("\n", " ")


def info(capsys, *arguments: object) -> tuple[int, dict]:
    status = tyro.cli(Info, args=[*map(str, arguments), "--json"]).run()
    return status, json.loads(capsys.readouterr().out, parse_constant=lambda constant: pytest.fail(constant))


def test_info_of_a_name(capsys):
    status, facts = info(capsys, "localvit_small")
    assert status == 0
    assert facts["file"] is None
    model = facts["model"]
    assert (model["published_name"], model["paper_name"]) == ("localvit_small_mlp4_act3_r384", "LocalViT-S")
    assert model["parameters"] == golden_model("localvit_small_mlp4_act3_r384")["parameters"]
    assert model["input_size"] == [3, 224, 224]
    assert model["preprocessing"]["crop_pct"] == 0.875
    assert model["published"] == {"acc1": 80.780, "acc5": 95.376, "loss": 1.019}
    assert model["weights_from"].endswith("/v1.0.0/localvit_s.pth")
    assert [block["grid_size"] for block in model["blocks"]] == [[14, 14]] * 12
    tyro.cli(Info, args=["localvit_small"]).run()
    text = capsys.readouterr().out
    assert all(word in text for word in ("LocalViT-S", "22,433,176", "4.617 G", "80.78", "localvit_s.pth", "14 x 14"))


def test_info_of_an_unknown_name():
    with pytest.raises(ValueError, match="localvit_tiny"):
        tyro.cli(Info, args=["localvit_tyni"]).run()


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    model = create_model("localvit_nano_patch4_32", num_classes=7, in_chans=1, local_blocks="1-2")
    return save_checkpoint(
        model,
        tmp_path / "nano.safetensors",
        class_names=[f"kind {index}" for index in range(7)],
        preprocessing=Preprocessing(input_size=(32, 40)).to_dict(),
        ema=model.state_dict(),
        about={"acc1": float("nan"), "seed": 5},
    )


def test_info_of_a_file(capsys, checkpoint):
    status, facts = info(capsys, checkpoint)
    assert status == 0
    file, model = facts["file"], facts["model"]
    content = checkpoint.read_bytes()
    assert (file["bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert (file["layout"], file["name"]) == ("localvit", "localvit_nano_patch4_32")
    assert file["args"] == {"num_classes": 7, "in_chans": 1, "local_blocks": "1-2", "img_size": [32, 32]}
    assert file["weights"] == ["raw", "ema"]
    assert file["class_names"][6] == "kind 6"
    assert file["preprocessing"]["input_size"] == [32, 40]
    assert file["about"]["torch"] == torch.__version__
    assert (file["about"]["seed"], file["about"]["acc1"]) == (5, None)
    assert (model["num_classes"], model["input_size"]) == (7, [1, 32, 40])
    assert [block["grid_size"] for block in model["blocks"]] == [[8, 10], [8, 10], None, None, None, None]
    tyro.cli(Info, args=[str(checkpoint)]).run()
    text = capsys.readouterr().out
    assert "kind 0, kind 1, kind 2, kind 3, kind 4, ..." in text
    assert file["sha256"] in text


def test_the_text_on_a_file_has_lines_instead_of_dictionaries_and_counts_epochs_from_1(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    about = {
        "config": {"lr": 5e-4, "model_args": {"local_blocks": "1-2"}, "repeated_aug": True, "device": None},
        "epoch": 2,  # as training stores it, from 0
        "metrics": {"epoch": 2, "train_loss": 0.25, "test_acc1": 97.5},
        "test_images": 40,
    }
    model = create_model("localvit_nano_patch4_32", num_classes=2, local_blocks="1-2")
    path = save_checkpoint(model, tmp_path / "nano.safetensors", about=about)
    assert tyro.cli(Info, args=[str(path)]).run() == 0
    text = capsys.readouterr().out
    assert "{" not in text
    assert max(map(len, text.splitlines())) <= 80
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[lines.index("epoch 3") :][1:3] == [
        "metrics train_loss: 0.25",
        "test_acc1: 97.5 (95 % interval 87.1 to 99.6)",
    ]
    settings = lines[lines.index("training setting value") :][1:]
    assert settings == ["lr 0.0005", "model_args.local_blocks 1-2", "repeated_aug yes", "device -"]


def test_info_of_a_published_file(capsys, tmp_path):
    path = tmp_path / "published.pth"
    save_checkpoint(create_model("localvit_tiny"), path, layout="published")
    status, facts = info(capsys, path)
    assert status == 0
    assert (facts["file"]["layout"], facts["file"]["name"], facts["file"]["weights"]) == ("published", None, ["raw"])
    assert facts["model"]["paper_name"] == "LocalViT-T"
    assert facts["file"]["class_names"][0] == "n01440764"


def test_info_of_a_file_that_fits_no_known_model(capsys, tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(5, 3)}, path)
    status, facts = info(capsys, path)
    assert status == 1
    assert facts["model"] is None
    assert "no published model" in facts["file"]["problem"]
    assert facts["file"]["args"] == {"num_classes": 5}
    assert tyro.cli(Info, args=[str(path)]).run() == 1
    assert "problem" in capsys.readouterr().out


def test_info_of_a_localized_model(capsys):
    shown = {"model": "deit_tiny_patch16_224", "json": True}
    assert Info(**shown).run() == 0
    plain = json.loads(capsys.readouterr().out)["model"]
    assert plain["locality"] == []
    assert Info(localize=("kernel_size=5", "blocks=1-4"), **shown).run() == 0
    model = json.loads(capsys.readouterr().out)["model"]
    assert [part["name"] for part in model["locality"]] == [f"blocks.{i}.mlp.fc2.locality" for i in range(4)]
    assert model["parameters"] - plain["parameters"] == 4 * 25 * 768
    assert model["multiply_adds"] - plain["multiply_adds"] == 4 * 25 * 768 * 14 * 14
    assert [block["local"] for block in model["blocks"]] == [True] * 4 + [False] * 8
    assert Info(model="deit_tiny_patch16_224", localize=()).run() == 0
    assert f"{12 * 9 * 768:,} parameters" in capsys.readouterr().out


def test_localize_needs_the_name_of_a_model(tmp_path):
    path = save_checkpoint(create_model("localvit_nano_patch4_32"), tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="--localize needs the name of a model"):
        Info(model=str(path), localize=()).run()
    with pytest.raises(ValueError, match="kernel_size must be NAME=VALUE"):
        Info(model="deit_tiny_patch16_224", localize=("kernel_size",)).run()
