"""Arguments of each registered operator, and its result in float64 by torch's functions.

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


SAMPLES = {f"depthwise_act_pool {act}": ("depthwise_act_pool", depthwise_act_pool, (act,)) for act in ACTIVATIONS} | {
    "pointwise expansion": ("pointwise", pointwise, ("hs", False, True)),
    "pointwise relu6": ("pointwise", pointwise, ("relu6", False, True)),
    "pointwise projection": ("pointwise", pointwise, (None, True, True)),
    "pointwise alone": ("pointwise", pointwise, (None, False, False)),
    "squeeze_excite": ("squeeze_excite", squeeze_excite, ()),
}


def sample(name, draw, dtype=torch.float64):
    """An operator's name and its arguments."""
    operator, form, options = SAMPLES[name]
    return operator, form(draw, dtype, *options)


def expected(operator, given):
    """What the operator's docstring says, as a tuple."""
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


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)
