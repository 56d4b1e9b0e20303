"""Batches of images with different grids: the layout, and the hosts of timm that take such batches.

Shapes: B batch, N tokens, P prefix tokens, C channels, H and W a grid.
"""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from checks import (
    adapters_of,
    check_every_adapter_matters,
    check_function_is_kept,
    check_gradients_reach_every_adapter,
    check_map_is_the_image,
    hidden_maps,
    output_of,
    randomized,
)
from torch import nn

import localvit
from localvit import Adapter, Replace
from localvit.surgery.adapter import LocalityAdapter
from localvit.surgery.localize import localize_with_options
from localvit.surgery.projection import LocalizedProjection
from localvit.surgery.sites import Site, find_sites
from localvit.tokens.ragged import Placement, RaggedGrid, RaggedTokens, placement_of_coordinates, placement_of_shapes

SHAPES = ((2, 7), (5, 3), (1, 11), (3, 5), (5, 11))
"""The last one fills its canvas, so that no empty positions follow it."""
CHANNELS = 6


def coordinates(shapes, *, padding: int = 0, order_seed: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, column) of tokens (B, N, 2) and which are not padding (B, N), row by row or in any order."""
    tokens = max(height * width for height, width in shapes) + padding
    coord_BN2 = torch.zeros(len(shapes), tokens, 2, dtype=torch.long)
    valid_BN = torch.zeros(len(shapes), tokens, dtype=torch.bool)
    for sample, (height, width) in enumerate(shapes):
        number = height * width
        coord_BN2[sample, :number] = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        valid_BN[sample, :number] = True
        if order_seed is not None:
            order = torch.randperm(tokens, generator=torch.Generator().manual_seed(order_seed + sample))
            coord_BN2[sample], valid_BN[sample] = coord_BN2[sample, order], valid_BN[sample, order]
    return coord_BN2, valid_BN


def ragged_layout(placement: Placement, num_prefix_tokens: int = 0) -> RaggedTokens:
    grid = RaggedGrid()
    grid.record(placement)
    return RaggedTokens(grid, num_prefix_tokens)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, {"kernel_size": 5}, {"dilation": 2}], ids=["3", "5", "dilated"])
@pytest.mark.parametrize("prefix", [0, 2])
def test_the_adapter_convolves_each_map(options, prefix):
    """Output and gradients against one image at a time. Padding is noise and passes unchanged."""
    coord_BN2, valid_BN = coordinates(SHAPES, padding=2, order_seed=5)
    layout = ragged_layout(placement_of_coordinates(coord_BN2, valid_BN), prefix)
    adapter = LocalityAdapter(CHANNELS, Adapter(**options)).double()
    nn.init.normal_(adapter.conv.weight, generator=torch.Generator().manual_seed(1))
    x_BNC = noise(len(SHAPES), prefix + valid_BN.shape[1], CHANNELS).requires_grad_()
    out_BNC = LocalizedProjection(nn.Identity(), adapter, layout)(x_BNC)

    expected_BNC = x_BNC.clone()
    for sample, (height, width) in enumerate(SHAPES):
        tokens = valid_BN[sample].nonzero()[:, 0]
        y, x = coord_BN2[sample, tokens].unbind(-1)
        map_CHW = x_BNC.new_zeros(CHANNELS, height, width).index_put(
            (torch.arange(CHANNELS)[:, None], y, x), x_BNC[sample, prefix + tokens].T
        )
        conv = adapter.conv
        added_CHW = F.conv2d(map_CHW, conv.weight, None, 1, conv.padding, conv.dilation, CHANNELS)
        expected_BNC = expected_BNC.index_put(
            (torch.tensor(sample), prefix + tokens), x_BNC[sample, prefix + tokens] + added_CHW[:, y, x].T
        )
    # float64: sums of at most 25 products, in another order.
    torch.testing.assert_close(out_BNC, expected_BNC, rtol=1e-12, atol=1e-12)
    assert torch.equal(out_BNC[:, :prefix], x_BNC[:, :prefix])
    assert torch.equal(out_BNC[:, prefix:][~valid_BN], x_BNC[:, prefix:][~valid_BN])

    weights = noise(*out_BNC.shape)
    of = (x_BNC, adapter.conv.weight)
    found = torch.autograd.grad((out_BNC * weights).sum(), of)
    expected = torch.autograd.grad((expected_BNC * weights).sum(), of)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_placement_of_shapes_is_row_by_row():
    coord_BN2, valid_BN = coordinates(SHAPES, padding=2)
    placement = placement_of_shapes(torch.tensor(SHAPES), valid_BN.shape[1])
    expected = placement_of_coordinates(coord_BN2, valid_BN)
    assert placement.size == expected.size == (5, 11)
    assert torch.equal(placement.index_BN, expected.index_BN)


def test_coordinates_may_start_anywhere():
    """Patches cut out of larger images: each sample's map starts at its first row and column."""
    coord_BN2, valid_BN = coordinates(SHAPES, padding=2, order_seed=3)
    offsets_B12 = torch.tensor([[200, 3], [0, 0], [7, 50_000], [1, 900], [40, 0]])[:, None]
    found = placement_of_coordinates(coord_BN2 + offsets_B12, valid_BN)
    expected = placement_of_coordinates(coord_BN2, valid_BN)
    assert found.size == expected.size == (5, 11)
    assert torch.equal(found.index_BN, expected.index_BN)


