"""The folder of a model: timm, transformers and localvit make the same of it, with its labels and preprocessing."""

import inspect
import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import localvit
from localvit.checkpoints import read_checkpoint
from localvit.data.classes import imagenet_synsets
from localvit.data.preprocessing import Preprocessing
from localvit.hub.folder import PRIVATE
from localvit.surgery.localize import locality_modules
from localvit.train import TrainConfig
from localvit_cli import main

PREPROCESSING = Preprocessing(
    input_size=(32, 64), crop_pct=0.9, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear"
)
SIZE = {"img_size": (32, 64), "num_classes": 3}
MODELS = {
    "LocalViT": ("localvit_nano_patch4_32", {"depth": 2, **SIZE}),
    "its default size": ("localvit_nano_patch4_32", {"depth": 1, "num_classes": 3}),
    "mean of the tokens": ("localvit_nano_patch4_32", {"depth": 1, "global_pool": "avg", **SIZE}),
    "PVT": ("localvit_pvt_tiny", {"depths": (1, 1, 1, 1), **SIZE}),
    "Swin": ("localvit_swin_tiny", {"depths": (1, 1, 1, 1), "window_size": 2, **SIZE}),
    "TNT": ("localvit_tnt_tiny", {"depth": 1, **SIZE}),
    "T2T": ("localvit_t2t_7", {"depth": 1, **SIZE}),
    "timm's": ("deit_tiny_patch16_224", {"depth": 1, **SIZE}),
    "timm's with adapters": (
        "deit_tiny_patch16_224",
        {"depth": 1, "localize": {"kernel_size": 5, "gate": "se"}, **SIZE},
    ),
    "timm's with the paper's module": (
        "deit_tiny_patch16_224",
        {"depth": 1, "localize": {"method": "replace", "reduction": 96}, **SIZE},
    ),
}


def write(folder, name="localvit_nano_patch4_32", arguments=None, **saved):
    """A model with random weights, its checkpoint and its folder; returns the loaded checkpoint."""
    torch.manual_seed(0)
    model = localvit.create_model(name, **(arguments or {"depth": 1, **SIZE}))
    for module in locality_modules(model).values():
        for parameter in module.parameters():  # adapters start at zero
            torch.nn.init.normal_(parameter, std=0.1)
    details = {"class_names": ["ape", "bat", "cow"], "preprocessing": PREPROCESSING.to_dict()} | saved
    path = folder.with_suffix(".safetensors")
    localvit.save_checkpoint(model, path, **details)
    loaded = localvit.load_model(path)
    localvit.save_hub_folder(loaded, folder)
    return loaded


