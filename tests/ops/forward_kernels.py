"""Each kernel of inference and of the forward pass, against float64 by torch's functions.

Each case takes a source of random tensors and a dtype, launches a kernel and compares. `large` draws sizes of real
models, for a GPU.

Shapes: B batch, P prefix tokens, S rows of an image, H and W the grid, K and N channels of a 1x1 convolution, E those
of a map, Q those of a bottleneck, T tiles.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from launches import activation, close, convolution, launched, normalized, part_of_another, sums_dtype
from samples import expected_feed_forward
from torch import nn

# Ranges of batch, height and width. Tiles of a depth-wise convolution have up to 14 rows, 8 or 16 columns.
GRIDS = {
    "one position": ((1, 3), (1, 1), (1, 1)),
    "1 x N": ((2, 2), (1, 1), (2, 13)),
    "N x 1": ((2, 2), (2, 9), (1, 1)),
    "images": ((2, 3), (2, 7), (2, 7)),
    "several tiles": ((1, 1), (15, 17), (17, 19)),
}


def small_blocks():
    """So small that few values make several tiles."""
    from localvit.ops.triton.rows import Blocks

    return Blocks(rows=32, columns=32, inner=16, num_warps=4, num_stages=2)


def blocks_for(draw, large):
    """The kernel's own, or small ones."""
    return None if large else draw.one_of(None, small_blocks())


def blocks_for_little_memory(draw, large):
    """Those of GPUs with little shared memory."""
    from localvit.ops.triton.pointwise import SMALL_NARROWING

    return SMALL_NARROWING


def image_sizes(draw, positions, large):
    """Batch, height and width: images larger than a tile of rows, or smaller."""
    if positions == "few":
        return (draw.prime(150, 200), 7, 7) if large else (draw.prime(3, 5), 3, draw.prime(5, 7))
    return (draw.prime(30, 60), 14, 14) if large else (draw.prime(2, 3), draw.prime(5, 7), draw.prime(7, 11))


def channel_sizes(draw, large):
    """Channels outside and hidden ones."""
    if large:
        return draw.one_of((192, 768), (320, 1280), (97, 389))
    return draw.prime(17, 23), draw.prime(37, 43)


def drawn_weight(draw, rows, columns, dtype):
    """In memory as a convolution has it, or transposed."""
    return draw.one_of(draw.values(rows, columns, dtype=dtype), draw.values(columns, rows, dtype=dtype).t())


def map_sizes(draw, ranges, large):
    """Batch, height and width, and channels: of one block or, in small maps, of two."""
    batch, height, width = (draw.number(*ends) for ends in ranges)
    return (30 * batch if large else batch, height, width), 768 if large else draw.one_of(3, 31) if max(
        height, width
    ) > 14 else draw.one_of(3, 31, 67)


def expansion(draw, dtype, *, act, positions, large=False):
    """Tokens to a map: prefix tokens skipped, bias and activation after."""
    from localvit.ops.triton.pointwise import pointwise

    (batch, height, width), (inner, columns) = image_sizes(draw, positions, large), channel_sizes(draw, large)
    prefix, rows = draw.number(1, 3), height * width
    tokens = draw.values(batch, prefix + rows, inner, dtype=dtype)
    tokens[:, :prefix] = torch.nan
    weight, bias = drawn_weight(draw, columns, inner, dtype), draw.values(columns, dtype=dtype)
    out = launched(pointwise, tokens, weight, bias, act, skipped=prefix, blocks=blocks_for(draw, large))
    assert out.dtype == dtype
    wanted = activation(F.linear(tokens[:, prefix:].double(), weight.double(), bias.double()), act)
    close("the map", out, wanted, dtype)


def projection(draw, dtype, *, gated, positions, large=False, tiles=blocks_for):
    """A map to tokens: a gate's factors before, rows of zeros for prefix tokens."""
    from localvit.ops.triton.pointwise import pointwise

    (batch, height, width), (columns, inner) = image_sizes(draw, positions, large), channel_sizes(draw, large)
    prefix = draw.number(0, 3)
    rows = draw.map(batch, height, width, inner, dtype).flatten(1, 2)
    weight = drawn_weight(draw, columns, inner, dtype)
    bias = draw.one_of(None, draw.values(columns, dtype=dtype))
    gate = draw.values(batch, inner, dtype=draw.one_of(dtype, torch.float32)) if gated else None
    out = launched(pointwise, rows, weight, bias, None, gate, num_prefix_tokens=prefix, blocks=tiles(draw, large))
    factors = 1 if gate is None else gate.double()[:, None]
    wanted = F.linear(rows.double() * factors, weight.double(), None if bias is None else bias.double())
    assert not out[:, :prefix].any()
    close("the rows", out[:, prefix:], wanted, dtype)


