"""Tokens and map are two views of the same numbers, and `LocalityMlp` works on tokens."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from localvit import LocalityFeedForward
from localvit.surgery.replace import Replace
from localvit.tokens.grid import Grid
from localvit.tokens.layouts import TokenSequence, map_to_tokens, tokens_to_map
from localvit.tokens.mlp import LocalityMlp
from localvit.tokens.sources import InputMap, OutputMap, enclose_calls

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
"""float64 sums of at most some hundred terms of order one."""


def tokens(batch, count, channels, seed=0):
    return torch.randn(batch, count, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slot(channels=5, grid_size=(7, 11), num_prefix_tokens=0, **kwargs):
    torch.manual_seed(3)
    return (
        LocalityMlp(channels, TokenSequence(Grid(grid_size), num_prefix_tokens), reduction=2, **kwargs).double().eval()
    )


@pytest.mark.parametrize("num_prefix_tokens", [0, 1, 2])
def test_token_of_row_and_column_is_the_maps_pixel(num_prefix_tokens):
    x_BNC = tokens(2, num_prefix_tokens + 7 * 11, 5)
    map_BCHW = tokens_to_map(x_BNC, (7, 11), num_prefix_tokens)
    assert map_BCHW.shape == (2, 5, 7, 11)
    for row, column in ((0, 0), (0, 10), (6, 0), (3, 4)):
        assert torch.equal(map_BCHW[:, :, row, column], x_BNC[:, num_prefix_tokens + row * 11 + column])


def test_views_share_their_storage():
    x_BNC = tokens(2, 1 + 7 * 11, 5)
    map_BCHW = tokens_to_map(x_BNC, (7, 11), 1)
    assert map_BCHW.untyped_storage().data_ptr() == x_BNC.untyped_storage().data_ptr()
    assert map_BCHW.data_ptr() == x_BNC[:, 1:].data_ptr()
    whole = tokens_to_map(x_BNC[:, 1:].contiguous(), (7, 11))
    assert whole.is_contiguous(memory_format=torch.channels_last)
    back = map_to_tokens(whole)
    assert back.data_ptr() == whole.data_ptr()
    assert back.is_contiguous()


@pytest.mark.parametrize("grid_size", [(7, 11), (1, 77), (77, 1)])
def test_to_map_and_back_is_the_identity(grid_size):
    x_BNC = tokens(2, 77, 5)
    assert torch.equal(map_to_tokens(tokens_to_map(x_BNC, grid_size)), x_BNC)


@pytest.mark.parametrize(
    ("count", "grid_size", "num_prefix_tokens", "numbers"),
    [
        (78, (7, 11), 0, ("78 image", "grid of 77")),
        (77, (7, 11), 1, ("76 image", "1 prefix", "grid of 77")),
        (197, (14, 14), 0, ("197 image", "14 x 14 grid of 196")),
        (1, (7, 11), 2, ("-1 image", "grid of 77")),
        (0, (1, 1), 0, ("0 image", "grid of 1")),
    ],
)
def test_tokens_that_do_not_fill_the_grid_raise_with_both_numbers(count, grid_size, num_prefix_tokens, numbers):
    with pytest.raises(ValueError, match=".*".join(numbers)):
        tokens_to_map(tokens(2, count, 5), grid_size, num_prefix_tokens)


@pytest.mark.parametrize("num_prefix_tokens", [0, 1, 2])
def test_slot_is_the_module_without_its_input_and_zero_for_prefix_tokens(num_prefix_tokens):
    mlp = slot(num_prefix_tokens=num_prefix_tokens)
    module = LocalityFeedForward(5, 5, reduction=2).double().eval()
    module.load_state_dict(mlp.state_dict(), strict=True)
    x_BNC = tokens(2, num_prefix_tokens + 77, 5)
    change = mlp(x_BNC)
    assert change.shape == x_BNC.shape
    assert not change[:, :num_prefix_tokens].any()
    map_BCHW = x_BNC[:, num_prefix_tokens:].reshape(2, 7, 11, 5).permute(0, 3, 1, 2).contiguous()
    expected = module(map_BCHW).permute(0, 2, 3, 1).reshape(2, 77, 5)
    torch.testing.assert_close((x_BNC + change)[:, num_prefix_tokens:], expected, **CLOSE)


def test_slot_computes_on_channels_last_maps():
    mlp = slot(num_prefix_tokens=1)
    seen = []
    for layer in mlp.conv:
        layer.register_forward_hook(lambda layer, args, output: seen.append((args[0], output)))
    x_BNC = tokens(2, 78, 5)
    mlp(x_BNC)
    assert seen[0][0].data_ptr() == x_BNC[:, 1:].data_ptr()
    assert all(output.is_contiguous(memory_format=torch.channels_last) for _, output in seen)


def test_slot_needs_a_grid():
    with pytest.raises(ValueError, match=r"no patch grid is recorded for 77 image tokens \(1 prefix"):
        slot(grid_size=None, num_prefix_tokens=1)(tokens(2, 78, 5))


def test_slot_depends_on_the_shape_of_the_grid():
    mlp = slot(grid_size=(7, 11))
    x_BNC = tokens(2, 77, 5)
    wide = mlp(x_BNC)
    mlp.layout.grid = Grid((11, 7))
    assert not torch.allclose(mlp(x_BNC), wide)


class Host(nn.Module):
    """A patch embedding and a slot, as a transformer would have them."""

    def __init__(self):
        super().__init__()
        grid = Grid()
        self.embed = nn.Identity()
        OutputMap(self.embed, height_dim=1).connect(grid)
        enclose_calls(self, grid)
        self.mlp = LocalityMlp(5, TokenSequence(grid), reduction=2)

    def forward(self, x_BHWC):
        return self.mlp(self.embed(x_BHWC).flatten(1, 2))


@pytest.mark.parametrize("source", [partial(OutputMap, height_dim=1), InputMap])
def test_sources_record_the_grid(source):
    grid, host = Grid(), nn.Identity()
    source(host).connect(grid)
    for height, width in ((7, 11), (11, 7), (3, 13)):
        host(torch.zeros(2, height, width, 5))
        assert grid.size == (height, width)
    assert not list(grid.parameters())
    assert not grid.state_dict()


def test_copies_have_a_grid_of_their_own():
    host = Host().eval()
    tall, wide = torch.randn(2, 7, 3, 5), torch.randn(2, 3, 7, 5)
    expected = host(tall)
    for twin in (copy.deepcopy(host), pickle.loads(pickle.dumps(host))):
        assert twin.mlp.layout.grid is not host.mlp.layout.grid
        host(wide)
        torch.testing.assert_close(twin(tall), expected)


def test_compiled_hosts_record_the_grid():
    torch._dynamo.reset()
    host = Host().double().eval()
    compiled = torch.compile(host, fullgraph=True, backend="aot_eager", dynamic=False)
    for height, width in ((7, 11), (11, 7), (7, 11)):
        x_BHWC = tokens(2, height * width, 5).unflatten(1, (height, width))
        torch.testing.assert_close(compiled(x_BHWC), host(x_BHWC), **CLOSE)


def test_exported_hosts_compute_the_same():
    host = Host().double().eval()
    x_BHWC = tokens(2, 77, 5).unflatten(1, (7, 11))
    program = torch.export.export(host, (x_BHWC,), strict=False)
    torch.testing.assert_close(program.module()(x_BHWC), host(x_BHWC), **CLOSE)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_slot_in_lower_precision(dtype, tolerance):
    # As the module's: 2^-24 and 2^-9 of the output's size, times some ten operations.
    mlp = slot(num_prefix_tokens=1)
    x_BNC = tokens(2, 78, 5)
    expected = mlp(x_BNC)
    out = copy.deepcopy(mlp).to(dtype)(x_BNC.to(dtype))
    assert out.dtype == dtype
    assert (out.double() - expected).norm() <= tolerance * expected.norm()


def test_replace_passes_every_option_on():
    grid = Grid()
    mlp = Replace(act="hs+se", reduction=3, expand_ratio=2.0, depthwise_first=True).feed_forward(
        6, TokenSequence(grid, 2), device="meta"
    )
    assert mlp.layout.grid is grid
    assert mlp.layout.num_prefix_tokens == 2
    assert mlp.conv[0].weight.shape == (6, 1, 3, 3)
    assert mlp.conv[3].weight.shape == (12, 6, 1, 1)
    assert mlp.conv[6].fc[0].weight.shape == (4, 12)
    assert mlp.conv[0].weight.device.type == "meta"
    without = Replace(act="relu6", depthwise=False).feed_forward(6, TokenSequence(grid))
    assert len(without.conv) == 5
