"""A training step of the locality module by the Triton kernels, and by the layers in float64.

Shapes: B batch, P prefix tokens, C channels, H and W the grid.
"""

import contextlib
import copy
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import pytest
import torch
from launches import Draw, autograd_steps, part_of_another
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch.utils.checkpoint import checkpoint

from localvit.locality import EfficientChannelAttention, LocalityFeedForward
from localvit.ops import dispatch

ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
"""Of `torch.library.opcheck`."""


class Layers(nn.Sequential):
    """The same layers, which run one by one: only a plain nn.Sequential takes a faster path."""


class OwnGate(EfficientChannelAttention):
    """Other factors of the same layers, which no operator knows."""

    def scale(self, mean_BE):
        return super().scale(mean_BE) * 2


def layer_by_layer(module):
    plain = copy.deepcopy(module)
    plain.conv = Layers(*plain.conv)
    return plain


def feed_forward(draw, channels, **arguments):
    """A module in training mode, all weights and running statistics off their initial values."""
    module = LocalityFeedForward(channels, channels, reduction=4, **arguments)
    with torch.no_grad():
        for entry in (*module.parameters(), *module.buffers()):
            if entry.is_floating_point():
                noise = draw.values(*entry.shape, dtype=torch.float32).to(entry.device)
                # Inputs of convolutions are of size 1, and so are their outputs.
                entry.copy_(noise / entry[0].numel() ** 0.5 if entry.dim() > 1 else entry + 0.3 * noise)
    return module.to(draw.device).train()


def tokens_as_map(draw, batch, channels, grid, dtype):
    """A map as hosts give it: tokens behind prefix tokens, which are NaN."""
    return draw.map(batch, *grid, channels, dtype).permute(0, 3, 1, 2)


def step(module, map_BCHW, weights_BCHW, context=contextlib.nullcontext, run=None, times=1):
    """By name: output, the gradients of the map and of every parameter that has one, and the running statistics."""
    map_BCHW = map_BCHW.detach().requires_grad_()
    with context():
        out_BCHW = (module if run is None else run)(map_BCHW)
    for _ in range(times):
        (out_BCHW * weights_BCHW.to(out_BCHW.dtype)).sum().backward(retain_graph=times > 1)
    gradients = {f"gradient of {name}": each.grad for name, each in module.named_parameters()}
    results = {"output": out_BCHW.detach(), "gradient of the input": map_BCHW.grad} | gradients
    return {name: each for name, each in results.items() if each is not None} | dict(module.named_buffers())


def steps_by_the_kernels(out):
    """How many times the kernels' training step is in an output's graph."""
    return autograd_steps(out).count("_FeedForwardBackward")


def off_by(found, wanted):
    """The difference of each entry, relative to the norm of what it should be; 0 or infinity for counts."""
    assert found.keys() == wanted.keys()
    errors = {}
    for name, value in wanted.items():
        difference = (found[name].double().cpu() - value.double().cpu()).norm()
        errors[name] = float(difference / value.double().norm().cpu()) if difference else 0.0
    return errors


@contextlib.contextmanager
def kernels_on_the_cpu():
    """Interpreted kernels run for float32 as well, and for tensors of the CPU."""
    before = dispatch._has_kernels
    dispatch._has_kernels = lambda device, dtype: True
    try:
        yield
    finally:
        dispatch._has_kernels = before


def checkpointed(module):
    return lambda map_BCHW: checkpoint(module, map_BCHW, use_reentrant=False)


