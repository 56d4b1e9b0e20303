"""Checkpoints: both layouts written and read, and every kind of file that is refused."""

import argparse
import json
import pickle

import pytest
import safetensors.torch
import torch

import localvit
from localvit.utils.weight_files import CheckpointError
from published import golden_model, published_state

NANO = "localvit_nano_patch4_32"


class RunsCode:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (print, ("ran code from a file",))


@pytest.fixture
def nano():
    torch.manual_seed(0)
    return localvit.create_model(NANO, num_classes=3)


def test_a_published_checkpoint_loads_strictly_without_options(tmp_path):
    state = published_state("localvit_tiny_mlp4_act3_r192")
    averaged = {key: value + 1 for key, value in state.items()}
    content = {
        "model": state,
        "model_ema": averaged,
        "optimizer": {"state": {}, "param_groups": []},
        "lr_scheduler": {},
        "scaler": {},
        "epoch": 299,
        "args": argparse.Namespace(model="localvit_tiny_mlp4_act3_r192", lr=5e-4),
    }
    torch.save(content, tmp_path / "localvit_t.pth")
    model = localvit.create_model("localvit_tiny")
    checkpoint = localvit.load_checkpoint(model, tmp_path / "localvit_t.pth")
    assert checkpoint.layout == "published"
    assert checkpoint.name == "localvit_tiny_mlp4_act3_r192"
    assert checkpoint.about["epoch"] == 299
    torch.testing.assert_close(model.blocks[3].mlp.conv[0].weight, state["blocks.3.conv.conv.0.weight"], rtol=0, atol=0)
    localvit.load_checkpoint(model, tmp_path / "localvit_t.pth", weights="ema")
    torch.testing.assert_close(
        model.blocks[3].mlp.conv[0].weight, averaged["blocks.3.conv.conv.0.weight"], rtol=0, atol=0
    )


@pytest.mark.parametrize("name", ["localvit_tiny_mlp4_act3_r4", "localvit_swin_tiny_patch4_window7_224"])
def test_the_published_layout_has_the_published_entries_and_loads_again(name, tmp_path):
    torch.manual_seed(1)
    model = localvit.create_model(name)
    localvit.save_checkpoint(model, tmp_path / "out.pth", layout="published")
    written = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert {key: list(value.shape) for key, value in written.items()} == {
        key: shape for key, shape, _ in golden_model(name)["state_dict"]
    }
    again, _ = localvit.model_from_checkpoint(tmp_path / "out.pth")  # the file does not name its model
    assert again.made_from["name"] == name
    for key, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0)


def test_our_layout_has_everything_needed_to_use_the_model(nano, tmp_path):
    averaged = {key: value * 2 if value.is_floating_point() else value for key, value in nano.state_dict().items()}
    path = localvit.save_checkpoint(
        nano,
        tmp_path / "mine.safetensors",
        ema=averaged,
        class_names=["zebra", "ape", "été"],
        preprocessing={"input_size": [32, 32], "crop_pct": 1.0},
        about={"acc1": 12.5},
    )
    for weights, expected in (("raw", nano.state_dict()), ("ema", averaged)):
        model, checkpoint = localvit.model_from_checkpoint(path, weights)
        assert set(model.state_dict()) == set(expected)
        for key, value in expected.items():
            torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=0)
    assert checkpoint.class_names == ["zebra", "ape", "été"]
    assert checkpoint.preprocessing == {"input_size": [32, 32], "crop_pct": 1.0}
    assert checkpoint.about["acc1"] == 12.5
    assert checkpoint.about["torch"] == torch.__version__
    assert checkpoint.args["num_classes"] == 3
    assert checkpoint.img_size == (32, 32)


def test_the_rebuilt_model_has_the_same_arguments(tmp_path):
    model = localvit.create_model(NANO, act="relu6", local_blocks="2-3", num_classes=5, img_size=(24, 40))
    path = localvit.save_checkpoint(model, tmp_path / "a.safetensors")
    again, _ = localvit.model_from_checkpoint(path)
    x = torch.randn(2, 3, 24, 40)
    torch.testing.assert_close(again.eval()(x), model.eval()(x), rtol=0, atol=0)


