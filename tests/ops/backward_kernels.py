"""Each kernel of the backward pass, against float64 by torch's autograd.

Shapes: B batch, H and W the grid, C channels outside, E hidden channels, T tiles, G groups of images.
"""

from functools import partial

import torch
import torch.nn.functional as F
from forward_kernels import GRIDS, channel_sizes, image_sizes, map_sizes, small_blocks
from launches import activation, close, convolution, launched, normalized, off_the_kinks, sums_dtype


def norm_gradients(draw, dtype, large=False):
    """A batch norm's backward pass: from sums over tiles to the slopes that give the gradient of each value."""
    from localvit.ops.triton.batch_norm import norm_gradients

    tiles, channels = (draw.prime(1000, 1100), 768) if large else (draw.prime(130, 140), draw.prime(17, 23))
    values, grad = (draw.values(3 * tiles, channels).requires_grad_() for _ in range(2))
    weight, bias = (draw.values(channels).requires_grad_() for _ in range(2))
    out = F.batch_norm(values, None, None, weight, bias, training=True, eps=1e-3)
    wanted = torch.autograd.grad(out, (values, weight, bias), grad)

    values, grad = values.detach(), grad.detach()
    variance, mean = torch.var_mean(values, 0, correction=0)
    inverse_deviation = (variance + 1e-3).rsqrt()
    scale = weight.detach() * inverse_deviation
    norm = torch.stack([mean, inverse_deviation, scale, bias.detach() - mean * scale]).float()
    sums = torch.stack([grad.view(tiles, 3, -1).sum(1), (grad * (values - mean)).view(tiles, 3, -1).sum(1)], 1).float()
    found = launched(norm_gradients, sums, norm, 3 * tiles)
    by_grad, by_value, constant = found.slopes_3E.double()
    close("the gradient", by_grad * grad + by_value * (values - mean) + constant, wanted[0], torch.float32)
    close("the weight's gradient", found.weight_E, wanted[1], torch.float32)
    close("the bias's gradient", found.bias_E, wanted[2], torch.float32)


def norm_act_depthwise_backward(draw, dtype, *, act, ranges, large=False):
    from localvit.ops.triton.training_backward import norm_act_depthwise_backward

    size, channels = map_sizes(draw, ranges, large)
    size = (*size, channels)
    z, norm = draw.map(*size, dtype), draw.norm(channels, dtype)
    off_the_kinks(z, norm)
    grad, out, out_norm = draw.values(*size, dtype=dtype), draw.values(*size, dtype=dtype), draw.norm(channels, dtype)
    slopes = draw.values(3, channels, dtype=norm.dtype)
    weight = draw.values(*draw.one_of((channels, 3, 3), (channels, 1, 3, 3)), dtype=dtype)
    found = launched(norm_act_depthwise_backward, grad, out, out_norm, slopes, z, norm, weight, act)

    grad_out = through_norm(grad, out, out_norm, slopes)
    u, weight = normalized(z, norm).requires_grad_(), weight.double().requires_grad_()
    grad_u, grad_weight = torch.autograd.grad(convolution(activation(u, act), weight), (u, weight), grad_out)
    assert [each.dtype for each in found] == [dtype, *[sums_dtype(dtype)] * 2]
    close("the gradient", found[0], grad_u, dtype)
    close("the weight's gradient", found[1], grad_weight.view(-1, 3, 3), sums_dtype(dtype))
    sums = torch.stack([grad_u, grad_u * (z.double() - norm[0].double())]).sum((1, 2, 3))
    close("the sums", found[2].double().sum(0), sums, sums_dtype(dtype))


def through_norm(grad, value, norm, slopes):
    by_grad, by_value, constant = slopes.double()
    return by_grad * grad.double() + by_value * (value.double() - norm[0].double()) + constant


