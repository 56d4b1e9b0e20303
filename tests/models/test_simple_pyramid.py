"""SimplePyramid against its layers written out in float64, for every plain model.

Shapes: B batch, C channels of the transformer, D channels of the pyramid, H and W the patch grid.
"""

import pytest
import timm
import torch
import torch.nn.functional as F

import localvit

PLAIN = {
    "localvit_tiny": {"depth": 1, "img_size": (48, 80)},
    "localvit_small": {"depth": 1, "img_size": (48, 80)},
    "localvit_tnt_tiny": {"depth": 1, "img_size": (48, 80)},
    "localvit_t2t_7": {"depth": 1, "img_size": (48, 80)},
    "deit_tiny_patch16_224": {"depth": 1, "img_size": (48, 80), "localize": {"kernel_size": 5}},
}
PATCH = 16


def images():
    return torch.randn(2, 3, 48, 80, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", PLAIN)
def test_strides_of_every_plain_model(name):
    torch.manual_seed(0)
    pyramid = localvit.SimplePyramid(localvit.create_model(name, **PLAIN[name]), channels=7)
    assert pyramid.feature_info.reduction() == [4, 8, 16, 32]
    assert pyramid.feature_info.channels() == [7, 7, 7, 7]
    maps = pyramid(images())
    # A side of 3 or 5 patches has a last window of its own at stride 32.
    assert [tuple(each.shape) for each in maps] == [(2, 7, 12, 20), (2, 7, 6, 10), (2, 7, 3, 5), (2, 7, 2, 3)]
    sum(each.square().sum() for each in maps).backward()
    unused = [key for key, parameter in pyramid.named_parameters() if parameter.grad is None]
    assert unused == []  # DistributedDataParallel refuses a module with any


def norm(map_BCHW, state, key):
    """LayerNorm over the channels, from its definition."""
    centered = map_BCHW - map_BCHW.mean(1, keepdim=True)
    normed = centered / (centered.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return normed * state[f"{key}.weight"][:, None, None] + state[f"{key}.bias"][:, None, None]


def upsampled(map_BCHW, state, key):
    """Every pixel becomes 2 x 2 pixels, each by a matrix of its own."""
    B, _, H, W = map_BCHW.shape
    out = torch.einsum("bchw,cdij->bdhiwj", map_BCHW, state[f"{key}.weight"])
    return out.reshape(B, -1, 2 * H, 2 * W) + state[f"{key}.bias"][:, None, None]


def ended(map_BCHW, state, level, first):
    out = torch.einsum("bchw,dc->bdhw", map_BCHW, state[f"levels.{level}.{first}.weight"][:, :, 0, 0])
    out = norm(out, state, f"levels.{level}.{first + 1}")
    out = F.conv2d(out, state[f"levels.{level}.{first + 2}.weight"], padding=1)
    return norm(out, state, f"levels.{level}.{first + 3}")


@torch.no_grad()
def test_the_maps_are_those_of_the_definition():
    torch.manual_seed(0)
    model = localvit.create_model("localvit_tiny", **PLAIN["localvit_tiny"])
    pyramid = localvit.SimplePyramid(model, channels=7).double().eval()
    for parameter in pyramid.levels.parameters():
        parameter.normal_(std=0.3)
    state = dict(pyramid.named_parameters())
    images_BCHW = images().double()
    tokens_BNC = model.forward_features(images_BCHW)[:, 1:]
    last_BCHW = tokens_BNC.transpose(1, 2).reshape(2, 192, 3, 5)
    double = upsampled(last_BCHW, state, "levels.1.0")
    quadruple = upsampled(
        F.gelu(norm(upsampled(last_BCHW, state, "levels.0.0"), state, "levels.0.1")), state, "levels.0.3"
    )
    padded = F.pad(last_BCHW, (0, 1, 0, 1), value=float("-inf"))
    half = padded.reshape(2, 192, 2, 2, 3, 2).amax((3, 5))
    expected = [
        ended(quadruple, state, 0, 4),
        ended(double, state, 1, 1),
        ended(last_BCHW, state, 2, 0),
        ended(half, state, 3, 1),
    ]
    for got, wanted in zip(pyramid(images_BCHW), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_other_strides():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64)
    pyramid = localvit.SimplePyramid(model, channels=5, strides=(8, 64))
    assert [tuple(each.shape[2:]) for each in pyramid(torch.randn(1, 3, 64, 64))] == [(8, 8), (1, 1)]
    model = timm.create_model("vit_small_patch14_reg4_dinov2", depth=1, img_size=56)
    assert localvit.SimplePyramid(model).feature_info.reduction() == [7, 14, 28]


@pytest.mark.parametrize(
    ("name", "strides", "message"),
    [
        ("localvit_pvt_tiny", None, "LocalPVT has maps of strides 4, 8, 16, 32 already"),
        ("resnet18", None, "ResNet has maps of strides 2, 4, 8, 16, 32 already"),
        (
            "localvit_tiny",
            (2,),
            r"strides=\[2\] cannot be had from patches of 16 pixels: choose some of 4, 8, 16",
        ),
        ("localvit_tiny", (32, 16), "in ascending order"),
        ("localvit_tiny", (), "cannot be had"),
    ],
)
def test_what_is_not_possible(name, strides, message):
    model = localvit.create_model(name, device="meta")
    with pytest.raises(ValueError, match=message):
        localvit.SimplePyramid(model, strides=strides)
    assert model.num_classes == 1000  # nothing was removed


def test_a_module_without_maps_is_refused():
    with pytest.raises(ValueError, match="Linear does not return its maps"):
        localvit.SimplePyramid(torch.nn.Linear(2, 2))