def test_positions_are_resampled_to_another_size(nano, tmp_path):
    path = localvit.save_checkpoint(nano, tmp_path / "a.safetensors")
    x = torch.randn(1, 3, 20, 44)
    other = localvit.create_model(NANO, num_classes=3, img_size=(20, 44))
    localvit.load_checkpoint(other, path)
    # The same resampling as in a forward at that size.
    torch.testing.assert_close(other.eval()(x), nano.eval()(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["localvit_tiny", "localvit_tnt_tiny", "localvit_pvt_tiny", "localvit_t2t_7"])
def test_every_family_is_rebuilt_at_its_size_or_at_another(name, tmp_path):
    torch.manual_seed(4)
    model = localvit.create_model(name, num_classes=3).eval()
    model.set_input_size((64, 96))
    path = localvit.save_checkpoint(model, tmp_path / "a.safetensors")
    images = torch.randn(1, 3, 64, 96)
    again, checkpoint = localvit.model_from_checkpoint(path)
    assert checkpoint.img_size == (64, 96)
    assert again.position_grids() == model.position_grids()
    torch.testing.assert_close(again.eval()(images), model(images), rtol=0, atol=0)
    larger, _ = localvit.model_from_checkpoint(path, img_size=(128, 96))
    taller = torch.randn(1, 3, 128, 96)
    # The same resampling, once or in each forward; float32 sums in another order.
    torch.testing.assert_close(larger.eval()(taller), model(taller), rtol=1e-4, atol=1e-5)


def test_a_failed_load_does_not_change_the_model(nano, tmp_path):
    path = localvit.save_checkpoint(nano, tmp_path / "a.safetensors")
    other = localvit.create_model(NANO, num_classes=4)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(CheckpointError):
        localvit.load_checkpoint(other, path)
    for key, value in other.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def _truncated(tmp_path, nano):
    path = localvit.save_checkpoint(nano, tmp_path / "cut.pth", layout="published")
    path.write_bytes(path.read_bytes()[:10_000])
    return path


def _truncated_safetensors(tmp_path, nano):
    path = localvit.save_checkpoint(nano, tmp_path / "cut.safetensors")
    path.write_bytes(path.read_bytes()[:10_000])
    return path


def _code(tmp_path, nano):
    torch.save({"model": nano.state_dict(), "args": RunsCode()}, tmp_path / "code.pth")
    return tmp_path / "code.pth"


def _bare_pickle(tmp_path, nano):
    (tmp_path / "bare.pth").write_bytes(pickle.dumps({"model": RunsCode()}, protocol=2))
    return tmp_path / "bare.pth"


def _empty(tmp_path, nano):
    (tmp_path / "empty.pth").write_bytes(b"")
    return tmp_path / "empty.pth"


def _text(tmp_path, nano):
    (tmp_path / "page.pth").write_text("<html>404</html>")
    return tmp_path / "page.pth"


def _no_weights(tmp_path, nano):
    torch.save({"epoch": 3, "model": {}}, tmp_path / "none.pth")
    return tmp_path / "none.pth"


def _list(tmp_path, nano):
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    return tmp_path / "list.pth"


def _folder(tmp_path, nano):
    return tmp_path


def _classes(tmp_path, nano):
    nano.reset_classifier(7)
    return localvit.save_checkpoint(nano, tmp_path / "seven.safetensors")


def _other_architecture(tmp_path, nano):
    torch.save({"model": published_state("localvit_swin_tiny_patch4_window7_224")}, tmp_path / "swin.pth")
    return tmp_path / "swin.pth"


def _missing_and_unexpected(tmp_path, nano):
    state = nano.state_dict()
    del state["norm.bias"]
    torch.save({"model": state | {"extra.weight": torch.zeros(2)}}, tmp_path / "keys.pth")
    return tmp_path / "keys.pth"


def _newer(tmp_path, nano):
    header = {"localvit": json.dumps({"format": 99})}
    safetensors.torch.save_file({"raw/x": torch.zeros(1)}, tmp_path / "newer.safetensors", metadata=header)
    return tmp_path / "newer.safetensors"


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (_truncated, ["cut.pth", "truncated"]),
        (_truncated_safetensors, ["cut.safetensors", "truncated"]),
        (_code, ["code.pth", "would run code", "print"]),
        (_bare_pickle, ["bare.pth", "would run code"]),
        (_empty, ["empty.pth", "truncated"]),
        (_text, ["page.pth", "not a checkpoint", "16 bytes"]),
        (_no_weights, ["none.pth", "no weights"]),
        (_list, ["list.pth", "list"]),
        (_folder, ["folder"]),
        (_classes, ["7 classes", "num_classes=7", "reset_classifier(3)"]),
        (_other_architecture, ["localvit_swin_tiny_patch4_window7_224", "missing"]),
        (_missing_and_unexpected, ["1 missing (norm.bias)", "1 unexpected (extra.weight)"]),
        (_newer, ["newer localvit", "upgrade"]),
    ],
)
def test_a_bad_file_is_refused_with_a_one_line_message(make, parts, nano, tmp_path, capsys):
    path = make(tmp_path, nano)
    model = localvit.create_model(NANO, num_classes=3)
    with pytest.raises(CheckpointError) as refusal:
        localvit.load_checkpoint(model, path)
    message = str(refusal.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert "ran code" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"export best\n", b"(lp0", b"hello", b"J1", b"\x80\x02h\x05.", b"a,b\n1,2\n"])
def test_what_is_not_a_pickle_is_refused_whatever_its_first_bytes_mean_to_a_pickle(content, nano, tmp_path):
    """torch's reader raises IndexError, KeyError or struct.error here."""
    (tmp_path / "notes.txt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"notes.txt is not a checkpoint .* \(\d+ bytes: "):
        localvit.load_checkpoint(nano, tmp_path / "notes.txt")


def test_a_missing_file_raises(nano, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        localvit.load_checkpoint(nano, tmp_path / "nowhere.pth")


def test_raw_weights_never_replace_missing_averaged_ones(nano, tmp_path):
    path = localvit.save_checkpoint(nano, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="no averaged weights"):
        localvit.load_checkpoint(nano, path, weights="ema")
    with pytest.raises(ValueError, match="'raw' or 'ema'"):
        localvit.load_checkpoint(nano, path, weights="best")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "onnx"}, "layout='onnx'"),
        ({"class_names": ["one"]}, "1 class names for a model of 3"),
    ],
)
def test_invalid_arguments_of_save_raise_and_write_nothing(arguments, message, nano, tmp_path):
    with pytest.raises(ValueError, match=message):
        localvit.save_checkpoint(nano, tmp_path / "a.safetensors", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_previous_file(nano, tmp_path, monkeypatch):
    path = localvit.save_checkpoint(nano, tmp_path / "a.safetensors")
    before = path.read_bytes()

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        localvit.save_checkpoint(nano, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_checkpoint_prints_no_weights(tmp_path):
    model = localvit.create_model("localvit_nano_patch4_32", depth=1)
    localvit.save_checkpoint(model, tmp_path / "m.safetensors")
    printed = repr(localvit.load_checkpoint(model, tmp_path / "m.safetensors"))
    assert "tensor(" not in printed
    assert "localvit_nano_patch4_32" in printed