def expansion_in_training(draw, dtype, *, positions, large=False):
    """The product and its statistics."""
    from localvit.ops.triton.pointwise import WIDENING, pointwise_with_statistics

    (batch, height, width), (inner, columns) = image_sizes(draw, positions, large), channel_sizes(draw, large)
    rows = draw.values(batch, height * width, inner, dtype=dtype)
    weight = draw.values(columns, inner, dtype=dtype)
    blocks = blocks_for(draw, large) or WIDENING
    out, statistics = launched(pointwise_with_statistics, rows, weight, blocks=blocks)
    assert out.dtype == dtype
    close("the map", out, F.linear(rows.double(), weight.double()), dtype)
    # Of the rounded map, which the next batch norm normalizes: tile by tile.
    tiles = out.double().flatten(0, 1).split(blocks.rows)
    counts = torch.tensor([len(tile) for tile in tiles], dtype=torch.float64, device=out.device)
    assert torch.equal(statistics.counts_T.double(), counts)
    means = torch.stack([tile.mean(0) for tile in tiles])
    close("the means", statistics.means_TN, means, torch.float32)
    squares = torch.stack([(tile - tile.mean(0)).square().sum(0) for tile in tiles])
    close("the squared deviations", statistics.squares_TN, squares, torch.float32)


def projection_in_training(draw, dtype, *, gated, positions, large=False, tiles=blocks_for):
    """Of a batch norm, an activation and a gate of the map."""
    from localvit.ops.triton.pointwise import normalized_pointwise

    (batch, height, width), (columns, inner) = image_sizes(draw, positions, large), channel_sizes(draw, large)
    rows = draw.values(batch, height * width, inner, dtype=dtype)
    weight = draw.values(columns, inner, dtype=dtype)
    norm, act = draw.norm(inner, dtype), draw.one_of("hs", "relu6")
    gate = draw.values(batch, inner, dtype=draw.one_of(dtype, torch.float32)) if gated else None
    out = launched(normalized_pointwise, rows, weight, norm, act, gate, blocks=tiles(draw, large))
    assert out.dtype == dtype
    factors = 1 if gate is None else gate.double()[:, None]
    wanted = F.linear(activation(normalized(rows, norm), act) * factors, weight.double())
    close("the map", out, wanted, dtype)


def depthwise_act_pool(draw, dtype, *, act, ranges, large=False):
    from localvit.ops.triton.inference import depthwise_act_pool

    (batch, height, width), channels = map_sizes(draw, ranges, large)
    x = draw.map(batch, height, width, channels, dtype)
    weight = draw.values(*draw.one_of((channels, 3, 3), (channels, 1, 3, 3)), dtype=dtype)
    bias = draw.values(channels, dtype=dtype)
    y, total = launched(depthwise_act_pool, x, weight, bias, act)
    assert (y.dtype, total.dtype) == (dtype, sums_dtype(dtype))
    wanted = activation(convolution(x.double(), weight.double(), bias.double()), act)
    close("the map", y, wanted, dtype)
    close("the sums", total, wanted.sum((1, 2)), total.dtype)


def squeeze_excite(draw, dtype, *, bottleneck, large=False):
    from localvit.ops.triton.squeeze_excite import squeeze_excite

    batch, channels = (draw.prime(100, 200), 1536) if large else (3, draw.prime(300, 400))
    sums = 300 * draw.values(batch, 2, channels, dtype=torch.float32)[:, 1]
    shapes = (bottleneck, channels), (bottleneck,), (channels, bottleneck), (channels,)
    layers = [draw.values(*shape, dtype=dtype) / shape[-1] ** 0.5 for shape in shapes]
    layers[0::2] = [draw.one_of(weight, weight.t().contiguous().t()) for weight in layers[0::2]]
    gate = launched(squeeze_excite, sums, 35, *layers)
    assert gate.dtype == dtype
    narrow_weight, narrow_bias, weight, bias = (each.double() for each in layers)
    squeezed = F.relu(F.linear(sums.double() / 35, narrow_weight, narrow_bias))
    close("the factors", gate, F.hardsigmoid(F.linear(squeezed, weight, bias)), dtype)