def interpreted_step(act, way):
    """A whole step, interpreted in float32, against float64: a fixed seed, whose values keep off the kinks."""
    draw = Draw(7)
    module = feed_forward(draw, 23, act=act, expand_ratio=2)
    map_BCHW = tokens_as_map(draw, 2, 23, (3, 5), torch.float32)
    if way == "frozen gate":
        module.conv[6].requires_grad_(False)
    if way == "frozen layers":
        for layer in (module.conv[0], module.conv[4], module.conv[7]):
            layer.requires_grad_(False)
    if way == "parts of tensors":
        for layer in module.modules():
            for name, parameter in list(layer.named_parameters(recurse=False)):
                setattr(layer, name, nn.Parameter(part_of_another(parameter.detach())))
    plain = layer_by_layer(module).double()
    weights_BCHW = draw.values(2, 23, 3, 5)
    times = 2 if way == "backward twice" else 1
    with kernels_on_the_cpu():
        assert steps_by_the_kernels(copy.deepcopy(module)(map_BCHW)) == 1
        run = checkpointed(module) if way == "checkpointed" else None
        found = step(module, map_BCHW, weights_BCHW, run=run, times=times)
    assert all(value.dtype == torch.float32 for name, value in found.items() if "num_batches" not in name)
    errors = off_by(found, step(plain, map_BCHW.double(), weights_BCHW, times=times))
    # Sums of up to a hundred products in float32, and gradients that cancel in part.
    assert max(errors.values()) < 1e-5, errors
    assert module.conv[1].num_batches_tracked.item() == module.conv[4].num_batches_tracked.item() == 1


def interpreted_autocast(act):
    """float16 within a module in float32: results and gradients in float32, as near to float64 as the layers bring."""
    draw = Draw(8)
    module = feed_forward(draw, 23, act=act, expand_ratio=2)
    map_BCHW, weights_BCHW = tokens_as_map(draw, 2, 23, (3, 5), torch.float32), draw.values(2, 23, 3, 5)
    plain = layer_by_layer(module)
    wanted = step(layer_by_layer(module).double(), map_BCHW.double(), weights_BCHW)

    def autocast():
        return torch.autocast("cpu", torch.float16)

    with kernels_on_the_cpu():
        found = step(module, map_BCHW, weights_BCHW, autocast)
    as_near_as_the_layers(found, step(plain, map_BCHW, weights_BCHW, autocast), wanted, torch.float16)


def as_near_as_the_layers(found, by_layers, wanted, dtype):
    """The error against float64 is that of the layers in the same dtype, but for the luck of rounding."""
    assert {name: value.dtype for name, value in found.items()} == {n: value.dtype for n, value in by_layers.items()}
    errors, allowed = off_by(found, wanted), off_by(by_layers, wanted)
    # Three times the layers' error, and the rounding of one operand where they happen to be nearer than that: rounding
    # decides on which side of h-swish's kinks a value lies, where the slope jumps by a half, and a few values in 10,000
    # lie so near.
    limits = {name: 3 * error + _room(name, dtype) for name, error in allowed.items()}
    far = {name: (error, limits[name]) for name, error in errors.items() if error > limits[name]}
    assert not far, far


def _room(name, dtype):
    return 0.0 if "num_batches_tracked" in name else 2 * torch.finfo(dtype).eps


def compiled(module, operators, **options):
    """The module compiled in one graph, which has to contain the forward operator a number of times."""

    def check(graph, inputs):
        found = sum(node.target is torch.ops.localvit.training_forward.default for node in graph.graph.nodes)
        assert found == operators
        return lookup_backend("aot_eager" if map_is_on_the_cpu(inputs) else "inductor")(graph, inputs)

    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend=check, **options)


def map_is_on_the_cpu(inputs):
    return all(each.device.type == "cpu" for each in inputs if isinstance(each, torch.Tensor))