def drawn_projection(draw, dtype, gated, positions, large):
    """What the two kernels of the projection's backward pass take."""
    (batch, height, width), (channels, hidden) = image_sizes(draw, positions, large), channel_sizes(draw, large)
    norm = draw.norm(hidden, dtype)
    z = off_the_kinks(draw.values(batch, height, width, hidden, dtype=dtype), norm)
    grad_out = draw.values(batch, height, width, channels, dtype=dtype)
    weight = draw.values(channels, hidden, dtype=dtype)
    gate_dtype = draw.one_of(dtype, torch.float32)
    gate, grad_mean = (draw.values(batch, hidden, dtype=gate_dtype) if gated else None for _ in range(2))
    return grad_out, z, norm, weight, draw.one_of("hs", "relu6"), gate, grad_mean


def projection_gradients(draw, dtype, *, gated, positions, large=False):
    from localvit.ops.triton.pointwise_backward import projection_gradients

    grad_out, z, norm, weight, act, gate, _ = drawn_projection(draw, dtype, gated, positions, large)
    options = {} if large else {"group_images": 2} | draw.one_of({}, {"blocks": small_blocks()._replace(rows=16)})
    grad_weight, grad_gate = launched(projection_gradients, grad_out, z, norm, weight, act, gate, **options)
    assert (grad_gate is None) == (not gated)
    double_weight = weight.double().requires_grad_()
    factors = (torch.ones_like(z[:, 0, 0]) if gate is None else gate).double().requires_grad_()
    out = F.linear(activation(normalized(z, norm), act) * factors[:, None, None], double_weight)
    wanted_weight, wanted_gate = torch.autograd.grad(out, (double_weight, factors), grad_out.double())
    close("the weight's gradient", grad_weight, wanted_weight, dtype)
    if gated:
        close("the gate's gradient", grad_gate.sum(0), wanted_gate, dtype)