def whole_module(draw, dtype, *, acts, gate, large=False):
    """The kernels of a fused module, one after another: prefix tokens are not read, and stay zero."""
    from localvit.ops.triton.feed_forward import feed_forward

    (batch, height, width), (channels, hidden) = image_sizes(draw, "few", large), channel_sizes(draw, large)
    prefix, bottleneck = draw.number(0, 2), draw.one_of(5, 71)
    shapes = [(hidden, channels, 1, 1), (hidden,), (hidden, 1, 3, 3), (hidden,), (channels, hidden, 1, 1), (channels,)]
    if gate == "se":
        shapes += [(bottleneck, hidden), (bottleneck,), (hidden, bottleneck), (hidden,)]
    elif gate is not None:
        shapes.append((1, 1, 3))
    # As a trained module has them: each step keeps the size of values about as it is.
    parameters = [draw.values(*shape, dtype=dtype) / max(1, math.prod(shape[1:])) ** 0.5 for shape in shapes]
    parameters[1::2] = map(part_of_another, parameters[1::2])
    tokens = draw.values(batch, prefix + height * width, channels, dtype=dtype)
    wanted = expected_feed_forward(tokens, height, width, prefix, parameters, *acts, gate)
    tokens[:, :prefix] = torch.nan
    out = launched(feed_forward, tokens, height, width, prefix, parameters, *acts, gate)
    assert out.dtype == dtype
    assert not out[:, :prefix].any()
    close("the tokens", out, wanted, dtype)


def norm_vectors(draw, dtype, *, offset, large=False):
    """From tiles of unequal sizes; the running statistics against torch's batch norm."""
    from localvit.ops.batch_norms import Running
    from localvit.ops.triton.batch_norm import norm_vectors
    from localvit.ops.triton.rows import Statistics

    tiles, channels = (draw.prime(1000, 1100), 768) if large else (draw.prime(130, 140), draw.prime(17, 23))
    counts = torch.randint(1, 6, (tiles,), generator=draw.generator).tolist()
    values = offset + draw.values(sum(counts), channels)
    parts = values.split(counts)
    means = torch.stack([part.mean(0) for part in parts])
    squares = torch.stack([(part - part.mean(0)).square().sum(0) for part in parts])
    norm = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.3, device=draw.device, dtype=torch.float64)
    for vector in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        vector.data = draw.values(channels, dtype=dtype).double()
    given = [vector.detach().to(dtype) for vector in (norm.weight, norm.bias)]
    running = Running(norm.running_mean.to(dtype), norm.running_var.to(dtype), norm.num_batches_tracked.clone() + 6)
    statistics = Statistics(torch.tensor(counts, device=draw.device).float(), means.float(), squares.float())
    found = launched(norm_vectors, statistics, *given, running, 0.3, 1e-3)
    normalized_values = norm(values.t()[None, :, :, None])[0, :, :, 0].t()

    variance, mean = torch.var_mean(values, 0, correction=0)
    inverse_deviation = (variance + 1e-3).rsqrt()
    scale = norm.weight * inverse_deviation
    wanted = torch.stack([mean, inverse_deviation, scale, norm.bias - mean * scale])
    for name, one, other in zip(("mean", "inverse deviation", "scale", "shift"), found, wanted, strict=True):
        # float32 rounds tiles' means near the offset by up to 2 ** -13 of a standard deviation.
        close(name, one, other, torch.bfloat16 if offset and name != "mean" else torch.float32)
    if not offset:
        close("the normalized values", values * found[2] + found[3], normalized_values, torch.float32)
    close("the running mean", running.mean_C, norm.running_mean, dtype)
    close("the running variance", running.variance_C, norm.running_var, torch.bfloat16 if offset else dtype)
    assert running.num_batches_tracked.item() == 7
    again = launched(norm_vectors, statistics, *given, None, 0.3, 1e-3)
    assert torch.equal(again, found)


def channel_means(draw, dtype, *, act, positions, large=False):
    from localvit.ops.triton.batch_norm import channel_means

    batch, height, width = image_sizes(draw, positions, large)
    channels = 768 if large else draw.prime(130, 140)
    z, norm = draw.values(batch, height, width, channels, dtype=dtype), draw.norm(channels, dtype)
    found = launched(channel_means, z, norm, act)
    close("the means", found, activation(normalized(z, norm), act).mean((1, 2)), torch.float32)


def norm_act_depthwise(draw, dtype, *, act, ranges, large=False):
    from localvit.ops.triton.training import norm_act_depthwise

    (batch, height, width), channels = map_sizes(draw, ranges, large)
    z = draw.map(batch, height, width, channels, dtype)
    norm = draw.norm(channels, dtype)
    weight = draw.values(*draw.one_of((channels, 3, 3), (channels, 1, 3, 3)), dtype=dtype)
    out, statistics = launched(norm_act_depthwise, z, norm, weight, act)
    assert out.dtype == dtype
    wanted = convolution(activation(normalized(z, norm), act), weight.double())
    close("the map", out, wanted, dtype)
    check_statistics(statistics, wanted, sums_dtype(dtype))


def check_statistics(statistics, map_BHWE, dtype):
    """Those of all tiles together, by Chan's formula in float64."""
    counts, means, squares = (each.double() for each in statistics)
    variance, mean = torch.var_mean(map_BHWE.double(), (0, 1, 2), correction=0)
    count = map_BHWE[..., 0].numel()
    assert counts.sum().item() == count
    found = (counts[:, None] * means).sum(0) / count
    close("the mean", found, mean, dtype)
    close("the variance", (squares + counts[:, None] * (means - found).square()).sum(0) / count, variance, dtype)


