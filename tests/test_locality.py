"""The locality module against the published program's results, and against its definition written out in numpy."""

import copy
import json
import pickle
from functools import partial

import numpy as np
import pytest
import torch
import weights
from numpy.lib.stride_tricks import sliding_window_view
from timm.layers import LayerNorm2d
from torch import nn

from localvit import LocalityFeedForward
from localvit.locality import ACTS, EfficientChannelAttention, SqueezeExcite, resolve_act
from published import GOLDEN

FIXTURES = json.loads((GOLDEN / "locality_feedforward.json").read_text())
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
"""float64 sums of at most some hundred terms of order one."""


def label(fixture):
    arguments = fixture["args"]
    return f"{arguments['act']}-r{arguments['reduction']}" + ("-wo_dp" if arguments.get("wo_dp_conv") else "")


@pytest.fixture(params=FIXTURES, ids=label)
def published(request):
    """A fixture, the module with its weights, and its input."""
    fixture = request.param
    module = LocalityFeedForward(**fixture["args"]).double()
    state_dict = {
        key: torch.from_numpy(weights.tensor(key, tuple(shape), fixture["weights_seed"]))
        for key, shape in fixture["state_dict"]
    }
    module.load_state_dict(state_dict, strict=True)
    map_BCHW = weights.images(
        fixture["batch"], *fixture["grid"], channels=fixture["args"]["in_dim"], seed=fixture["images_seed"]
    )
    return fixture, module, torch.from_numpy(map_BCHW)


def test_state_dict_is_the_published_one(published):
    fixture, module, _ = published
    assert [[key, list(value.shape)] for key, value in module.state_dict().items()] == fixture["state_dict"]


def test_evaluation_is_the_published_one(published):
    fixture, module, map_BCHW = published
    out = module.eval()(map_BCHW)
    assert out.norm().item() == pytest.approx(fixture["eval_norm"], rel=1e-12)
    assert out.sum().item() == pytest.approx(fixture["eval_sum"], rel=1e-11)
    assert out.flatten()[:5].tolist() == pytest.approx(fixture["eval_first_5"], rel=1e-11)


def test_training_is_the_published_one(published):
    fixture, module, map_BCHW = published
    map_BCHW.requires_grad_()
    out = module.train()(map_BCHW)
    assert out.norm().item() == pytest.approx(fixture["train_norm"], rel=1e-12)
    # The fixture's loss weighs the outputs, in order, with cos 0, cos 1, cos 2, ...
    (out.flatten() * torch.arange(out.numel(), dtype=out.dtype).cos()).sum().backward()
    # torch's hard sigmoid multiplies gradients by a single-precision 1/6: 3e-8, even in float64.
    assert map_BCHW.grad.norm().item() == pytest.approx(fixture["train_input_gradient_norm"], rel=1e-7)
    norms = {key: parameter.grad.norm().item() for key, parameter in module.named_parameters()}
    # Statistics take the mean out of what enters a norm, so some sums cancel: 1e-9 on norms of 10 to 1000.
    assert norms == pytest.approx(fixture["train_gradient_norms"], rel=1e-7, abs=1e-9)


def random_module(*arguments, seed=0, **kwargs):
    """In evaluation mode and float64, every entry random, the running variances positive."""
    module = LocalityFeedForward(*arguments, **kwargs).double().eval()
    generator = torch.Generator().manual_seed(seed)
    for key, value in module.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            value.copy_(noise.abs() + 0.5 if key.endswith("running_var") else noise)
    return module


