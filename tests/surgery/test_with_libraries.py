"""Localized models in the libraries that people combine them with: PEFT, torchao and accelerate.

They replace or wrap layers. The branch must then act as before, or the change must be refused.
"""

import copy

import pytest
import timm
import torch
from checks import adapters_of, randomized
from torch import nn

import localvit
from localvit.surgery.localize import locality_modules

DEPTH = 3


def vit():
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=(48, 80), depth=DEPTH, num_classes=7).eval()


def image():
    return torch.randn(2, 3, 48, 80, generator=torch.Generator().manual_seed(5))


def localized():
    """With convolutions whose part in the output is larger than the rounding of 8 bits."""
    model = localvit.localize(randomized(vit()))
    for adapter in adapters_of(model):
        nn.init.normal_(adapter.conv.weight, std=3, generator=torch.Generator().manual_seed(1))
    return model


def distance(out, expected):
    return ((out - expected).norm() / expected.norm()).item()


CHANGE = distance(localvit.delocalize(localized(), discard=True)(image()), localized()(image()))
"""How much the output changes without the branches, to compare rounding and quantization with."""


def test_lora_beside_trained_locality_merges_exactly(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = localized()
    expected, base = model(image()), copy.deepcopy(model)
    config = peft.LoraConfig(target_modules="all-linear", modules_to_save=["locality", "head"])
    adapted = peft.get_peft_model(model, config)
    assert torch.equal(adapted(image()), expected)
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert sum(".locality.modules_to_save." in name for name in trained) == DEPTH
    assert not any(".fc2.lora" in name for name in trained)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) / 5)
    expected = adapted(image())
    adapted.save_pretrained(tmp_path)
    assert torch.equal(peft.PeftModel.from_pretrained(base, tmp_path)(image()), expected)
    merged = adapted.merge_and_unload()
    # float32, and weights that were added in another order.
    assert distance(merged(image()), expected) < 1e-5
    assert len(locality_modules(merged)) == DEPTH
    assert merged.localized.options == {}


def test_lora_on_the_projections_is_refused_in_both_orders():
    """Merged into them, it would read what the convolution has added; beside them, it would not."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = peft.LoraConfig(target_modules=["fc2"])
    with pytest.raises(ValueError, match=r"(?s)LocalizedProjection.* is not supported"):
        peft.get_peft_model(localized(), config)
    with pytest.raises(ValueError, match="this model is wrapped by PEFT: localize it first, then call get_peft_model"):
        localvit.localize(peft.get_peft_model(vit(), config))
    with pytest.raises(ValueError, match=r"blocks.0.mlp.fc2 \(Linear\) wraps the projection .* before get_peft_model"):
        localvit.localize(peft.inject_adapter_in_model(config, vit()))


def test_locality_inside_of_peft_is_not_written(tmp_path):
    """Its entries have other names there, under which no model could load them."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = localized()
    path = localvit.save_locality(model, tmp_path / "before.safetensors")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv"], modules_to_save=["locality"]))
    for wrapped in (adapted, adapted.get_base_model()):
        with pytest.raises(ValueError, match=r"inside of PEFT's modules .*unload\(\) before save_locality"):
            localvit.save_locality(wrapped, tmp_path / "after.safetensors")
        with pytest.raises(ValueError, match=r"inside of PEFT's modules .*unload\(\) before load_locality"):
            localvit.load_locality(wrapped, path)
    assert list(tmp_path.iterdir()) == [path]
    localvit.save_locality(adapted.merge_and_unload(), path)


@pytest.mark.filterwarnings("ignore")
def test_checkpoints_of_models_that_torchao_quantized(tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    nano = localvit.create_model("localvit_nano_patch4_32", depth=2)
    path = localvit.save_checkpoint(nano, tmp_path / "a.safetensors")
    quantization.quantize_(nano, quantization.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"blocks.0.attn.qkv.weight is a .*quantized model: save the model as it was"):
        localvit.save_checkpoint(nano, tmp_path / "b.safetensors")
    with pytest.raises(localvit.CheckpointError, match="cannot be loaded into a quantized model: load it before"):
        localvit.load_checkpoint(nano, path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["weights", "training"])
def test_torchao_quantizes_around_the_branches(way):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    qat = pytest.importorskip("torchao.quantization.qat", reason="this version of torchao has no QATConfig")
    model = localized()
    expected = model(image())
    if way == "weights":
        config = quantization.Int8WeightOnlyConfig()
    else:
        weight = qat.IntxFakeQuantizeConfig(torch.int8, "per_channel")
        config = qat.QATConfig(weight_config=weight, step="prepare")
    quantization.quantize_(model, config)
    assert "Fake" in type(model.blocks[0].mlp.fc1).__name__ or way == "weights"
    assert len(locality_modules(model)) == DEPTH
    # 8 bits: about 1/255 of each weight's range.
    assert 0 < distance(model(image()), expected) < 0.03 < 0.15 < CHANGE


def test_accelerate_offloads_the_branches(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    expected = localized()(image())
    cpu = torch.device("cpu")
    assert torch.equal(accelerate.cpu_offload(localized(), cpu)(image()), expected)
    assert torch.equal(accelerate.disk_offload(localized(), tmp_path, cpu)(image()), expected)
    with pytest.raises(ValueError, match=r"another library has wrapped the forward of blocks.0.mlp.fc2"):
        localvit.localize(accelerate.cpu_offload(vit(), cpu))


def test_locality_is_not_removed_while_accelerate_offloads_it():
    """Its hooks call the forward of the projection with locality, and its weights are elsewhere."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, without = localized(), localvit.delocalize(localized(), discard=True)(image())
    expected = model(image())
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"the forward of blocks.0.mlp.fc2, .* is wrapped.*: delocalize the model bef"):
        localvit.delocalize(model)
    assert torch.equal(model(image()), expected)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(localvit.delocalize(model, discard=True)(image()), without)


def test_a_model_without_accelerates_hooks_again_is_localized():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = accelerate.dispatch_model(vit(), {"": "cpu"}, main_device="cpu", force_hooks=True)
    accelerate.hooks.add_hook_to_module(model.blocks[0].mlp.fc2, accelerate.hooks.ModelHook())
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(localvit.localize(model)(image()), vit()(image()))
