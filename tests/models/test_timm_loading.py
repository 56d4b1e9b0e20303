"""Weights by timm's own ways: `save_for_hf` and `local-dir:`, a file in place of the download, `checkpoint_path`."""

import copy

import pytest
import timm
import torch
from small import ONE_OF_EACH, image_size, small_model
from timm.models import save_for_hf
from torch import nn

import localvit
from localvit.models.published_names import to_published_names

pytestmark = pytest.mark.skipif(
    tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 31),
    reason="timm's interface as of 1.0.31: earlier ones lack arguments, attributes and ways of loading",
)

FAMILIES = [*ONE_OF_EACH, "T2t_vit_7"]


def shaken(name, **kwargs):
    torch.manual_seed(0)
    model = small_model(name, **kwargs).eval()
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.rand_like(value) / 10)
    return model


def same(model, other, image):
    assert torch.equal(model.eval()(image), other.eval()(image))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_of_save_for_hf_is_the_model(name, tmp_path):
    """At another image size than the released one, with the arguments that the model was made with."""
    model = shaken(name)
    size = image_size(name)
    arguments = dict(model.made_from["args"])
    save_for_hf(model, tmp_path, model_args=arguments, safe_serialization=True)
    source = f"local-dir:{tmp_path}"
    image = torch.randn(2, 3, size, size)
    same(timm.create_model(source, pretrained=True), model, image)
    fewer = timm.create_model(source, pretrained=True, num_classes=3).eval()
    expected = model.forward_features(image)
    assert torch.equal(fewer.forward_features(image), expected)
    assert fewer(image).shape == (2, 3)
    backbone = timm.create_model(source, pretrained=True, features_only=True, out_indices=(0, 1)).eval()
    wanted = model.forward_intermediates(image, indices=[0, 1], intermediates_only=True)
    for feature, want in zip(backbone(image), wanted, strict=True):
        torch.testing.assert_close(feature, want)


@pytest.mark.parametrize("name", [name for name in FAMILIES if "T2t" not in name])
def test_one_channel_sums_the_weights_of_three(name, tmp_path):
    model = shaken(name)
    save_for_hf(model, tmp_path, model_args=dict(model.made_from["args"]), safe_serialization=True)
    grey = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1).eval()
    image = torch.randn(2, 1, image_size(name), image_size(name))
    # float32: three products and their sum against one product with the sum of the weights.
    torch.testing.assert_close(grey(image), model(image.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in FAMILIES if "swin" not in name])
def test_positions_of_a_folder_are_resampled(name, tmp_path):
    model = shaken(name)
    save_for_hf(model, tmp_path, model_args=dict(model.made_from["args"]), safe_serialization=True)
    side = 2 * image_size(name)
    larger = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=(side, side // 2))
    if not getattr(larger, "pretrained_model_args", {}):
        pytest.skip("timm before 1.0.31 does not know the size of the saved model")
    resized = copy.deepcopy(model)
    resized.set_input_size((side, side // 2))
    image = torch.randn(1, 3, side, side // 2)
    torch.testing.assert_close(larger.eval()(image), resized(image))


@pytest.mark.parametrize("layout", ["localvit", "published", "plain"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_of_either_layout_by_every_way_of_timm(name, layout, tmp_path):
    model = shaken(name)
    path = tmp_path / ("a.safetensors" if layout == "localvit" else "a.pth")
    if layout == "plain":
        torch.save(model.state_dict(), path)
    else:
        average = {key: value * 0 for key, value in model.state_dict().items()} if layout == "localvit" else None
        localvit.save_checkpoint(model, path, layout=layout, ema=average)
    arguments = model.made_from["args"]
    image = torch.randn(2, 3, image_size(name), image_size(name))
    overlay = {"file": str(path), "num_classes": 7, "input_size": (3, *model.pretrained_cfg["input_size"][1:])}
    if layout == "published":  # the file does not say its size; then it is that of the configuration
        overlay["input_size"] = (3, image_size(name), image_size(name))
    with_file = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    same(with_file, model, image)
    for create_model in (timm.create_model, localvit.create_model):
        same(create_model(name, checkpoint_path=str(path), **arguments), model, image)
    from_tensors = {**overlay, "file": None, "state_dict": model.state_dict()}
    same(localvit.create_model(name, pretrained=True, pretrained_cfg_overlay=from_tensors, **arguments), model, image)


@pytest.mark.parametrize("name", FAMILIES)
def test_load_state_dict_takes_published_names(name):
    model, other = shaken(name), small_model(name)
    assert not other.load_state_dict(to_published_names(model, model.state_dict())).missing_keys
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())
    nn.init.zeros_(other.get_classifier().weight)
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())


def test_save_for_hf_has_the_arguments_of_create_model(tmp_path):
    model = localvit.create_model("localvit_nano_patch4_32", depth=2, num_classes=3)
    model.set_input_size((32, 64))
    save_for_hf(model, tmp_path, safe_serialization=True)
    if not getattr(timm.models, "get_model_args", None):
        pytest.skip("timm before 1.0.31 stores no arguments")
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    same(again, model, torch.randn(1, 3, 32, 64))
