"""Localized models of transformers through `save_pretrained` and `localvit.from_pretrained`."""

import json

import pytest
import torch

import localvit

transformers = pytest.importorskip("transformers", reason="Hugging Face transformers is an extra")

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 20, "patch_size": 5}
IMAGES = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
HOSTS = {
    "ViT": ("ViTForImageClassification", "ViTConfig", {**SMALL, "intermediate_size": 40}),
    "DINOv2": ("Dinov2ForImageClassification", "Dinov2Config", {**SMALL, "mlp_ratio": 2}),
    "Swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 20, "patch_size": 5, "window_size": 2, "embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2]},
    ),
    "CLIP": ("CLIPVisionModel", "CLIPVisionConfig", {**SMALL, "intermediate_size": 40}),
}
METHODS = {
    "adapter": localvit.Adapter(kernel_size=5, norm="batchnorm", gate="se", reduction=8),
    "paper's module": localvit.Replace(act="hs+se", reduction=8),
}


def make(host="ViT", method=None, **arguments):
    """A localized model whose locality is trained."""
    name, config, kwargs = HOSTS[host]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**kwargs))
    try:
        model = localvit.localize(model, method or METHODS["adapter"], **arguments).eval()
    except ValueError as error:
        if "in transformers 5.9 and newer" in str(error):
            pytest.skip(str(error))
        raise
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            value.add_(torch.rand_like(value) if "running_var" in key else 0.1 * torch.randn_like(value))
    return model


def output(model):
    with torch.no_grad():
        return model(IMAGES)[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("host", HOSTS)
def test_a_saved_model_comes_back_bit_exact(host, method, tmp_path):
    model = make(host, METHODS[method])
    model.save_pretrained(tmp_path / "first")
    again = localvit.from_pretrained(tmp_path / "first")
    assert torch.equal(output(again), output(model))
    assert not again.training
    assert again.localized == model.localized
    assert list(again.state_dict()) == list(model.state_dict())
    again.save_pretrained(tmp_path / "second")
    assert torch.equal(output(localvit.from_pretrained(tmp_path / "second")), output(model))


def test_the_selection_of_blocks_is_kept(tmp_path):
    model = make(blocks=[2], trainable="locality")
    model.save_pretrained(tmp_path)
    again = localvit.from_pretrained(tmp_path)
    assert torch.equal(output(again), output(model))
    trained = [[name for name, each in one.named_parameters() if each.requires_grad] for one in (model, again)]
    assert trained[0] == trained[1]
    assert trained[0]


def test_a_part_of_a_model_can_be_localized(tmp_path):
    name, config, kwargs = HOSTS["ViT"]
    model = getattr(transformers, name)(getattr(transformers, config)(**kwargs)).eval()
    localvit.localize(model.vit, METHODS["adapter"], inplace=True)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(localvit.from_pretrained(tmp_path)), output(model))


def test_localize_leaves_the_configuration_of_the_original_alone():
    name, config, kwargs = HOSTS["ViT"]
    model = getattr(transformers, name)(getattr(transformers, config)(**kwargs))
    localized = localvit.localize(model)
    assert hasattr(localized.config, "localvit")
    assert not hasattr(model.config, "localvit")


def test_another_class_and_other_arguments_of_transformers(tmp_path):
    make().save_pretrained(tmp_path)
    again = localvit.from_pretrained(tmp_path, transformers.ViTForImageClassification, dtype=torch.bfloat16)
    assert isinstance(again, transformers.ViTForImageClassification)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}


def test_a_new_head(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    with pytest.raises(localvit.CheckpointError, match=r"mismatched keys, first classifier\.bias"):
        localvit.from_pretrained(tmp_path, num_labels=5)
    again = localvit.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert output(again).shape == (2, 5)
    with torch.no_grad():
        assert torch.equal(again.vit(IMAGES)[0], model.vit(IMAGES)[0])


def test_a_base_state_dict_does_not_reset_loaded_adapters(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    again = localvit.from_pretrained(tmp_path)
    base = {key: value for key, value in again.state_dict().items() if ".locality." not in key}
    again.load_state_dict(base)
    assert torch.equal(output(again), output(model))


def test_delocalize_removes_the_options(tmp_path):
    model = localvit.delocalize(make(), discard=True)
    model.save_pretrained(tmp_path)
    assert "localvit" not in json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(localvit.CheckpointError, match="not of a localized model"):
        localvit.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"localvit": {"localize": {"kernel_size": 4}}}, "kernel_size=4"),
        ({"localvit": {"localize": {"unknown": 1}}}, "no option unknown"),
        ({"localvit": {"localize": [1]}}, "no options of localize"),
        ({"localvit": {"localize": {"kernel_size": 10**9}}}, "refused"),
        ({"localvit": {"localize": {"kernel_size": 3}}}, "does not fit ViTForImageClassification with locality"),
        ({"architectures": ["os"]}, "names no class of transformers"),
        ({"architectures": ["AutoConfig"]}, "names no class of transformers"),
    ],
)
def test_damaged_files_are_refused(change, message, tmp_path):
    make().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(localvit.CheckpointError, match=message):
        localvit.from_pretrained(tmp_path)


def test_no_code_is_run(tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="would run code"):
        localvit.from_pretrained(tmp_path, trust_remote_code=True)
