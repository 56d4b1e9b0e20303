"""Checks that hold for every host of `localize`; the tests of each library call them.

Shapes: B batch, E hidden channels, H and W the patch grid.
"""

import copy

import torch
from torch import nn

import localvit
from localvit.surgery.adapter import LocalityAdapter
from localvit.surgery.localize import localize_with_options
from localvit.surgery.projection import LocalizedProjection
from localvit.surgery.sites import Site, find_sites


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with noise added to every parameter, so that no layer scale or weight of zeros hides an error."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def output_of(model: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """The model's output as one tensor: the first of a tuple, the last hidden state of a Hugging Face output."""
    out = model(*inputs)
    out = getattr(out, "logits", getattr(out, "last_hidden_state", out))
    return out[0] if isinstance(out, tuple | list) else out


def adapters_of(model: nn.Module) -> list[LocalityAdapter]:
    return [module for module in model.modules() if isinstance(module, LocalityAdapter)]


def projections_of(model: nn.Module) -> list[LocalizedProjection]:
    return [module for module in model.modules() if isinstance(module, LocalizedProjection)]


def check_function_is_kept(model: nn.Module, *inputs: torch.Tensor, **options) -> None:
    """The output stays the same, in float64 and float32, and state dicts load both ways. `options` are plain values."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        host = copy.deepcopy(model).to(dtype).eval()
        cast = [value.to(dtype) if value.is_floating_point() else value for value in inputs]
        with torch.no_grad():
            expected = output_of(host, *cast)
            localized = localize_with_options(host, options)
            after = output_of(localized, *cast)
        assert torch.isfinite(expected).all()
        assert (after - expected).abs().max() <= tolerance * expected.abs().max()
        localized.load_state_dict(host.state_dict(), strict=True)
        host.load_state_dict({key: value for key, value in localized.state_dict().items() if ".locality." not in key})


def check_gradients_reach_every_adapter(model: nn.Module, *inputs: torch.Tensor) -> None:
    """The depth-wise weights of every site get a gradient in the first step."""
    localized = localvit.localize(copy.deepcopy(model).float().train(), inplace=True)
    cast = [value.float() if value.is_floating_point() else value for value in inputs]
    output_of(localized, *cast).square().sum().backward()
    adapters = adapters_of(localized)
    assert adapters
    for adapter in adapters:
        assert adapter.conv.weight.grad is not None
        assert adapter.conv.weight.grad.any()


def check_every_adapter_matters(model: nn.Module, *inputs: torch.Tensor) -> None:
    """The negative control: a change of any single adapter changes the output."""
    localized = localvit.localize(copy.deepcopy(model).double().eval(), inplace=True)
    cast = [value.double() if value.is_floating_point() else value for value in inputs]
    with torch.no_grad():
        expected = output_of(localized, *cast)
        for adapter in adapters_of(localized):
            adapter.conv.weight.normal_(generator=torch.Generator().manual_seed(0))
            assert not torch.allclose(output_of(localized, *cast), expected, rtol=1e-6, atol=1e-9)
            adapter.make_neutral()
    localvit.delocalize(localized, inplace=True)
    with torch.no_grad():
        assert torch.equal(output_of(localized, *cast), expected)


def hidden_maps(model: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The hidden map (B, E, H, W) of every site, in order."""
    maps = []
    handles = [
        adapter.register_forward_pre_hook(lambda adapter, args: maps.append(args[0].detach().clone()))
        for adapter in adapters_of(model)
    ]
    with torch.no_grad():
        model(*inputs)
    for handle in handles:
        handle.remove()
    return maps


def without_attention(site: Site) -> None:
    """Zero the attention before a site's feed-forward, so that a token there depends on its own patch only."""
    for name, module in site.block.named_modules():
        projects = name.rpartition(".")[2] in ("proj", "o_proj", "out_proj", "attn_out_proj")
        if projects and isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def check_map_is_the_image(
    model: nn.Module, image_BCHW: torch.Tensor, *, reach: int = 0, silence=without_attention
) -> None:
    """A change of one pixel changes the first site's hidden map at the pixel's patch, within `reach` patches.

    `reach` allows for a convolutional stem; `silence` zeroes the attention between image and site.
    """
    localized = copy.deepcopy(model).double().eval()
    for site in find_sites(localized)[:1]:
        silence(site)
    localized = localvit.localize(localized, inplace=True)
    image_BCHW = image_BCHW.double()
    [before, *_] = hidden_maps(localized, image_BCHW)
    grid_height, grid_width = before.shape[2:]
    height, width = image_BCHW.shape[2:]
    for row, column in ((0, 0), (0, grid_width - 1), (grid_height - 1, 0), (grid_height // 2, grid_width // 3)):
        spotted = image_BCHW.clone()
        top, left = int((row + 0.5) * height / grid_height), int((column + 0.5) * width / grid_width)
        spotted[:, :, top, left] += 3.0
        [after, *_] = hidden_maps(localized, spotted)
        changed = ((after - before).abs().amax((0, 1)) > 1e-9).nonzero().tolist()
        assert [row, column] in changed
        assert all(abs(y - row) <= reach and abs(x - column) <= reach for y, x in changed)