def interpreted_compiled(act, operators, dtype):
    """torch.compile around the operators, at two batch sizes of one graph: as near to float64 as the layers bring."""
    draw = Draw(8)
    module = feed_forward(draw, 23, act=act, expand_ratio=2)
    if operators == 0:
        module.conv[6] = OwnGate(46, hard=True)
    module.conv[0].requires_grad_(False)
    autocast = partial(torch.autocast, "cpu", dtype, enabled=dtype != torch.float32)
    with kernels_on_the_cpu():
        run = compiled(module, operators, dynamic=True)
    for batch in (2, 3):
        map_BCHW = tokens_as_map(draw, batch, 23, (3, 5), torch.float32)
        weights_BCHW = draw.values(batch, 23, 3, 5)
        plain = layer_by_layer(module)
        wanted = step(layer_by_layer(module).double(), map_BCHW.double(), weights_BCHW)
        with kernels_on_the_cpu():
            found = step(module, map_BCHW, weights_BCHW, autocast, run=run)
        as_near_as_the_layers(found, step(plain, map_BCHW, weights_BCHW, autocast), wanted, dtype)
        module.zero_grad()


def interpreted_operator(act):
    """What torch demands of an operator: its schema, its empty results, and its gradient under a compiler."""
    from localvit.ops.kernel_gates import known_gate
    from localvit.ops.kernel_step import Parameters
    from localvit.ops.stages import stages_of

    draw = Draw(9)
    stages = stages_of(feed_forward(draw, 11, act=act, expand_ratio=2).conv)
    gate = stages.stages[1].gate
    name, gate_parameters = (None, ()) if gate is None else known_gate(gate)
    parameters = [*Parameters.of(stages), *gate_parameters]
    x_BHWC = draw.values(2, 3, 5, 11, dtype=torch.float32).requires_grad_()
    arguments = x_BHWC, parameters, stages.stages[0].act, stages.stages[1].act, name, 1e-5, 1e-5
    # The compiler and autograd treat all forms alike, and each of their checks runs the kernels several times.
    checks = ALL_CHECKS if name == "se" else ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.localvit.training_forward.default, arguments, test_utils=checks)
    out_BHWC, _, *kept = (each.detach() for each in torch.ops.localvit.training_forward(*arguments))
    parameters = [each.detach() for each in parameters]
    arguments = torch.randn_like(out_BHWC), x_BHWC.detach(), parameters, kept, *arguments[2:5]
    torch.library.opcheck(torch.ops.localvit.training_backward.default, arguments, test_utils=checks)


def part_of_a_synchronized_step(rank, store=None):
    """What one of two processes computes of 5 images, the first with 3 of them, up to the last batch norm.

    Without a store, one process computes them all.
    """
    from localvit.ops.kernel_training import feed_forward as by_kernels
    from localvit.ops.stages import stages_of

    torch.manual_seed(11)
    draw = Draw(11)
    module = feed_forward(draw, 23, act="hs+se", expand_ratio=2)
    map_BCHW, weights_BCHW = tokens_as_map(draw, 5, 23, (5, 7), torch.float32), draw.values(5, 23, 5, 7).float()
    if store is not None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        part = slice(0, 3) if rank == 0 else slice(3, 5)
        map_BCHW, weights_BCHW = map_BCHW[part], weights_BCHW[part]
        module.conv = nn.SyncBatchNorm.convert_sync_batchnorm(module.conv)
    stages = stages_of(module.conv)
    found = step(module, map_BCHW, weights_BCHW, run=lambda map_BCHW: by_kernels(stages, map_BCHW, torch.float32))
    if store is not None:
        torch.distributed.destroy_process_group()
    return {name: each for name, each in found.items() if not name.startswith(("conv.8", "gradient of conv.8"))}


def parts_of_a_synchronized_step(store):
    """Of both processes, forked from this one, which has imported what they need."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as both:
        return list(both.map(part_of_a_synchronized_step, range(2), [store] * 2))


def interpreted_weights_changed_in_between():
    """The backward pass refuses weights changed after the forward pass, as autograd does."""
    draw = Draw(9)
    module = feed_forward(draw, 11, act="hs+se", expand_ratio=2)
    with kernels_on_the_cpu():
        out = module(tokens_as_map(draw, 2, 11, (3, 5), torch.float32))
    with torch.no_grad():
        module.conv[3].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
