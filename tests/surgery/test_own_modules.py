"""Locality in a module that is not a supported host: PyTorch's encoder after a convolutional patch embedding.

Shapes: B batch, N tokens, E hidden channels, C channels, H and W the patch grid.
"""

import pytest
import torch
import torch.nn.functional as F
from checks import adapters_of, check_function_is_kept, hidden_maps
from torch import nn

import localvit
from localvit.surgery.localize import localize_with_options


class PlainTransformer(nn.Module):
    """Patches of 5 x 5 pixels, a class token, and `nn.TransformerEncoder`; without positions it takes any image."""

    def __init__(self, *, batch_first: bool = True, norm_first: bool = False) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 24, 5, 5)
        self.class_token = nn.Parameter(torch.zeros(1, 1, 24))
        layer = nn.TransformerEncoderLayer(24, 2, 40, dropout=0.0, batch_first=batch_first, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.batch_first = batch_first

    def forward(self, image_BCHW):
        x_BNC = self.patch_embed(image_BCHW).flatten(2).transpose(1, 2)
        x_BNC = torch.cat([self.class_token.expand(len(x_BNC), -1, -1), x_BNC], 1)
        return self.encoder(x_BNC) if self.batch_first else self.encoder(x_BNC.transpose(0, 1))


OPTIONS = {"filter_fn": lambda module, name: name.endswith("linear2"), "grid": "patch_embed", "num_prefix_tokens": 1}


def make(**kwargs) -> PlainTransformer:
    torch.manual_seed(0)
    model = PlainTransformer(**kwargs)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def image(height: int = 7, width: int = 3, batch: int = 2) -> torch.Tensor:
    """Images of this many patches."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, 5 * height, 5 * width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("grid", ["patch_embed", (7, 3)], ids=["followed", "fixed"])
def test_function_is_kept(norm_first, grid):
    check_function_is_kept(make(norm_first=norm_first), image(), **OPTIONS | {"grid": grid})


def test_the_fused_kernel_does_not_skip_adapters():
    """In evaluation PyTorch runs a whole layer in one kernel, which calls no submodule, unless there are hooks."""
    model, reference = make(), make()
    localvit.localize(model, **OPTIONS, inplace=True)
    assert [name for name, module in model.named_modules() if module in adapters_of(model)] == [
        "encoder.layers.0.linear2.locality",
        "encoder.layers.1.linear2.locality",
    ]
    with torch.no_grad():
        for adapter in adapters_of(model):
            expected = model(image())
            adapter.conv.weight.normal_(generator=torch.Generator().manual_seed(2))
            assert not torch.allclose(model(image()), expected, rtol=1e-6)
            adapter.make_neutral()
        # float64; the reference takes the fused kernel.
        torch.testing.assert_close(model(image()), reference(image()))
    with torch.inference_mode():
        nn.init.ones_(adapter.conv.weight)
        assert not torch.allclose(model(image()), reference(image()), rtol=1e-6)


def test_gradients_reach_every_adapter():
    model = localvit.localize(make().train(), **OPTIONS)
    # Not the plain sum of squares: the last layer norm fixes it.
    (model(image()) ** 3).sum().backward()
    assert len(adapters_of(model)) == 2
    assert all(adapter.conv.weight.grad.any() for adapter in adapters_of(model))


@pytest.mark.parametrize("grid", ["patch_embed", (7, 3)], ids=["followed", "fixed"])
def test_layer_with_locality_written_out(grid):
    """The first layer's feed-forward against its formula, with a convolution in image order."""
    model = localvit.localize(make(norm_first=True), **OPTIONS | {"grid": grid})
    layer = model.encoder.layers[0]
    weight = layer.linear2.locality.conv.weight
    nn.init.normal_(weight, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        x_BNC = torch.randn(2, 22, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        model.patch_embed(image())  # A block by itself has no grid before the patch embedding ran.
        found_BNC = layer(x_BNC)
        between_BNC = x_BNC + layer.self_attn(*[layer.norm1(x_BNC)] * 3, need_weights=False)[0]
        hidden_BNE = F.relu(layer.linear1(layer.norm2(between_BNC)))
        map_BEHW = hidden_BNE[:, 1:].mT.unflatten(2, (7, 3))
        added_BNE = F.conv2d(map_BEHW, weight, padding=1, groups=40).flatten(2).mT
        hidden_BNE = torch.cat([hidden_BNE[:, :1], hidden_BNE[:, 1:] + added_BNE], 1)
        expected_BNC = between_BNC + F.linear(hidden_BNE, layer.linear2.weight, layer.linear2.bias)
    torch.testing.assert_close(found_BNC, expected_BNC)


def test_the_grid_follows_the_image():
    model = localvit.localize(make(), **OPTIONS)
    for height, width in ((7, 3), (2, 11)):
        assert [tuple(map_BEHW.shape[2:]) for map_BEHW in hidden_maps(model, image(height, width))] == [
            (height, width),
            (height, width),
        ]


def test_fixed_grid_takes_no_other_image():
    model = localvit.localize(make(), **OPTIONS | {"grid": (7, 3)})
    with pytest.raises(ValueError, match=r"22 image tokens .* do not fill the 7 x 3 grid of 21"):
        model(image(2, 11))


def test_tokens_before_the_batch():
    """Without batch_first the second dimension is the batch, and 2 images are not 21 patches."""
    model = localvit.localize(make(batch_first=False), **OPTIONS)
    with pytest.raises(ValueError, match=r"1 image tokens .* do not fill the 7 x 3 grid of 21"):
        model(image())


def test_a_block_by_itself_has_no_grid():
    model = localvit.localize(make(), **OPTIONS)
    with pytest.raises(ValueError, match=r"no patch grid is recorded for 21 image tokens .*: run the whole model"):
        model.encoder(torch.zeros(2, 22, 24, dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"grid": "patches"}, "grid='patches' is not the name of a submodule of PlainTransformer"),
        ({"grid": (7, 0)}, r"grid=\(7, 0\) must be \(height, width\) in patches"),
        ({"grid": (7, 3, 1)}, r"must be \(height, width\)"),
        ({"grid": None}, "PlainTransformer has no feed-forward that localize can find"),
        ({"filter_fn": None}, "select its linear layers with filter_fn"),
        ({"filter_fn": lambda module, name: False}, "filter_fn matched none of the 6 projections"),
        ({"filter_fn": ["encoder.layers.2.linear2"]}, "filter_fn names encoder.layers.2.linear2, but"),
        ({"blocks": "12"}, r"blocks='12': the model has blocks 1 to \d+, not \[12\]"),
        ({"method": "replace"}, "this works for supported hosts only"),
    ],
)
def test_invalid_arguments_raise_and_change_nothing(changes, why):
    model = make()
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=why):
        localize_with_options(model, OPTIONS | changes, inplace=True)
    assert set(model.state_dict()) == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_names_in_place_of_a_function():
    model = localvit.localize(make(), **OPTIONS | {"filter_fn": ["encoder.layers.1.linear2"]})
    assert [name for name, _ in model.named_modules() if name.endswith(".locality")] == [
        "encoder.layers.1.linear2.locality"
    ]


def test_state_dict_and_back():
    model, original = make(), make()
    localvit.localize(model, **OPTIONS, inplace=True)
    model.load_state_dict(original.state_dict())
    other = localvit.localize(make(), **OPTIONS)
    nn.init.normal_(adapters_of(model)[0].conv.weight)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(image()), model(image()))
        localvit.delocalize(model, discard=True, inplace=True)
        assert torch.equal(model(image()), original(image()))
