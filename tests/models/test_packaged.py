"""The trained weights in the package, by each way of loading them, without a network."""

import io
import json
import runpy
import socket
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

import localvit
from localvit.data.classes import model_class_names
from localvit.data.preprocessing import Preprocessing
from localvit.inference.runner import load_model
from localvit.models.registry import find_model, registered_models
from localvit.train.finetune import load_pretrained
from localvit.utils.intervals import accuracy_interval
from localvit.utils.weight_files import HEADER, CheckpointError, read_header
from localvit_cli import main
from published import SHARED

ROOT = Path(__file__).parents[2]
NAME = "localvit_nano_patch4_32"
PACKAGED = find_model(NAME).packaged
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
"""CIFAR-10's classes in the order of its labels (Krizhevsky 2009)."""


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise OSError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def stored() -> dict[str, torch.Tensor]:
    """The tensors of the file, by the model's names, as safetensors reads them."""
    return {key.removeprefix("raw/"): value for key, value in safetensors.torch.load_file(PACKAGED.path).items()}


def in_float32(tensors):
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


def fine_tuned():
    model = localvit.create_model(NAME)
    load_pretrained(model, NAME, class_names=CLASSES)
    return model


WAYS = {
    "name": lambda: localvit.create_model(NAME, pretrained=True),
    "name and tag": lambda: localvit.create_model(f"{NAME}.cifar10", pretrained=True),
    "timm": lambda: timm.create_model(NAME, pretrained=True),
    "timm and tag": lambda: timm.create_model(f"{NAME}.cifar10", pretrained=True),
    "function": lambda: localvit.models.localvit_nano_patch4_32(pretrained=True),
    "command": lambda: load_model(f"{NAME}.cifar10").model,
    "file": lambda: localvit.model_from_checkpoint(PACKAGED.path)[0],
    "checkpoint_path": lambda: timm.create_model(NAME, checkpoint_path=PACKAGED.path),
    "fine-tuning": fine_tuned,
}


@pytest.mark.parametrize("way", WAYS)
def test_each_way_loads_the_stored_numbers(way, stored):
    loaded, expected = WAYS[way]().state_dict(), in_float32(stored)
    assert loaded.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(loaded[key], value, rtol=0, atol=0, msg=key)


def test_the_model_computes_what_the_float32_cast_of_the_file_computes(stored):
    image = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    cast = localvit.create_model(NAME)
    cast.load_state_dict(in_float32(stored), strict=True)
    pretrained = localvit.create_model(NAME, pretrained=True)
    torch.testing.assert_close(pretrained.eval()(image), cast.eval()(image), rtol=0, atol=0)


def test_position_embeddings_are_resampled_in_float32():
    whole = localvit.create_model(NAME, pretrained=True)
    whole.set_input_size((48, 40))
    sized = localvit.create_model(NAME, pretrained=True, img_size=(48, 40))
    torch.testing.assert_close(sized.pos_embed, whole.pos_embed, rtol=0, atol=0)
    assert not torch.equal(sized.pos_embed, sized.pos_embed.bfloat16().float())


def test_other_classes_get_a_new_head(stored):
    model = localvit.create_model(NAME, pretrained=True, num_classes=7)
    assert model.head.weight.shape == (7, 96)
    torch.testing.assert_close(model.cls_token.detach(), stored["cls_token"].float(), rtol=0, atol=0)


def test_the_file_is_small_and_describes_itself_without_a_machine(stored):
    header = read_header(PACKAGED.path, HEADER)
    assert header["name"] == NAME
    assert header["class_names"] == CLASSES == list(PACKAGED.class_names)
    published = Preprocessing.published((32, 32))
    assert Preprocessing.from_dict(header["preprocessing"]) == published
    assert Preprocessing.from_pretrained_cfg(timm.get_pretrained_cfg(NAME).to_dict()) == published
    texts = list(strings(header))
    assert not [text for text in texts if text.startswith(("/", "~")) or "/dev/" in text or "held_out" in text]
    assert "localvit train --recipe cifar10 --cuda-graph --epochs 80" in header["about"]["command"]
    assert PACKAGED.source in header["about"]["data"]
    for key, value in stored.items():
        if value.is_floating_point():
            assert value.dtype == (torch.bfloat16 if value.ndim > 1 else torch.float32), key
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert size < 1.6e6