def squeeze_excite_backward(draw, dtype, *, bottleneck, large=False):
    """Against the layers' own gradients in float64, beside theirs in float32; on both sides of every kink."""
    from localvit.ops.triton.squeeze_excite import squeeze_excite_backward

    batch, channels, summands = (draw.prime(100, 200), 1536, 3) if large else (5, draw.prime(300, 400), 2)
    means = 2 * draw.values(batch, channels, dtype=torch.float32)
    shapes = (bottleneck, channels), (bottleneck,), (channels, bottleneck), (channels,)
    layers = [draw.values(*shape, dtype=dtype) / shape[-1] ** 0.5 for shape in shapes]
    layers[1][0] = 0.0
    layers[3][: channels // 3], layers[3][-(channels // 3) :] = -5.0, 5.0
    layers[0::2] = [draw.one_of(weight, weight.t().contiguous().t()) for weight in layers[0::2]]
    grad_gate = draw.values(summands, batch, channels, dtype=torch.float32)
    found = launched(squeeze_excite_backward, grad_gate, means, *layers)

    squeezed, excited, exact = _gate_gradients(means, layers, grad_gate, torch.float64)
    assert (squeezed < 0).any()
    assert (squeezed > 0).any()
    assert (excited < -3).any()
    assert (excited > 3).any()
    _, _, by_layers = _gate_gradients(means, layers, grad_gate, torch.float32)
    names = "the means", "the first weight", "the first bias", "the second weight", "the second bias"
    for name, each, other, wanted in zip(names, found, by_layers, exact, strict=True):
        error, allowed = ((value.double() - wanted).norm() for value in (each, other))
        # The layers add in another order: four times their error, and a few roundings of what is added up.
        room = 4 * allowed + 8 * torch.finfo(torch.float32).eps * grad_gate.double().sum(0).norm()
        assert error <= room, f"the gradient of {name} is off by {float(error)}, allowed are {float(room)}"


def _gate_gradients(means, layers, grad_gate, dtype):
    """Both layers' outputs, and the gradients of the means and of the layers' parameters, by autograd."""
    read, *parameters = (each.to(dtype).requires_grad_() for each in (means, *layers))
    squeezed = F.linear(read, *parameters[:2])
    excited = F.linear(F.relu(squeezed), *parameters[2:])
    return (
        squeezed,
        excited,
        torch.autograd.grad(F.hardsigmoid(excited), (read, *parameters), grad_gate.to(dtype).sum(0)),
    )


def normalized_gradient(draw, dtype, *, gated, positions, large=False):
    from localvit.ops.triton.pointwise_backward import NORMALIZED_BLOCKS, normalized_gradient

    grad_out, z, norm, weight, act, gate, grad_mean = drawn_projection(draw, dtype, gated, positions, large)
    blocks = NORMALIZED_BLOCKS if large else draw.one_of(NORMALIZED_BLOCKS, small_blocks())
    found, sums = launched(normalized_gradient, grad_out, z, norm, weight, act, gate, grad_mean, blocks)
    u = normalized(z, norm).requires_grad_()
    activated = activation(u, act)
    out = F.linear(activated if gate is None else activated * gate.double()[:, None, None], weight.double())
    total = (out * grad_out.double()).sum()
    if gate is not None:
        total = total + (activated.mean((1, 2)) * grad_mean.double()).sum()
    (wanted,) = torch.autograd.grad(total, u)
    assert found.dtype == dtype
    close("the gradient", found, wanted, dtype)
    # Of the rounded gradient, which the next kernel reads: tile by tile.
    pair = torch.stack([found.double(), found.double() * (z.double() - norm[0].double())])
    tiles = pair.flatten(1, 3).split(blocks.rows, dim=1)
    close("the sums", sums, torch.stack([tile.sum(1) for tile in tiles]), torch.float32)


def expansion_gradients(draw, dtype, *, autocast, large=False):
    from localvit.ops.triton.pointwise_backward import EXPANSION_BLOCKS, expansion_gradients

    size, (channels, hidden) = image_sizes(draw, "few", large), channel_sizes(draw, large)
    grad, z = (draw.values(*size, hidden, dtype=dtype) for _ in range(2))
    norm, slopes = draw.norm(hidden, dtype), draw.values(3, hidden, dtype=torch.float32)
    weight = draw.values(hidden, channels, dtype=dtype)
    blocks = EXPANSION_BLOCKS if large else small_blocks()._replace(columns=16)
    outside = torch.float32 if autocast else dtype
    grad_x, grad_z = launched(expansion_gradients, grad, z, norm, slopes, weight, outside, blocks)
    wanted = through_norm(grad, z, norm, slopes)
    assert (grad_x.dtype, grad_z.dtype) == (outside, dtype)
    close("the map's gradient", grad_z, wanted, dtype)
    close("the input's gradient", grad_x, wanted @ weight.double(), dtype)


CASES = {
    "norm_gradients": norm_gradients,
    "projection_gradients, few positions": partial(projection_gradients, gated=True, positions="few"),
    "projection_gradients, many positions": partial(projection_gradients, gated=True, positions="many"),
    "squeeze_excite_backward, narrow": partial(squeeze_excite_backward, bottleneck=2),
    "squeeze_excite_backward, wide": partial(squeeze_excite_backward, bottleneck=37),
    "projection_gradients without gate": partial(projection_gradients, gated=False, positions="few"),
    "normalized_gradient, few positions": partial(normalized_gradient, gated=True, positions="few"),
    "normalized_gradient, many positions": partial(normalized_gradient, gated=True, positions="many"),
    "normalized_gradient without gate": partial(normalized_gradient, gated=False, positions="few"),
    "expansion_gradients": partial(expansion_gradients, autocast=False),
    "expansion_gradients under autocast": partial(expansion_gradients, autocast=True),
}
DEPTHWISE = {
    f"norm_act_depthwise_backward, {name}": partial(
        norm_act_depthwise_backward, act=("hs", "relu6")[number % 2], ranges=ranges
    )
    for number, (name, ranges) in enumerate(GRIDS.items())
}
"""Cases that the interpreter computes in float64 as well."""