def test_a_sample_of_padding_only():
    coord_BN2, valid_BN = coordinates(((2, 3), (1, 2)))
    valid_BN[1] = False
    placement = placement_of_coordinates(coord_BN2 - 1 + valid_BN[..., None], valid_BN)
    assert placement.size == (2, 3)
    assert placement.index_BN.tolist() == [[1, 2, 3, 4, 5, 6], [0] * 6]


def test_to_map_and_back_is_the_identity():
    coord_BN2, valid_BN = coordinates(SHAPES, padding=2, order_seed=3)
    layout = ragged_layout(placement_of_coordinates(coord_BN2, valid_BN), 3)
    x_BNC = noise(len(SHAPES), 3 + valid_BN.shape[1], CHANNELS)
    back_BNC = layout.to_tokens(layout.to_map(x_BNC))
    assert torch.equal(back_BNC[:, 3:][valid_BN], x_BNC[:, 3:][valid_BN])
    assert not back_BNC[:, 3:][~valid_BN].any()
    assert not back_BNC[:, :3].any()
    assert layout.to_map(x_BNC).is_contiguous(memory_format=torch.channels_last)


def test_invalid_coordinates_raise():
    coord_BN2, valid_BN = coordinates(((2, 3),))
    twice = coord_BN2.clone()
    twice[0, 1] = twice[0, 4]
    with pytest.raises(ValueError, match="two tokens of an image have the same patch coordinates"):
        placement_of_coordinates(twice, valid_BN)
    with pytest.raises(ValueError, match=r"start at \(-1, 0\), below 0: mark padding"):
        placement_of_coordinates(coord_BN2 - torch.tensor([1, 0]), valid_BN)
    valid_BN[0, 1] = False
    assert placement_of_coordinates(twice, valid_BN).size == (2, 3)


def test_another_number_of_tokens_raises():
    layout = ragged_layout(placement_of_coordinates(*coordinates(((2, 3), (3, 1)))), 1)
    with pytest.raises(ValueError, match=r"4 image tokens \(1 prefix .* each of 2 samples, but positions for 6 in 2"):
        layout.to_map(noise(2, 5, CHANNELS))


# timm's hosts

PATCH = 4
NAFLEX = {"embed_dim": 24, "num_heads": 2, "depth": 2, "patch_size": PATCH, "num_classes": 7, "mlp_ratio": 2}
GEMMA = {
    "embed_dim": 24,
    "num_heads": 2,
    "head_dim": 12,
    "depth": 2,
    "intermediate_size": 40,
    "patch_size": PATCH,
    "position_embedding_size": 16,
}
HOSTS = {
    "naflexvit": ("naflexvit_base_patch16_map", NAFLEX | {"pos_embed_grid_size": (5, 5)}),
    "naflexvit prefix": (
        "naflexvit_base_patch16_gap",
        NAFLEX | {"class_token": True, "reg_tokens": 2, "init_values": 0.5, "pos_embed": "factorized"},
    ),
    "naflexvit rope": (
        "naflexvit_base_patch16_gap",
        NAFLEX | {"rope_type": "axial", "swiglu_mlp": True, "scale_mlp_norm": True, "pos_embed": "none"},
    ),
    "gemma4": ("gemma4_vit_167m", GEMMA | {"num_classes": 7}),
    "gemma4 encoder": ("gemma4_vit_167m_enc", GEMMA | {"global_pool": "none"}),
}
every_host = pytest.mark.parametrize("host", HOSTS)


