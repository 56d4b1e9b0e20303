"""Files with the weights of locality only, and checkpoints of localized models."""

import pytest
import timm
import torch
from safetensors.torch import load_file

import localvit
from localvit.surgery.localize import locality_modules, localize_with_options
from localvit.surgery.weights import locality_state
from localvit.utils.weight_files import CheckpointError


def small_vit(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("test_vit", **{"img_size": (48, 80), "depth": 3, "num_classes": 7} | kwargs).eval()


def shaken(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for module in locality_modules(model).values():
            for entry in (*module.parameters(), *(buffer for buffer in module.buffers() if buffer.is_floating_point())):
                entry.add_(torch.rand_like(entry) / 5)
    return model


IMAGE = torch.randn(2, 3, 48, 80, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"blocks": "2-3", "kernel_size": 5, "gate": "se", "norm": "batchnorm"},
        {"method": "replace", "reduction": 8},
        {"filter_fn": lambda module, name: name.startswith("blocks.1.")},
    ],
)
def test_the_file_and_the_base_restore_the_model(options, tmp_path):
    model = shaken(localize_with_options(small_vit(), options))
    path = localvit.save_locality(model, tmp_path / "locality.safetensors")
    held = load_file(path)
    assert held.keys() == locality_state(model).keys()
    assert sum(value.numel() for value in held.values()) < sum(value.numel() for value in model.state_dict().values())
    again = localvit.load_locality(small_vit(), path)
    assert torch.equal(again(IMAGE), model(IMAGE))
    assert again.localized.options == model.localized.options
    other = localize_with_options(small_vit(), options)
    assert torch.equal(localvit.load_locality(other, path)(IMAGE), model(IMAGE))


def test_errors_of_save_and_load(tmp_path):
    with pytest.raises(ValueError, match=r"was not localized by localvit.localize"):
        localvit.save_locality(small_vit(), tmp_path / "no.safetensors")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        localvit.load_locality(small_vit(), tmp_path / "no.safetensors")
    path = localvit.save_locality(localvit.localize(small_vit()), tmp_path / "locality.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"does not fit VisionTransformer: 3 entries .* first blocks.0.mlp.fc2.locality.conv.weight",
    ):
        localvit.load_locality(localvit.localize(small_vit(), localvit.Adapter(kernel_size=5)), path)
    other = timm.create_model("test_vit", img_size=32, embed_dim=32, depth=2)
    before = other.state_dict()
    with pytest.raises(CheckpointError, match="does not fit VisionTransformer"):
        localvit.load_locality(other, path)
    assert other.state_dict().keys() == before.keys()
    whole = localvit.save_checkpoint(localvit.create_model("localvit_nano_patch4_32"), tmp_path / "whole.safetensors")
    with pytest.raises(CheckpointError, match="was not written by save_locality"):
        localvit.load_locality(small_vit(), whole)


@pytest.mark.parametrize("options", [{}, {"gate": "eca", "blocks": [1, 2]}, {"method": "replace", "act": "relu6"}])
def test_checkpoints_rebuild_a_localized_model(options, tmp_path):
    torch.manual_seed(0)
    model = localvit.create_model("test_vit", num_classes=7, img_size=(48, 80), localize=options).eval()
    assert model.made_from["args"]["localize"] == options
    shaken(model)
    path = localvit.save_checkpoint(model, tmp_path / "model.safetensors")
    again, checkpoint = localvit.model_from_checkpoint(path)
    assert checkpoint.args["localize"] == options
    assert torch.equal(again.eval()(IMAGE), model(IMAGE))


def test_checkpoints_of_delocalized_models_have_no_locality(tmp_path):
    model = localvit.create_model("test_vit", num_classes=7, localize={})
    localvit.delocalize(model, inplace=True)
    again, _ = localvit.model_from_checkpoint(localvit.save_checkpoint(model, tmp_path / "plain.safetensors"))
    assert not locality_modules(again)