def strings(value):
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, str):
        yield value


def test_only_the_packaged_head_has_its_class_names():
    """Ten other classes are not CIFAR-10's."""
    assert model_class_names(localvit.create_model(NAME, pretrained=True), None) == CLASSES
    assert model_class_names(timm.create_model(NAME, pretrained=True), None) == CLASSES
    assert model_class_names(localvit.create_model(NAME), None) is None
    assert model_class_names(localvit.create_model(NAME, pretrained=True, num_classes=7), None) is None
    overlay = {"file": PACKAGED.path}
    assert model_class_names(localvit.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay), None) is None
    assert model_class_names(localvit.model_from_checkpoint(PACKAGED.path)[0], None) is None
    assert load_model(PACKAGED.path).class_names == CLASSES


def test_an_address_or_tensors_replace_the_packaged_file(stored):
    overlay = {"url": "http://127.0.0.1:9/nano.safetensors"}
    with pytest.raises(RuntimeError, match="could not download the weights"):
        localvit.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay)
    zeros = {key: torch.zeros_like(value) for key, value in stored.items()}
    model = localvit.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"state_dict": zeros})
    assert not model.head.weight.any()


def test_timm_knows_the_weights():
    assert f"{NAME}.cifar10" in timm.list_models("localvit_nano*", pretrained=True)
    with pytest.raises(ValueError, match="no weights with the tag 'in1k', only 'cifar10'"):
        localvit.create_model(f"{NAME}.in1k")


def test_what_is_saved_for_the_hub_has_class_names_and_no_path(tmp_path):
    save_for_hf(localvit.create_model(NAME, pretrained=True), tmp_path)
    config = (tmp_path / "config.json").read_text()
    assert json.loads(config)["pretrained_cfg"]["label_names"] == CLASSES
    assert "safetensors" not in config


@pytest.mark.parametrize("info", registered_models(), ids=lambda info: info.name)
def test_a_model_has_released_or_packaged_weights_or_none(info):
    cfg = timm.get_pretrained_cfg(info.name)
    assert bool(cfg.file) == bool(info.packaged)
    assert not (info.packaged and info.file)


def test_commands_take_the_name(tmp_path, capsys):
    pixels = np.random.default_rng(3).integers(0, 256, (41, 37, 3), dtype=np.uint8)
    (tmp_path / "val" / "ship").mkdir(parents=True)
    image = tmp_path / "val" / "ship" / "0.png"
    Image.fromarray(pixels).save(image)
    assert main(["predict", f"{NAME}.cifar10", str(image), "--format", "json", "--workers", "0"]) == 0
    [prediction] = json.loads(capsys.readouterr().out)
    model = localvit.create_model(NAME, pretrained=True).eval()
    logits = model(Preprocessing.published((32, 32)).transform()(Image.open(image))[None])
    values, indices = logits.softmax(1)[0].topk(5)
    assert [each["name"] for each in prediction["predictions"]] == [CLASSES[index] for index in indices]
    probabilities = [each["probability"] for each in prediction["predictions"]]
    torch.testing.assert_close(torch.tensor(probabilities), values.detach(), rtol=0, atol=1e-5)  # rounded when printed

    assert main(["eval", NAME, "--data-path", str(tmp_path), "--workers", "0"]) == 0  # the labels by their name
    expected = 100.0 * (CLASSES[indices[0]] == "ship")
    assert capsys.readouterr().out.startswith(f"* Acc@1 {expected:.3f}")

    assert main(["info", NAME, "--json"]) == 0
    packaged = json.loads(capsys.readouterr().out)["model"]["packaged"]
    assert (packaged["acc1"], packaged["class_names"]) == (PACKAGED.acc1, CLASSES)
    assert main(["info", PACKAGED.path, "--json"]) == 0  # of a file, only what the file says
    assert json.loads(capsys.readouterr().out)["model"]["packaged"] is None