def make(host: str, **changes: Any) -> nn.Module:
    name, kwargs = HOSTS[host]
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    torch.manual_seed(0)
    return randomized(timm.create_model(name, **kwargs | changes))


def image(height: int = 7, width: int = 3, batch: int = 2) -> torch.Tensor:
    """Images of this many patches."""
    return noise(batch, 3, PATCH * height, PATCH * width)


def patches_of(image_BCHW: torch.Tensor) -> torch.Tensor:
    """Patches (B, N, pixels), row by row, channels last, as NaFlex has them."""
    rows = image_BCHW.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # B, C, H, p, W, p
    return rows.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def naflex_batch(*images: torch.Tensor, padding: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Patches, coordinates and validity of single images (1, C, H, W) of any shapes, noise in the padding."""
    shapes = [(image.shape[2] // PATCH, image.shape[3] // PATCH) for image in images]
    coord_BN2, valid_BN = coordinates(shapes, padding=padding)
    patches = noise(*valid_BN.shape, 3 * PATCH**2)
    for sample, image_BCHW in enumerate(images):
        patches[sample, valid_BN[sample]] = patches_of(image_BCHW)[0]
    return patches, coord_BN2, valid_BN


def perturb(model: nn.Module) -> nn.Module:
    for adapter in adapters_of(model):
        nn.init.normal_(adapter.conv.weight, generator=torch.Generator().manual_seed(2))
    return model


def without_attention(site: Site) -> None:
    for module in site.block.attn.modules():
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


MIXED = tuple(image(*shape, batch=1) for shape in SHAPES)


@every_host
@pytest.mark.parametrize("inputs", [(image(),), naflex_batch(*MIXED)], ids=["images", "naflex"])
def test_function_is_kept(host, inputs):
    model = make(host)
    assert len(find_sites(model)) == 2
    check_function_is_kept(model, *inputs)
    check_gradients_reach_every_adapter(model, *inputs)
    check_every_adapter_matters(model, *inputs)


@every_host
def test_map_is_the_image(host):
    check_map_is_the_image(make(host, num_classes=0), image(), silence=without_attention)


def test_padded_images_have_a_larger_grid():
    model = localvit.localize(make("naflexvit", dynamic_img_pad=True, embed_proj_type="conv").double().eval())
    uneven = image(7, 3)[:, :, :-1, : 1 - 2 * PATCH]  # 6 patches and a rest by 1 patch and a rest
    assert [tuple(map_BEHW.shape[2:]) for map_BEHW in hidden_maps(model, uneven)] == [(7, 2), (7, 2)]


@pytest.mark.parametrize("host", ["naflexvit", "gemma4"])
def test_patches_need_not_be_square(host):
    model = localvit.localize(make(host, patch_size=(4, 6)).double().eval())
    maps = hidden_maps(model, noise(2, 3, 4 * 7, 6 * 3))
    assert [tuple(map_BEHW.shape[2:]) for map_BEHW in maps] == [(7, 3), (7, 3)]


@pytest.mark.parametrize("host", ["naflexvit", "gemma4"])
def test_images_compile_to_one_graph(host):
    model = perturb(localvit.localize(make(host).eval()))
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    with torch.no_grad():
        # The same kernels in the same order.
        torch.testing.assert_close(compiled(image().float()), model(image().float()))


@every_host
def test_placed_tokens_compute_what_single_images_compute(host):
    """The same images one by one, and in one batch as patches with coordinates."""
    model = perturb(localvit.localize(make(host).double().eval(), Adapter(kernel_size=5)))
    with torch.no_grad():
        together = output_of(model, *naflex_batch(*MIXED))
        for sample, alone in enumerate(MIXED):
            expected = output_of(model, alone)
            # timm computes positions and frequencies in float32: 1e-6.
            found = together[sample] if expected.ndim == 2 else together[sample, : expected.shape[1]]
            torch.testing.assert_close(found, expected[0], rtol=1e-5, atol=1e-5)


def test_placed_tokens_may_come_in_any_order():
    """Gemma 4 uses the coordinates only, and marks padding by -1."""
    model = perturb(localvit.localize(make("gemma4 encoder").double().eval()))
    patches, coord_BN2, valid_BN = naflex_batch(*MIXED)
    coord_BN2 = coord_BN2.masked_fill(~valid_BN[..., None], -1)
    order = torch.randperm(patches.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(patches, coord_BN2)[:, order]
        shuffled = model({"patches": patches[:, order], "patch_coord": coord_BN2[:, order]})
    # float64; attention sums in another order.
    torch.testing.assert_close(shuffled[valid_BN[:, order]], expected[valid_BN[:, order]])


def test_clamps_act_after_the_adapter():
    """What Gemma 4's projection clamps is what the adapter returns."""
    model = perturb(localvit.localize(make("gemma4").double().eval()))
    site = model.encoder.blocks[0].mlp.down_proj
    site.input_min.fill_(-0.01)
    site.input_max.fill_(0.02)
    seen = []
    site.linear.register_forward_pre_hook(lambda linear, args: seen.append(args[0]))
    with torch.no_grad():
        model(image())
    assert seen[0].min() == -0.01
    assert seen[0].max() == 0.02


@every_host
def test_copies_record_their_own_placement(host):
    model = perturb(localvit.localize(make(host).double().eval()))
    with torch.no_grad():
        expected = output_of(model, *naflex_batch(*MIXED))
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            output_of(model, image())
            assert torch.equal(output_of(copied, *naflex_batch(*MIXED)), expected)


@every_host
def test_delocalize_leaves_no_hook(host):
    model = localvit.delocalize(localvit.localize(make(host)))
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("options", [{"gate": "se"}, {"gate": "ecah"}, {"norm": "batchnorm"}], ids=str)
def test_means_over_maps_are_refused_for_placed_tokens_only(options):
    model = localize_with_options(make("naflexvit").double().eval(), options)
    output_of(model, image())
    with pytest.raises(ValueError, match="takes means over whole maps, but this batch holds images of several shapes"):
        output_of(model, *naflex_batch(*MIXED))


def test_replace_takes_images_only():
    model = localvit.localize(make("naflexvit prefix").double().eval(), Replace())
    assert torch.isfinite(output_of(model, image())).all()
    with pytest.raises(ValueError, match="the paper's module takes means over whole maps"):
        output_of(model, *naflex_batch(*MIXED))
    with pytest.raises(ValueError, match="Gemma4Block has a norm after the feed-forward"):
        localvit.localize(make("gemma4"), Replace(), inplace=True)


def test_patch_dropout_is_refused():
    with pytest.raises(ValueError, match="NaFlexVit drops patches in training"):
        localvit.localize(make("naflexvit", patch_drop_rate=0.5), inplace=True)


def test_threads_run_one_model_on_batches_of_two_kinds():
    model = perturb(localvit.localize(make("naflexvit").double().eval()))
    inputs = [(image(),), naflex_batch(*MIXED)]
    with torch.no_grad():
        expected = [output_of(model, *each) for each in inputs]

    def run(index):
        with torch.no_grad():
            return [torch.equal(output_of(model, *inputs[index]), expected[index]) for _ in range(30)]

    with ThreadPoolExecutor(2) as executor:
        assert list(executor.map(run, range(2))) == [[True] * 30] * 2


def test_gradient_checkpointing_changes_nothing():
    model = perturb(localvit.localize(make("naflexvit prefix").double()))
    patches, coord_BN2, valid_BN = naflex_batch(*MIXED)
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        x_BNC = model.forward_features(patches, coord_BN2, valid_BN)["patches"]
        (x_BNC[:, 3:][valid_BN] ** 3).sum().backward()
        gradients.append([adapter.conv.weight.grad.clone() for adapter in adapters_of(model)])
    assert all(gradient.any() for gradient in gradients[0])
    torch.testing.assert_close(gradients[0], gradients[1])