@pytest.fixture(scope="module", params=MODELS)
def written(request, tmp_path_factory):
    """The loaded checkpoint, its folder, images and the checkpoint's logits of them."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    loaded = write(folder, *MODELS[request.param])
    size = MODELS[request.param][1].get("img_size", (32, 32))
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        return loaded, folder, images, loaded.model(images)


@pytest.mark.skipif(
    "torch.load(found_file" in inspect.getsource(timm.models._hub.load_state_dict_from_path),
    reason="this version of timm reads the safetensors of a folder as a pickle",
)
@torch.no_grad()
def test_timm_computes_the_same(written):
    _, folder, images, logits = written
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(model(images), logits)
    others = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=5).eval()
    assert others(images).shape == (2, 5)
    assert torch.equal(others.forward_features(images), model.forward_features(images))


@torch.no_grad()
def test_localvit_computes_the_same_and_knows_the_same(written):
    loaded, folder, images, logits = written
    again = localvit.from_hub(folder)
    assert torch.equal(again.model(images), logits)
    assert (again.class_names, again.preprocessing, again.name) == (loaded.class_names, PREPROCESSING, loaded.name)
    assert again.model.made_from["args"].get("localize") == loaded.model.made_from["args"].get("localize")


@torch.no_grad()
def test_transformers_computes_the_same_also_after_it_saved_the_model(written, tmp_path):
    transformers = pytest.importorskip("transformers")
    _, folder, images, logits = written
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    assert torch.equal(model(images).logits, logits)
    assert model.config.id2label == {0: "ape", 1: "bat", 2: "cow"}
    model.save_pretrained(tmp_path)
    assert torch.equal(localvit.from_hub(tmp_path).model(images), logits)


def noise(folder):
    pixels = np.random.default_rng(0).integers(0, 256, (71, 83, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "noise.png")
    return folder / "noise.png"


def test_the_pipeline_of_transformers_predicts_what_localvit_predicts(tmp_path):
    transformers = pytest.importorskip("transformers")
    loaded = write(tmp_path / "model")
    path = noise(tmp_path)
    found = transformers.pipeline("image-classification", model=str(tmp_path / "model"), device="cpu")(str(path))
    [prediction] = localvit.predict(loaded, path)
    assert [each["label"] for each in found] == list(prediction.class_names)
    # transformers rounds nothing, and takes the softmax in float32.
    assert [each["score"] for each in found] == pytest.approx(prediction.probabilities, rel=1e-5)


def test_timm_prepares_images_as_localvit_does(tmp_path):
    write(tmp_path / "model")
    model = timm.create_model(f"local-dir:{tmp_path / 'model'}")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    image = Image.open(noise(tmp_path))
    assert transform(image).shape == (3, 32, 64)
    torch.testing.assert_close(transform(image), PREPROCESSING.transform()(image))


def test_imagenet_has_words_in_transformers_and_synsets_here(tmp_path):
    transformers = pytest.importorskip("transformers")
    write(tmp_path / "model", arguments={"depth": 1, "num_classes": 1000}, class_names=imagenet_synsets())
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    assert config.id2label[0] == "tench, Tinca tinca"
    assert localvit.from_hub(tmp_path / "model").class_names == imagenet_synsets()


ABOUT = {
    "epoch": 6,
    "metrics": {"test_acc1": 100 * 15 / 18, "test_loss": 1.25, "epoch": 6},
    "test_images": 18,
    "config": {"data_set": "FOLDER", "data_path": "/home/me/images", "output_dir": "/home/me/runs", "epochs": 7},
    "held_out": {"folder": "/home/me/images", "images": "", "trained_on": 9},
}


def test_the_model_card_has_the_numbers_and_no_paths_of_the_run(tmp_path):
    write(tmp_path / "model", about=ABOUT, class_names=["ape", "b`a|t\nx", "cow"])
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    for text in (
        "# model\n",
        "| 83.33 (95 % interval 60.8 to 94.2, 18 images) |",
        "| epoch | 7 |",
        "`ape`, `b'a\\|t x`, `cow`",
        "bilinear",
        "32 x 64",
    ):
        assert text in card, text
    assert not [path for path in (tmp_path / "model").iterdir() if "/home/me" in path.read_text(errors="replace")]
    about = localvit.from_hub(tmp_path / "model").about
    assert about["metrics"] == ABOUT["metrics"]
    assert about["held_out"] == {"images": "", "trained_on": 9}


def test_a_temperature_reaches_the_card_and_who_downloads_the_model(tmp_path):
    record = {"temperature": 1.5, "num_images": 1800, "images": "", "ece_before": 0.0625, "ece_after": 0.0125}
    record |= {"loss_before": 1.0, "loss_after": 0.5, "weights": "ema"}
    averaged = localvit.create_model("localvit_nano_patch4_32", depth=1, **SIZE).state_dict()
    write(tmp_path / "raw", about=ABOUT | {"calibration": record}, ema=averaged)
    assert "Calibration" not in (tmp_path / "raw" / "README.md").read_text()  # it is of the other weights
    localvit.save_hub_folder(localvit.load_model(tmp_path / "raw.safetensors", weights="ema"), tmp_path / "ema")
    card = (tmp_path / "ema" / "README.md").read_text()
    assert "the temperature 1.5, which was fitted to 1,800 held-out images" in card
    assert "error of 1.25 % on images that it was not fitted to (cross-fitting); undivided, 6.25 %" in card
    assert localvit.from_hub(tmp_path / "ema").calibration.temperature == 1.5


def test_numbers_of_other_weights_and_those_that_json_lacks_are_left_out(tmp_path, caplog):
    about = ABOUT | {"metrics": {"test_acc1": 71.234, "test_loss": float("nan")}}
    averaged = localvit.create_model("localvit_nano_patch4_32", depth=1, **SIZE).state_dict()
    write(tmp_path / "raw", about=about, ema=averaged)
    text = (tmp_path / "raw" / "config.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["localvit"]["about"]["metrics"]["test_loss"] is None
    assert "| 71.23 (95 % interval 48.2 to 86.8, 18 images) |" in (tmp_path / "raw" / "README.md").read_text()
    loaded = localvit.load_model(tmp_path / "raw.safetensors", weights="ema")
    localvit.save_hub_folder(loaded, tmp_path / "ema")
    assert "71.23" not in (tmp_path / "ema" / "README.md").read_text()
    assert "metrics in the checkpoint are those of the raw weights" in caplog.text
    assert localvit.from_hub(tmp_path / "ema").about["epoch"] == 6


def test_every_setting_that_is_a_path_is_private():
    paths = {name for name, field in TrainConfig.model_fields.items() if "Path" in str(field.annotation)}
    assert {"data_path", "output_dir"} <= paths <= PRIVATE


def test_a_folder_is_a_model_for_every_command(tmp_path, capsys):
    write(tmp_path / "model")
    path = noise(tmp_path)
    shown = []
    for source in ("model", "model.safetensors"):
        flags = ["--device", "cpu", "--workers", "0"]
        assert main(["predict", str(tmp_path / source), str(path), *flags]) == 0
        shown.append(capsys.readouterr().out)
        assert main(["info", str(tmp_path / source), "--json"]) == 0
        shown.append(json.loads(capsys.readouterr().out)["model"])
    assert shown[:2] == shown[2:]


def test_dry_run_writes_the_folder_only_where_nothing_is_lost(tmp_path, capsys):
    write(tmp_path / "model")
    arguments = ["push", str(tmp_path / "model.safetensors"), "me/nano", "--dry-run"]
    assert main([*arguments, str(tmp_path / "dry")]) == 0
    assert {path.name for path in (tmp_path / "dry").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert 'localvit.from_hub("me/nano")' in (tmp_path / "dry" / "README.md").read_text()
    assert main([*arguments, str(tmp_path / "dry")]) == 0  # its own files are replaced
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert main([*arguments, str(tmp_path / "other")]) == 1
    assert "contains other files (notes.txt)" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


def test_a_model_that_could_not_be_loaded_again_is_refused(tmp_path):
    loaded = write(tmp_path / "model")
    localvit.fuse(loaded.model, inplace=True)
    with pytest.raises(ValueError, match="before fuse"):
        localvit.save_hub_folder(loaded, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def changed(entry, value):
    def change(config):
        *outer, last = entry.split(".")
        for key in outer:
            config = config[key]
        config[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("architecture", "hf-hub:someone/else"), "no model is called|hf-hub:someone/else"),
        (changed("architecture", 7), "'architecture'"),
        (changed("model_args.pretrained", True), "pretrained.* refused"),
        (changed("model_args.checkpoint_path", "/etc/passwd"), "checkpoint_path.* refused"),
        (changed("model_args.pretrained_cfg", {"url": "http://127.0.0.1:1/"}), "pretrained_cfg.* refused"),
        (changed("model_args.embed_dim", 10**9), "embed_dim.* refused"),
        (changed("model_args.depth", 9999), "depth=9999"),
        (changed("num_classes", 5), "label_names"),
        (changed("label_names", [1, 2, 3]), "label_names"),
        (changed("pretrained_cfg.mean", "abc"), "mean"),
        (changed("pretrained_cfg.std", [0, 0, 0]), "std"),
        (changed("pretrained_cfg.crop_pct", -1), "crop_pct"),
        (changed("pretrained_cfg.interpolation", ["bicubic"]), "interpolation"),
        (changed("localvit", {"about": []}), "localvit"),
    ],
)
def test_a_crafted_config_is_refused(change, message, tmp_path):
    write(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as raised:
        localvit.from_hub(tmp_path / "model")
    assert "\n" not in str(raised.value)


def test_the_localized_entry_point_loads_nothing_else():
    for argument in ("checkpoint_path", "pretrained_cfg_overlay"):
        with pytest.raises((ValueError, TypeError)):
            timm.create_model("localvit_localized", base="hf-hub:someone/else", **{argument: "/etc/passwd"})
    with pytest.raises(ValueError, match="checkpoint_path"):
        timm.models.model_entrypoint("localvit_localized")(checkpoint_path="/etc/passwd")
    with pytest.raises(ValueError, match="features_only"):
        timm.create_model("localvit_localized", features_only=True)


def test_incomplete_folders(tmp_path):
    write(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").unlink()
    with pytest.raises(localvit.CheckpointError, match=r"has no model\.safetensors"):
        read_checkpoint(tmp_path / "cut")
    (tmp_path / "cut" / "config.json").write_text("{")
    with pytest.raises(localvit.CheckpointError, match="is not JSON"):
        read_checkpoint(tmp_path / "cut")
    (tmp_path / "cut" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(localvit.CheckpointError, match="not of a timm model"):
        read_checkpoint(tmp_path / "cut")