def far_mean(draw, dtype, large=False):
    """The variance where the mean is thousands of standard deviations away, which squares in float32 do not survive."""
    from localvit.ops.triton.training import norm_act_depthwise

    z = 4000 + draw.values(2, 15, 9, 5, dtype=torch.float32)
    norm = torch.tensor([0.0, 1, 1, 0], device=draw.device)[:, None].expand(4, 5).contiguous()
    weight = torch.zeros(5, 3, 3, device=draw.device)
    weight[:, 1, 1] = 1
    _, statistics = norm_act_depthwise(z, norm, weight, "hs")
    counts, means, squares = (each.double() for each in statistics)
    variance, mean = torch.var_mean(z.double(), (0, 1, 2), correction=0)
    found = (counts[:, None] * means).sum(0) / counts.sum()
    # float32 rounds means near 4000 by up to 2 ** -13 of a standard deviation; differences of neighbors are exact.
    torch.testing.assert_close(found, mean, rtol=1e-6, atol=0)
    spread = (squares + counts[:, None] * (means - found).square()).sum(0) / counts.sum()
    torch.testing.assert_close(spread, variance, rtol=1e-3, atol=0)


def not_a_number(draw, dtype, *, kernel, act, large=False):
    """One NaN reaches its neighbors and its channel's sums, nothing else, and is not clamped away."""
    from localvit.ops.triton.inference import depthwise_act_pool
    from localvit.ops.triton.training import norm_act_depthwise

    x, weight, bias = draw.values(1, 4, 6, 3), draw.values(3, 3, 3).float(), draw.values(3).float()
    x = x.float()
    x[0, 1, 2, 1] = torch.nan
    if kernel == "depthwise_act_pool":
        out, total = depthwise_act_pool(x, weight, bias, act)
    else:
        out, (_, total, _) = norm_act_depthwise(x, draw.norm(3, torch.float32), weight, act)
    wanted = torch.zeros(1, 4, 6, 3, dtype=torch.bool, device=draw.device)
    wanted[0, 0:3, 1:4, 1] = True
    assert torch.equal(out.isnan(), wanted)
    assert total.flatten().isnan().tolist() == [False, True, False]


CASES = {
    "expansion, few positions": partial(expansion, act="hs", positions="few"),
    "expansion, many positions": partial(expansion, act="relu6", positions="many"),
    "expansion without activation": partial(expansion, act=None, positions="few"),
    "projection, few positions": partial(projection, gated=True, positions="few"),
    "projection, many positions": partial(projection, gated=True, positions="many"),
    "projection without gate": partial(projection, gated=False, positions="few"),
    "expansion in training": partial(expansion_in_training, positions="few"),
    "projection in training, few positions": partial(projection_in_training, gated=True, positions="few"),
    "projection in training, many positions": partial(projection_in_training, gated=True, positions="many"),
    "projection in training without gate": partial(projection_in_training, gated=False, positions="few"),
    "projection in little memory": partial(projection, gated=True, positions="few", tiles=blocks_for_little_memory),
    "projection in training in little memory": partial(
        projection_in_training, gated=True, positions="few", tiles=blocks_for_little_memory
    ),
    "squeeze_excite, narrow": partial(squeeze_excite, bottleneck=1),
    "squeeze_excite, wide": partial(squeeze_excite, bottleneck=37),
    "module, se": partial(whole_module, acts=("hs", "hs"), gate="se"),
    "module, eca": partial(whole_module, acts=("hs", "relu6"), gate="eca"),
    "module, ecah": partial(whole_module, acts=("relu6", "hs"), gate="ecah"),
    "module without gate": partial(whole_module, acts=("relu6", "relu6"), gate=None),
    "norm_vectors": partial(norm_vectors, offset=0),
    "norm_vectors, means far from zero": partial(norm_vectors, offset=4000),
    "channel_means, hs": partial(channel_means, act="hs", positions="few"),
    "channel_means, relu6": partial(channel_means, act="relu6", positions="many"),
}
DEPTHWISE = {
    f"{kernel.__name__}, {name}": partial(kernel, act=("hs", "relu6")[number % 2], ranges=ranges)
    for kernel in (depthwise_act_pool, norm_act_depthwise)
    for number, (name, ranges) in enumerate(GRIDS.items())
} | {"norm_act_depthwise, mean far from zero": far_mean}
"""Cases that the interpreter computes in float64 as well."""
NOT_A_NUMBER = {
    f"{kernel}, {act}, a NaN": partial(not_a_number, kernel=kernel, act=act)
    for kernel in ("depthwise_act_pool", "norm_act_depthwise")
    for act in ("hs", "relu6")
}
