"""Localized models of timm and Hugging Face export like those of this package."""

import json

import numpy as np
import pytest
import timm
import torch
from exported_files import PREPROCESSING, noise, run
from torch import nn

import localvit
from localvit.data.preprocessing import Preprocessing

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def randomize(model: nn.Module) -> nn.Module:
    """Locality that does something: its last layer starts at zero."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def normalized(images: np.ndarray, preprocessing: Preprocessing) -> torch.Tensor:
    mean, std = (np.array(each)[:, None, None] for each in (preprocessing.mean, preprocessing.std))
    return torch.from_numpy((images / 255 - mean) / std).float()


def test_a_localized_timm_model_on_any_size(tmp_path):
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 4}
    model = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **small)
    model = randomize(localvit.localize(model))
    path = tmp_path / "timm.onnx"
    report = localvit.export(model, path, localvit.Onnx(dynamic="size"), class_names=["a", "b", "c", "d"])
    assert report.max_rel < 1e-4
    images = noise(2, 3, 48, 24)
    preprocessing = Preprocessing.from_pretrained_cfg(model.pretrained_cfg, (32, 32))
    with torch.inference_mode():
        expected = model(normalized(images, preprocessing)).softmax(1).numpy()
    np.testing.assert_allclose(run(path, images), expected, rtol=0, atol=1e-4)
    assert json.loads({each.key: each.value for each in onnx.load(path).metadata_props}["preprocessing"])[
        "input_size"
    ] == [3, 32, 32]


def test_a_model_of_one_size_says_what_to_do(tmp_path):
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3, "num_classes": 4}
    model = timm.create_model("vit_tiny_patch16_224", **small)
    with pytest.raises(ValueError, match="takes images of 32 x 32 pixels only: make it with dynamic_img_size=True"):
        localvit.export(model, tmp_path / "fixed.onnx", localvit.Onnx(dynamic="size"))
    assert list(tmp_path.iterdir()) == []


def test_a_localized_hugging_face_model_with_its_labels(tmp_path):
    transformers = pytest.importorskip("transformers")
    labels = {0: "ant", 1: "bee", 2: "crow"}
    config = transformers.ViTConfig(
        image_size=24,
        patch_size=8,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=48,
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
    )
    model = randomize(localvit.localize(transformers.ViTForImageClassification(config)))
    path = tmp_path / "vit.onnx"
    with pytest.raises(ValueError, match="does not define its preprocessing; give preprocessing="):
        localvit.export(model, path)
    localvit.export(model, path, preprocessing=PREPROCESSING)
    images = noise(5, 3, 24, 24)
    with torch.inference_mode():
        expected = model(normalized(images, PREPROCESSING)).logits.softmax(1).numpy()
    np.testing.assert_allclose(run(path, images), expected, rtol=0, atol=1e-4)
    props = {each.key: each.value for each in onnx.load(path).metadata_props}
    assert json.loads(props["class_names"]) == list(labels.values())
