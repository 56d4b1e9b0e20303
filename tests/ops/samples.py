"""Arguments of each function of `localvit.ops.reference`, and its result in float64 by torch's functions.

Shapes: B batch, H and W the grid, E channels, K and N channels of a 1x1 convolution, Q those of a bottleneck.
"""

import torch
from launches import activation, convolution

from localvit.ops.activations import ACTIVATIONS


def depthwise_act_pool(draw, dtype, act, size=(2, 3, 5, 4)):
    channels = size[-1]
    shape = draw.one_of((channels, 3, 3), (channels, 1, 3, 3))
    return draw.map(*size, dtype), draw.values(*shape, dtype=dtype), draw.values(channels, dtype=dtype), act


def pointwise(draw, dtype, act, gated, bias, prefix=2):
    batch, positions, inner, columns = 3, 5, 4, 7
    rows = draw.values(batch, prefix + positions, inner, dtype=dtype)
    weight = draw.values(columns, inner, dtype=dtype)
    bias = draw.values(columns, dtype=dtype) if bias else None
    gate = draw.values(batch, inner, dtype=dtype) if gated else None
    return rows, weight, bias, act, gate, *((0, prefix) if gated else (prefix, 0))


def squeeze_excite(draw, dtype):
    channels, bottleneck = 6, 5
    shapes = (bottleneck, channels), (bottleneck,), (channels, bottleneck), (channels,)
    sums = 30 * draw.values(3, channels, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return sums, 35, *(draw.values(*shape, dtype=dtype) for shape in shapes)


def channel_attention(draw, dtype):
    sums = 30 * draw.values(3, 7, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return sums, 35, draw.values(1, 1, 3, dtype=dtype)


def feed_forward(draw, dtype, act1, act2, gate, prefix):
    batch, height, width, channels, hidden, outside, bottleneck = 2, 3, 5, 4, 7, 6, 3
    shapes = [(hidden, channels, 1, 1), (hidden,), (hidden, 1, 3, 3), (hidden,), (outside, hidden, 1, 1), (outside,)]
    if gate is not None:
        shapes += (
            [(bottleneck, hidden), (bottleneck,), (hidden, bottleneck), (hidden,)] if gate == "se" else [(1, 1, 3)]
        )
    tokens = draw.values(batch, prefix + height * width, channels, dtype=dtype)
    return tokens, height, width, prefix, [draw.values(*shape, dtype=dtype) for shape in shapes], act1, act2, gate


SAMPLES = {f"depthwise_act_pool {act}": ("depthwise_act_pool", depthwise_act_pool, (act,)) for act in ACTIVATIONS} | {
    "pointwise expansion": ("pointwise", pointwise, ("hs", False, True)),
    "pointwise relu6": ("pointwise", pointwise, ("relu6", False, True)),
    "pointwise projection": ("pointwise", pointwise, (None, True, True)),
    "pointwise alone": ("pointwise", pointwise, (None, False, False)),
    "squeeze_excite": ("squeeze_excite", squeeze_excite, ()),
}
OPERATOR_SAMPLES = {
    f"{act1}, {act2}, {gate}": ("feed_forward", feed_forward, (act1, act2, gate, prefix))
    for act1, act2, gate, prefix in (
        *(("hs", "hs", "se", 2), ("relu6", "relu6", None, 0), ("hs", "relu6", "eca", 1), ("relu6", "hs", "ecah", 0)),
    )
}
"""Of the registered operator."""


def sample(name, draw, dtype=torch.float64):
    """An operator's name and its arguments."""
    operator, form, options = (SAMPLES | OPERATOR_SAMPLES)[name]
    return operator, form(draw, dtype, *options)


def expected(operator, given):
    """What the function's docstring says, as a tuple."""
    if operator == "feed_forward":
        return (expected_feed_forward(*given),)
    given = [each.double() if isinstance(each, torch.Tensor) else each for each in given]
    if operator == "depthwise_act_pool":
        x, weight, bias, act = given
        y = activation(convolution(x, weight, bias), act)
        return y, y.sum((1, 2))
    if operator == "squeeze_excite":
        sums, positions, narrow_weight, narrow_bias, weight, bias = given
        squeezed = (sums / positions @ narrow_weight.t() + narrow_bias).relu()
        return (((squeezed @ weight.t() + bias) / 6 + 0.5).clamp(0, 1),)
    rows, weight, bias, act, gate, skipped, prefix = given
    rows = rows[:, skipped:] * (1 if gate is None else gate[:, None])
    out = activation(torch.einsum("bsk,nk->bsn", rows, weight) + (0 if bias is None else bias), act)
    return (torch.cat([torch.zeros_like(out[:, :1]).expand(-1, prefix, -1), out], 1),)


def expected_feed_forward(tokens, height, width, prefix, parameters, act1, act2, gate):
    """Step by step, on the tokens after the prefix tokens."""
    expansion, bias1, depthwise, bias2, projection, bias3, *gate_parameters = (each.double() for each in parameters)
    rows = tokens.double()[:, prefix:]
    hidden = activation(torch.einsum("bsk,nk->bsn", rows, expansion.flatten(1)) + bias1, act1)
    hidden = activation(convolution(hidden.unflatten(1, (height, width)), depthwise, bias2), act2).flatten(1, 2)
    sums = hidden.sum(1)
    if gate == "se":
        (factors,) = expected("squeeze_excite", (sums, height * width, *gate_parameters))
    elif gate is not None:
        mixed = torch.nn.functional.conv1d(sums[:, None] / (height * width), *gate_parameters, padding=1)[:, 0]
        factors = 1 / (1 + (-mixed).exp()) if gate == "eca" else (mixed / 6 + 0.5).clamp(0, 1)
    else:
        factors = torch.ones_like(sums)
    out = torch.einsum("bsk,nk->bsn", hidden * factors[:, None], projection.flatten(1)) + bias3
    return torch.cat([out.new_zeros(len(out), prefix, out.shape[2]), out], 1)


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)
