"""The models as backbones in other libraries: segmentation, detection, and the snippets of docs/backbone.md."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import localvit

DOCUMENT = (Path(__file__).parents[2] / "docs" / "backbone.md").read_text()
SMALL_PVT: dict[str, Any] = {"depths": (1, 1, 1, 1), "embed_dims": (16, 24, 32, 40), "num_heads": (1, 2, 2, 2)}
SMALL_SWIN: dict[str, Any] = {"depths": (1, 1, 1, 1), "embed_dim": 16, "num_heads": (1, 2, 2, 4), "window_size": 4}


@pytest.fixture
def smp():
    return pytest.importorskip("segmentation_models_pytorch", reason="segmentation_models_pytorch is not installed")


@pytest.mark.parametrize(("decoder", "side"), [("Unet", 224), ("Unet", 256), ("FPN", 224), ("UPerNet", 256)])
@pytest.mark.parametrize(
    ("encoder", "arguments"),
    [("localvit_pvt_tiny", SMALL_PVT), ("localvit_swin_tiny", SMALL_SWIN | {"window_size": 7})],
)
@torch.no_grad()
def test_decoders_read_the_maps_that_the_model_gives(encoder, arguments, decoder, side, smp):
    torch.manual_seed(0)
    model = getattr(smp, decoder)(f"tu-{encoder}", encoder_weights=None, classes=3, **arguments).eval()
    images = torch.randn(1, 3, side, side)
    maps = model.encoder(images)
    alone = timm.create_model(encoder, features_only=True, **arguments).eval()
    alone.load_state_dict(model.encoder.model.state_dict())
    for got, wanted in zip(maps[2:], alone(images), strict=True):
        assert torch.equal(got, wanted)
    assert model(images).shape == (1, 3, side, side)


def rectangles(count, side):
    """Noise with one bright rectangle in each image; the rectangle's corners and its mask."""
    random = torch.Generator().manual_seed(0)
    images = 0.3 * torch.rand(count, 3, side, side, generator=random)
    masks = torch.zeros(count, side, side, dtype=torch.long)
    boxes = []
    for image, mask in zip(images, masks, strict=True):
        left, top = torch.randint(0, side // 2, (2,), generator=random).tolist()
        right, bottom = left + side // 3, top + side // 2
        image[:, top:bottom, left:right] += 0.6
        mask[top:bottom, left:right] = 1
        boxes.append([left, top, right, bottom])
    return images, masks, torch.tensor(boxes, dtype=torch.float32)


def losses_of(model, loss_of, steps, lr):
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("encoder", "arguments"), [("localvit_pvt_tiny", SMALL_PVT), ("localvit_swin_tiny", SMALL_SWIN)]
)
def test_a_segmentation_model_learns(encoder, arguments, smp):
    torch.manual_seed(0)
    model = smp.FPN(f"tu-{encoder}", encoder_weights=None, classes=2, decoder_dropout=0.0, **arguments)
    images, masks, _ = rectangles(4, 64)
    losses = losses_of(model, lambda: F.cross_entropy(model(images), masks), steps=12, lr=3e-3)
    assert losses[-1] < 0.5 * losses[0]


class Backbone(nn.Module):
    """Maps by name, as torchvision's detectors want them."""

    def __init__(self, features):
        super().__init__()
        self.features, self.out_channels = features, features.feature_info.channels()[0]

    def forward(self, images):
        return {str(index): each for index, each in enumerate(self.features(images))}


def with_top_down_path(features):
    from torchvision.ops import FeaturePyramidNetwork

    class Merged(Backbone):
        def __init__(self):
            super().__init__(features)
            self.out_channels = 32
            self.fpn = FeaturePyramidNetwork(features.feature_info.channels(), 32)

        def forward(self, images):
            return self.fpn(super().forward(images))

    return Merged()


@pytest.mark.parametrize("kind", ["PVT with FPN", "SimplePyramid"])
def test_a_detector_learns(kind):
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.rpn import AnchorGenerator

    torch.manual_seed(0)
    if kind == "SimplePyramid":
        plain = localvit.create_model("localvit_tiny", depth=2, embed_dim=48, num_heads=2, reduction=48, img_size=96)
        backbone = Backbone(localvit.SimplePyramid(plain, channels=32))
    else:
        backbone = with_top_down_path(timm.create_model("localvit_pvt_tiny", features_only=True, **SMALL_PVT))
    detector = FasterRCNN(
        backbone,
        num_classes=2,
        min_size=96,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(((8,), (16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 4),
        rpn_pre_nms_top_n_train=100,
        rpn_post_nms_top_n_train=50,
        box_batch_size_per_image=32,
    )
    images, _, boxes = rectangles(4, 96)
    targets = [{"boxes": box[None], "labels": torch.tensor([1])} for box in boxes]
    losses = losses_of(detector, lambda: sum(detector(list(images), targets).values()), steps=12, lr=2e-3)
    assert losses[-1] < 0.7 * losses[0]


@torch.no_grad()
def test_timm_backbone_of_transformers_gives_the_same_maps():
    transformers = pytest.importorskip("transformers", reason="Hugging Face transformers is an extra")
    config = transformers.TimmBackboneConfig(
        backbone="localvit_swin_tiny", out_indices=[1, 2, 3], use_pretrained_backbone=False
    )
    backbone = transformers.TimmBackbone(config).eval()
    images = torch.randn(1, 3, 64, 96)
    alone = timm.create_model("localvit_swin_tiny", features_only=True, out_indices=(1, 2, 3)).eval()
    weights = {key.removeprefix("_backbone."): value for key, value in backbone.state_dict().items()}
    alone.load_state_dict(weights)
    for got, wanted in zip(backbone(images).feature_maps, alone(images), strict=True):
        assert torch.equal(got, wanted)
    assert backbone.channels == [192, 384, 768]


def test_every_snippet_of_the_document_runs(smp, tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="Hugging Face transformers is an extra")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    trained = localvit.create_model("localvit_pvt_tiny", num_classes=5)
    localvit.save_checkpoint(trained, "runs/mine/best.safetensors")
    localvit.save_hub_folder(localvit.load_model("runs/mine/best.safetensors"), "shared")
    names: dict = {}
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT, flags=re.MULTILINE | re.DOTALL)
    expected = trained.stages[0].blocks[0].mlp.conv[0].weight
    for block in blocks:
        exec(compile(block, "backbone.md", "exec"), names)
        if "local-dir:shared" in block and "overlay" in block:
            found = [value for key, value in names["backbone"].state_dict().items() if value.shape == expected.shape]
            assert any(torch.equal(value, expected) for value in found)
        if "UPerNet" in block:
            found = [v for v in names["upernet"].encoder.state_dict().values() if v.shape == expected.shape]
            assert any(torch.equal(value, expected) for value in found)
    assert len(blocks) == 6
    assert names["masks"].shape == (2, 3, 128, 128)
    assert names["losses"].keys() == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert [tuple(each.shape[2:]) for each in names["maps"]] == [(28, 28), (14, 14), (7, 7)]
    with torch.no_grad():
        maps = names["plain_detector"].backbone(torch.rand(1, 3, 64, 96))
    assert {name: tuple(each.shape[2:]) for name, each in maps.items()} == {
        **{"0": (16, 24), "1": (8, 12), "2": (4, 6), "3": (2, 3), "pool": (1, 2)}
    }