def random_map(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def hard_sigmoid(x):
    return np.clip(x + 3, 0, 6) / 6


def definition(module, map_BCHW, act, stride=1, wo_dp_conv=False, dp_first=False):
    """The module's evaluation, layer by layer from its state dict."""
    entries = {key: value.numpy() for key, value in module.state_dict().items()}
    x = map_BCHW.numpy()
    layer = 0

    def norm(x):
        nonlocal layer
        mean, variance = entries[f"conv.{layer}.running_mean"], entries[f"conv.{layer}.running_var"]
        scale = entries[f"conv.{layer}.weight"] / np.sqrt(variance + 1e-5)
        shift = entries[f"conv.{layer}.bias"] - mean * scale
        layer += 1
        return x * scale[:, None, None] + shift[:, None, None]

    def activation(x):
        nonlocal layer
        layer += 1
        return np.clip(x, 0, 6) if act == "relu6" else x * hard_sigmoid(x)

    def pointwise(x):
        nonlocal layer
        weight = entries[f"conv.{layer}.weight"][:, :, 0, 0]
        layer += 1
        return np.einsum("oc,bchw->bohw", weight, x)

    def depthwise(x):
        nonlocal layer
        weight = entries[f"conv.{layer}.weight"][:, 0]
        layer += 1
        half = weight.shape[-1] // 2
        padded = np.pad(x, ((0, 0), (0, 0), (half, half), (half, half)))
        windows = sliding_window_view(padded, weight.shape[1:], axis=(2, 3))
        return np.einsum("bchwij,cij->bchw", windows[:, :, ::stride, ::stride], weight)

    if dp_first:
        x = activation(norm(depthwise(x)))
    x = activation(norm(pointwise(x)))
    if not dp_first and not wo_dp_conv:
        x = activation(norm(depthwise(x)))
    mean = x.mean((2, 3))
    gate = None
    if act == "hs+se":
        name = f"conv.{layer}.fc"
        hidden = np.maximum(mean @ entries[f"{name}.0.weight"].T + entries[f"{name}.0.bias"], 0)
        gate = hard_sigmoid(hidden @ entries[f"{name}.2.weight"].T + entries[f"{name}.2.bias"])
    elif act in ("hs+eca", "hs+ecah"):
        kernel = entries[f"conv.{layer}.conv.weight"][0, 0]
        half = len(kernel) // 2
        padded = np.pad(mean, ((0, 0), (half, half)))
        mixed = sum(kernel[i] * padded[:, i : i + mean.shape[1]] for i in range(len(kernel)))
        gate = sigmoid(mixed) if act == "hs+eca" else hard_sigmoid(mixed)
    if gate is not None:
        layer += 1
        x = x * gate[:, :, None, None]
    out = norm(pointwise(x))
    return torch.from_numpy(map_BCHW.numpy() + out if out.shape == map_BCHW.shape else out)


VARIANTS = [{}, {"wo_dp_conv": True}, {"dp_first": True}]


@pytest.mark.parametrize("variant", VARIANTS, ids=["depthwise", "without", "first"])
@pytest.mark.parametrize("act", ACTS)
def test_every_act_is_its_definition(act, variant):
    module = random_module(5, 5, 1, 2.6, act, 3, **variant)
    map_BCHW = random_map(2, 5, 7, 11)
    torch.testing.assert_close(module(map_BCHW), definition(module, map_BCHW, act, **variant), **CLOSE)


@pytest.mark.parametrize("dp_first", [False, True])
@pytest.mark.parametrize(("out_dim", "stride"), [(7, 1), (5, 2), (7, 3)])
def test_stride_and_width_change_leave_the_input_out(out_dim, stride, dp_first):
    module = random_module(5, out_dim, stride, 2.0, "hs+se", 2, dp_first=dp_first)
    assert not module.shortcut
    map_BCHW = random_map(2, 5, 7, 11)
    out = module(map_BCHW)
    assert out.shape == (2, out_dim, -(-7 // stride), -(-11 // stride))
    torch.testing.assert_close(out, definition(module, map_BCHW, "hs+se", stride, dp_first=dp_first), **CLOSE)


@pytest.mark.parametrize("kernel_size", [1, 5, 7])
@pytest.mark.parametrize("variant", [{}, {"dp_first": True}, {"stride": 2}], ids=["second", "first", "strided"])
def test_kernel_size(kernel_size, variant):
    module = random_module(5, 5, kernel_size=kernel_size, reduction=2, **variant)
    map_BCHW = random_map(2, 5, 7, 11)
    torch.testing.assert_close(module(map_BCHW), definition(module, map_BCHW, "hs+se", **variant), **CLOSE)


def test_act_layer_replaces_the_activation_and_keeps_the_gate():
    module = random_module(5, 5, act_layer=nn.GELU, reduction=2)
    expected = random_module(5, 5, reduction=2)
    assert module.state_dict().keys() == expected.state_dict().keys()
    expected.conv[2] = expected.conv[5] = nn.GELU()
    map_BCHW = random_map(2, 5, 7, 11)
    torch.testing.assert_close(module(map_BCHW), expected(map_BCHW), rtol=0, atol=0)


@pytest.mark.parametrize("norm", ["group norm", "layer norm"])
def test_norm_layer_normalizes_each_image_by_itself(norm):
    """In numpy: zero mean and unit variance over groups of channels, or over the channels at each position."""
    norm_layer = partial(nn.GroupNorm, 2) if norm == "group norm" else LayerNorm2d
    module = LocalityFeedForward(4, 4, reduction=2, norm_layer=norm_layer, dtype=torch.float64).train()
    map_BCHW = random_map(3, 4, 7, 11)
    expanded = module.conv[0](map_BCHW).detach().numpy()
    if norm == "group norm":
        groups = expanded.reshape(3, 2, 8 * 7 * 11)
        normal = (groups - groups.mean(2, keepdims=True)) / np.sqrt(groups.var(2, keepdims=True) + 1e-5)
        normal = normal.reshape(expanded.shape)
    else:
        variance = expanded.var(1, keepdims=True)
        normal = (expanded - expanded.mean(1, keepdims=True)) / np.sqrt(variance + module.conv[1].eps)
    torch.testing.assert_close(module.conv[1](module.conv[0](map_BCHW)), torch.from_numpy(normal), **CLOSE)
    out = module(map_BCHW)
    torch.testing.assert_close(module(map_BCHW[:1]), out[:1], **CLOSE)  # a batch of one is fine
    torch.testing.assert_close(module.eval().fuse()(map_BCHW), out, **CLOSE)


def test_shortcut():
    module = random_module(5, 5, reduction=2)
    without = random_module(5, 5, reduction=2, shortcut=False)
    map_BCHW = random_map(2, 5, 7, 11)
    torch.testing.assert_close(without(map_BCHW) + map_BCHW, module(map_BCHW), **CLOSE)
    assert random_module(5, 5, reduction=2, shortcut=True).shortcut
    torch.testing.assert_close(without.fuse()(map_BCHW), without(map_BCHW), **CLOSE)


def test_keyword_only_arguments_leave_the_published_state_dict():
    published = LocalityFeedForward(5, 5, reduction=2).state_dict()
    given = LocalityFeedForward(
        5, 5, reduction=2, kernel_size=3, act_layer=nn.SiLU, norm_layer=nn.BatchNorm2d, shortcut=False
    ).state_dict()
    assert {key: value.shape for key, value in given.items()} == {key: value.shape for key, value in published.items()}


def test_defaults_are_the_published_ones():
    module = LocalityFeedForward(8, 8)
    assert [type(layer).__name__ for layer in module.conv] == [
        *("Conv2d", "BatchNorm2d", "Hardswish", "Conv2d", "BatchNorm2d", "Hardswish"),
        *("SqueezeExcite", "Conv2d", "BatchNorm2d"),
    ]
    assert module.conv[0].out_channels == 32
    assert module.conv[6].fc[0].out_features == 8
    assert not any(layer.bias is not None for layer in module.conv if isinstance(layer, nn.Conv2d))
    assert module.conv[3].groups == 32


@pytest.mark.parametrize(("number", "act"), list(enumerate(ACTS, start=1)))
def test_published_integers_mean_the_acts_in_order(number, act):
    assert resolve_act(number) == act == resolve_act(act)


# k of t = int(|(log2 C + 1) / 2|), by hand: t = 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7; the next odd number where t is even.
@pytest.mark.parametrize(
    ("channels", "kernel_size"),
    [(2, 1), (8, 3), (31, 3), (32, 3), (127, 3), (128, 5), (511, 5), (512, 5), (2047, 5), (2048, 7), (8192, 7)],
)
def test_eca_kernel_grows_with_the_channels(channels, kernel_size):
    gate = EfficientChannelAttention(channels, hard=False)
    assert gate.conv.kernel_size == (kernel_size,)
    assert gate(torch.zeros(1, channels, 2, 3)).shape == (1, channels, 2, 3)


@pytest.mark.parametrize(("channels", "reduction", "width"), [(768, 192, 4), (768, 4, 192), (7, 2, 3), (7, 7, 1)])
def test_reduction_divides_the_bottleneck(channels, reduction, width):
    assert SqueezeExcite(channels, reduction).fc[0].out_features == width


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"in_dim": 0, "out_dim": 5}, "in_dim=0"),
        ({"in_dim": 5, "out_dim": 0}, "out_dim=0"),
        ({"in_dim": 5, "out_dim": 5, "stride": 0}, "stride=0"),
        ({"in_dim": 5, "out_dim": 5, "expand_ratio": 0.1}, "expand_ratio=0.1"),
        ({"in_dim": 5, "out_dim": 5, "expand_ratio": -4.0}, "expand_ratio=-4.0"),
        ({"in_dim": 5, "out_dim": 5, "act": "relu"}, "act='relu' .* relu6, hs, hs\\+se"),
        ({"in_dim": 5, "out_dim": 5, "act": 6}, "act=6"),
        ({"in_dim": 5, "out_dim": 5, "act": 0}, "act=0"),
        ({"in_dim": 5, "out_dim": 5, "reduction": 0}, "reduction=0 .* 20 channels"),
        ({"in_dim": 5, "out_dim": 5, "reduction": 21}, "reduction=21 .* 20 channels"),
        ({"in_dim": 5, "out_dim": 5, "reduction": -2}, "reduction=-2"),
        ({"in_dim": 5, "out_dim": 5, "wo_dp_conv": True, "dp_first": True}, "dp_first=True needs the depth-wise"),
        ({"in_dim": 5, "out_dim": 5, "wo_dp_conv": True, "stride": 2}, "stride=2 needs the depth-wise"),
        ({"in_dim": 5, "out_dim": 5, "wo_dp_conv": True, "kernel_size": 5}, "kernel_size=5 needs the depth-wise"),
        ({"in_dim": 5, "out_dim": 5, "kernel_size": 4}, "kernel_size=4 must be odd"),
        ({"in_dim": 5, "out_dim": 5, "kernel_size": -1}, "kernel_size=-1 must be odd"),
        ({"in_dim": 5, "out_dim": 7, "shortcut": True}, "shortcut=True .* 5 -> 7"),
        ({"in_dim": 5, "out_dim": 5, "stride": 2, "shortcut": True}, "shortcut=True .* stride=2"),
    ],
)
def test_bad_arguments_raise(arguments, says):
    with pytest.raises(ValueError, match=says):
        LocalityFeedForward(**arguments)


