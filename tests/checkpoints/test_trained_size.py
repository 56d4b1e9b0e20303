"""Published checkpoints trained at another size than 224: they load at the size that is known, and never at a guess."""

import argparse

import pytest
import torch

import localvit
from localvit.models.published_names import to_published_names
from localvit.utils.weight_files import CheckpointError

TNT = {"depth": 1, "embed_dim": 48, "inner_dim": 12, "num_heads_inner": 3, "num_heads_outer": 3}
PVT = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4)}
SMALL = {
    "localvit_tiny": {"depth": 1, "embed_dim": 48},
    "localvit_tnt_tiny": TNT,
    "localvit_pvt_tiny": PVT,
    "localvit_t2t_7": {"depth": 1, "embed_dim": 48, "reduction": 4},
}
"""One model of each family with absolute position embeddings, small."""

families = pytest.mark.parametrize("name", SMALL)


def trained(name, img_size):
    """A model for `img_size` in evaluation mode whose position embeddings are random."""
    torch.manual_seed(0)
    model = localvit.create_model(name, num_classes=3, img_size=img_size, **SMALL[name]).eval()
    with torch.no_grad():
        for key in model.position_grids():
            model.state_dict()[key].normal_()
    return model


def published_file(path, model, **args):
    """A published file of the model, with `args` as the published program stores them."""
    content = {"model": to_published_names(model, model.state_dict())}
    torch.save(content | ({"args": argparse.Namespace(**args)} if args else {}), path)
    return path


def another(name, img_size):
    torch.manual_seed(1)
    return localvit.create_model(name, num_classes=3, img_size=img_size, **SMALL[name]).eval()


@families
@pytest.mark.parametrize("img_size", [(96, 96), (64, 160)])
def test_a_model_made_for_the_trained_size_loads_without_options(name, img_size, tmp_path):
    model = trained(name, img_size)
    again = another(name, img_size)
    localvit.load_checkpoint(again, published_file(tmp_path / "a.pth", model))
    images = torch.randn(2, 3, *img_size)
    torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)


@families
@pytest.mark.parametrize("args", [{"input_size": 96}, {"input_size": (64, 160)}, {"input_size": [64, 160]}])
def test_the_size_in_the_files_args_is_used(name, args, tmp_path):
    side = args["input_size"]
    model = trained(name, (side, side) if isinstance(side, int) else tuple(side))
    path = published_file(tmp_path / "a.pth", model, **args)
    again = another(name, (128, 96))
    localvit.load_checkpoint(again, path)
    images = torch.randn(2, 3, 128, 96)
    # The same resampling, once or in each forward; float32 sums in another order.
    torch.testing.assert_close(again(images), model(images), rtol=1e-4, atol=1e-5)


@families
def test_equal_counts_of_patches_on_transposed_grids_are_resampled(name, tmp_path):
    """A file trained at 64 x 160 has as many position embeddings as a model for 160 x 64."""
    model = trained(name, (64, 160))
    images = torch.randn(2, 3, 160, 64)
    for path, size in (
        (published_file(tmp_path / "a.pth", model, input_size=(64, 160)), None),
        (published_file(tmp_path / "b.pth", model), (64, 160)),
        (localvit.save_checkpoint(model, tmp_path / "c.safetensors"), None),
    ):
        again = another(name, (160, 64))
        localvit.load_checkpoint(again, path, checkpoint_img_size=size)
        # The same resampling, once or in each forward; float32 sums in another order.
        torch.testing.assert_close(again(images), model(images), rtol=1e-4, atol=1e-5)
        first = next(iter(model.position_grids()))
        assert not torch.equal(again.state_dict()[first], model.state_dict()[first])


@families
def test_an_unknown_size_raises_and_can_be_given(name, tmp_path):
    model = trained(name, (96, 160))
    path = published_file(tmp_path / "a.pth", model)
    again = another(name, (128, 96))
    before = {key: value.clone() for key, value in again.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"position embeddings for .*60.* patches.* pass checkpoint_img_size="):
        localvit.load_checkpoint(again, path)
    with pytest.raises(CheckpointError, match=r"not the grid of 96 x 96 pixels that checkpoint_img_size says"):
        localvit.load_checkpoint(again, path, checkpoint_img_size=(96, 96))
    for key, value in again.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    localvit.load_checkpoint(again, path, checkpoint_img_size=(96, 160))
    images = torch.randn(2, 3, 128, 96)
    # The same resampling, once or in each forward; float32 sums in another order.
    torch.testing.assert_close(again(images), model(images), rtol=1e-4, atol=1e-5)


def test_a_count_that_two_known_sizes_have_raises(tmp_path):
    """448 x 112 pixels have as many patches as the released 224 x 224."""
    model = trained("localvit_tiny", (224, 224))
    again = another("localvit_tiny", (448, 112))
    with pytest.raises(CheckpointError, match=r"both 448 x 112 and 224 x 224 pixels have that many: pass"):
        localvit.load_checkpoint(again, published_file(tmp_path / "a.pth", model))
    localvit.load_checkpoint(again, published_file(tmp_path / "b.pth", model, input_size=224))
    images = torch.randn(1, 3, 448, 112)
    # The same resampling, once or in each forward; float32 sums in another order.
    torch.testing.assert_close(again(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["localvit_tiny", "localvit_tnt_tiny", "localvit_pvt_tiny", "localvit_t2t_7"])
def test_a_model_from_a_published_file_is_made_for_the_trained_size(name, tmp_path):
    torch.manual_seed(0)
    model = localvit.create_model(name, num_classes=3, img_size=(96, 160)).eval()
    images = torch.randn(1, 3, 96, 160)
    for path, size in (
        (published_file(tmp_path / "a.pth", model, input_size=(96, 160)), None),
        (published_file(tmp_path / "b.pth", model), (96, 160)),
    ):
        again, checkpoint = localvit.model_from_checkpoint(path, checkpoint_img_size=size)  # found by its entries
        assert again.position_grids() == model.position_grids()
        assert again.made_from["args"] == {"num_classes": 3, "img_size": (96, 160)}
        assert checkpoint.img_size == (None if size else (96, 160))
        torch.testing.assert_close(again.eval()(images), model(images), rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="pass checkpoint_img_size="):
        localvit.model_from_checkpoint(tmp_path / "b.pth")


def test_a_stated_size_that_does_not_fit_is_not_trusted(tmp_path):
    model = trained("localvit_tiny", (96, 160))
    for input_size in (224, 10**12, -96, "96", None, (96, 160, 3)):
        again = another("localvit_tiny", (96, 160))
        localvit.load_checkpoint(again, published_file(tmp_path / "a.pth", model, input_size=input_size))
        torch.testing.assert_close(again.pos_embed, model.pos_embed, rtol=0, atol=0)


def test_swin_has_no_absolute_positions_and_loads_at_any_size(tmp_path):
    small = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4), "window_size": 4, "num_classes": 3}
    model = localvit.create_model("localvit_swin_tiny", img_size=(128, 256), **small).eval()
    path = published_file(tmp_path / "a.pth", model, input_size=(128, 256))
    images = torch.randn(1, 3, 128, 256)
    for img_size in ((128, 256), (256, 128), (128, 128)):
        again = localvit.create_model("localvit_swin_tiny", img_size=img_size, **small).eval()
        localvit.load_checkpoint(again, path)
        torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)