def test_a_name_is_as_good_as_a_checkpoint():
    ready = load_model(NAME)
    assert ready.about["config"]["epochs"] == 80
    assert str(ready).startswith(f"{NAME}.cifar10, raw weights in this package; 32 x 32")
    with pytest.raises(CheckpointError, match="no averaged weights"):
        load_model(NAME, weights="ema")
    assert load_model(NAME, input_size=(48, 40)).preprocessing.input_size == (48, 40)


def test_the_script_leaves_the_paths_of_a_run_out(tmp_path):
    config = {"data_path": "/home/a/images", "output_dir": "/home/a/runs", "epochs": 3, "workers": 5}
    about = {
        "config": config,
        "held_out": {"folder": "/home/a/images/train"},
        "epoch": 2,
        "metrics": {"test_acc1": 1.0},
        "test_images": 100,
    }
    model = localvit.create_model(NAME, depth=1)
    averaged = {key: value + 1 for key, value in model.state_dict().items()}
    run = tmp_path / "last.safetensors"
    localvit.save_checkpoint(model, run, class_names=CLASSES, ema=averaged, about=about)
    release = runpy.run_path(str(ROOT / "benchmarks" / "release_weights.py"))["release"]
    release(run, tmp_path / "small.safetensors", {"data": "of mine", "localvit": "0.9"})
    assert b"/home" not in (tmp_path / "small.safetensors").read_bytes()
    rebuilt, checkpoint = localvit.model_from_checkpoint(tmp_path / "small.safetensors")
    assert (checkpoint.ema, checkpoint.class_names) == (None, CLASSES)
    assert (checkpoint.about["config"], checkpoint.about["data"]) == ({"epochs": 3}, "of mine")
    assert checkpoint.about["localvit"] == "0.9"
    assert not {"held_out", "metrics", "test_images"} & checkpoint.about.keys()
    assert torch.equal(rebuilt.head.weight, model.head.weight.bfloat16().float())
    assert torch.equal(rebuilt.head.bias, model.head.bias)


def test_the_interval_is_where_the_score_test_rejects():
    """Wilson 1927: at both ends the measured share is 1.96 standard errors away, with the error of that end."""
    for accuracy, count in ((PACKAGED.acc1, 10_000), (50.0, 18), (100.0, 18), (0.0, 7)):
        for end in accuracy_interval(accuracy, count):
            error = np.sqrt(end / 100 * (1 - end / 100) / count)
            assert abs(accuracy / 100 - end / 100) == pytest.approx(1.959964 * error, rel=1e-6, abs=1e-7)
    low, high = accuracy_interval(PACKAGED.acc1, PACKAGED.num_images)
    assert low < PACKAGED.acc1 < high


def test_the_accuracy_on_a_sample_is_the_stated_one():
    """500 of the 10,000 test images; the limit is three standard errors."""
    path = SHARED / "data" / "cifar10.zip"
    if not path.exists():
        pytest.skip("CIFAR-10 is not there")
    ready = load_model(NAME)
    transform, right = ready.preprocessing.transform(), 0
    with zipfile.ZipFile(path) as archive, torch.inference_mode():
        names = [name for name in archive.namelist() if "/val/" in f"/{name}" and not name.endswith("/")][::20]
        for start in range(0, len(names), 50):
            chosen = names[start : start + 50]
            images = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in chosen]
            found = ready.model(torch.stack([transform(image) for image in images])).argmax(1)
            right += sum(CLASSES[index] == name.split("/")[-2] for index, name in zip(found, chosen, strict=True))
    assert len(names) == 500
    share = PACKAGED.acc1 / 100
    assert abs(right / 500 - share) < 3 * np.sqrt(share * (1 - share) / 500)
