"""benchmarks/straightforward.py computes the same as the model, in training too, without its faster paths."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_fuse import SMALL, images, small
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import localvit

FILE = Path(__file__).parents[2] / "benchmarks" / "straightforward.py"
spec = importlib.util.spec_from_file_location("straightforward", FILE)
assert spec
assert spec.loader
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
straightforward = module.straightforward

NAMES = [name for name in SMALL if name.startswith("localvit")]


def relative_error(out, expected):
    return ((out - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", NAMES)
def test_same_logits(name):
    model = small(name)
    plain = straightforward(model)
    assert list(plain.state_dict()) == list(model.state_dict())
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert own.isdisjoint(tensor.data_ptr() for tensor in plain.state_dict().values())
    with torch.no_grad():
        expected = model(images(name))
        # float64 rounds by 1e-16, and the order of sums of hundreds of terms differs.
        assert relative_error(plain(images(name)), expected) <= 1e-12
        first = next(each for each in plain.modules() if isinstance(each, module.FeedForward))
        first.conv[1].running_mean += 0.1  # negative control: another module computes something else
        assert relative_error(plain(images(name)), expected) > 1e-6
        plain.load_state_dict(model.state_dict())
        assert relative_error(plain(images(name)), expected) <= 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_same_gradients_and_statistics(name):
    """One training step, with batch statistics and stochastic depth."""
    model = small(name, drop_path_rate=0.3).train()
    plain = straightforward(model)
    logits = []
    for each in (model, plain):
        torch.manual_seed(3)
        logits.append(each(images(name, batch=3)))
        F.cross_entropy(logits[-1], torch.tensor([0, 6, 2])).backward()
    assert relative_error(logits[1], logits[0]) <= 1e-12
    expected = {key: parameter.grad for key, parameter in model.named_parameters()}
    largest = max(gradient.abs().max() for gradient in expected.values() if gradient is not None)
    for key, parameter in plain.named_parameters():
        if expected[key] is None:
            assert parameter.grad is None
        else:
            # The model uses torch's hard sigmoid, whose backward has 1/6 in float32, which is 3e-8 off.
            assert (parameter.grad - expected[key]).abs().max() <= 3e-8 * largest, key
    torch.testing.assert_close(dict(plain.named_buffers()), dict(model.named_buffers()), rtol=1e-12, atol=1e-12)


class Called(TorchFunctionMode):
    """Records which torch functions run."""

    def __init__(self):
        super().__init__()
        self.functions = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.functions.add(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_no_shortcut_is_taken(name):
    """Maps are contiguous, activations and attention are explicit, and the multiply-adds are those of the model."""
    model = small(name).requires_grad_(False)
    plain = straightforward(model)
    maps = []
    for each in plain.modules():
        if isinstance(each, module.FeedForward):
            each.conv.register_forward_pre_hook(lambda conv, args: maps.append(args[0]))
    counts = []
    for each in (model, plain):
        with FlopCounterMode(display=False) as counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            each(images(name))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    assert len(maps) == sum(isinstance(each, localvit.LocalityFeedForward) for each in model.modules())
    assert all(map_BCHW.is_contiguous() for map_BCHW in maps)
    assert not any(map_BCHW.is_contiguous(memory_format=torch.channels_last) for map_BCHW in maps)
    fast = {F.scaled_dot_product_attention, F.hardswish, F.hardsigmoid}
    for each, expected in ((model, True), (plain, False)):
        with Called() as called:
            each(images(name))
        assert bool(called.functions & fast) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small("deit_tiny_distilled_patch16_224"), "VisionTransformerDistilled has no locality feed-forward"),
        (lambda: localvit.fuse(small("localvit_nano_patch4_32")), "LocalViT has no locality feed-forward"),
        (
            lambda: localvit.localize(
                localvit.create_model("beit_base_patch16_224", depth=1, embed_dim=24, num_heads=3), localvit.Replace()
            ),
            "there is no straightforward forward for Block: add it to FORWARDS",
        ),
    ],
)
def test_other_models_are_rejected(make, message):
    with pytest.raises(ValueError, match=message):
        straightforward(make())