@pytest.mark.parametrize("act", ACTS)
def test_memory_formats_agree_and_are_kept(act):
    module = random_module(5, 5, act=act, reduction=2)
    map_BCHW = random_map(2, 5, 7, 11)
    last = map_BCHW.to(memory_format=torch.channels_last)
    out = module(last)
    torch.testing.assert_close(out, module(map_BCHW), **CLOSE)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert module(map_BCHW).is_contiguous()


def test_numerical_gradient():
    module = random_module(2, 2, act="hs+se", reduction=2)
    # Away from the corners of the piecewise activations, of which random inputs have none.
    assert torch.autograd.gradcheck(module, random_map(2, 2, 3, 5).requires_grad_(), atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("act", ACTS)
def test_lower_precision_stays_close(act, dtype, tolerance):
    # Errors relative to the output's size: 2^-24 and 2^-9, times the ten operations and cancellations in sequence.
    module = LocalityFeedForward(16, 16, act=act).double().eval()
    map_BCHW = random_map(2, 16, 7, 11)
    expected = module(map_BCHW)
    out = copy.deepcopy(module).to(dtype)(map_BCHW.to(dtype))
    assert out.dtype == dtype
    assert (out.double() - expected).norm() <= tolerance * expected.norm()


def test_dtype_and_autocast():
    module = LocalityFeedForward(16, 16, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    module = LocalityFeedForward(16, 16).eval()
    map_BCHW = random_map(2, 16, 7, 11).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(map_BCHW)
    assert (out - module(map_BCHW)).norm() <= 0.05 * out.norm()


def test_meta_device():
    module = LocalityFeedForward(5, 7, device="meta")
    assert {value.device.type for value in module.state_dict().values()} == {"meta"}
    assert module(torch.empty(2, 5, 3, 11, device="meta")).shape == (2, 7, 3, 11)


@pytest.mark.parametrize("act", ["hs+se", "hs+ecah"])
def test_compiles_and_exports(act):
    torch._dynamo.reset()
    module = random_module(5, 5, act=act, reduction=2)
    map_BCHW = random_map(2, 5, 7, 11)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(map_BCHW), module(map_BCHW), **CLOSE)
    height, width = torch.export.Dim("height", min=2, max=64), torch.export.Dim("width", min=2, max=64)
    program = torch.export.export(module, (map_BCHW,), dynamic_shapes=({2: height, 3: width},))
    other = random_map(2, 5, 13, 3)
    torch.testing.assert_close(program.module()(other), module(other), **CLOSE)


def test_copies_and_pickles():
    module = random_module(5, 5, reduction=2)
    map_BCHW = random_map(2, 5, 7, 11)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(twin(map_BCHW), module(map_BCHW), rtol=0, atol=0)
