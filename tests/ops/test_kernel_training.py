"""The locality module's training step by the Triton kernels, interpreted on the CPU, and on a GPU."""

import contextlib
import copy
from functools import partial

import pytest
import torch
import training_steps
from launches import HALF, Draw, needs_gpu, needs_triton
from test_fuse import SMALL, images
from training_steps import (
    as_near_as_the_layers,
    feed_forward,
    layer_by_layer,
    off_by,
    step,
    steps_by_the_kernels,
    tokens_as_map,
)

import localvit
from localvit.locality import ACTS, LocalityFeedForward
from localvit.ops import use_backend

WAYS = ["as it is", "checkpointed", "frozen gate", "frozen layers", "backward twice", "parts of tensors"]


@needs_triton
@pytest.mark.parametrize(
    ("act", "way"), [*(("hs+se", way) for way in WAYS), ("relu6", WAYS[0]), ("hs+eca", WAYS[0]), ("hs+eca", WAYS[2])]
)
def test_interpreted_step(interpreted, act, way):
    """Without a gate, with a gate that has kernels, and with one that has none."""
    interpreted(training_steps.interpreted_step, act, way)


@needs_triton
@pytest.mark.parametrize("act", ["hs+se", "relu6"])
def test_interpreted_under_autocast(interpreted, act):
    interpreted(training_steps.interpreted_autocast, act)


@needs_triton
@pytest.mark.parametrize(
    ("act", "operators", "dtype"),
    [
        ("hs+se", 1, torch.float32),
        ("relu6", 1, torch.float16),
        ("hs+ecah", 1, torch.float16),
        ("hs+eca", 0, torch.float16),
    ],
    ids=["hs+se", "relu6 under autocast", "hs+ecah under autocast", "a gate of the user's"],
)
def test_interpreted_compiled(interpreted, act, operators, dtype):
    interpreted(training_steps.interpreted_compiled, act, operators, dtype)


@needs_triton
@pytest.mark.parametrize("act", ["hs+se", "relu6", "hs+ecah"])
def test_interpreted_operator(interpreted, act):
    interpreted(training_steps.interpreted_operator, act)


@needs_triton
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_interpreted_on_two_processes(interpreted, tmp_path):
    """Batch norms over two processes give each image what one process gives it."""
    whole = interpreted(training_steps.part_of_a_synchronized_step, 0)
    parts = interpreted(training_steps.parts_of_a_synchronized_step, tmp_path / "store")
    found = {name: sum(part[name] for part in parts) for name in whole if name.startswith("gradient of conv")}
    for name in ("output", "gradient of the input"):
        found[name] = torch.cat([part[name] for part in parts])
    for part in parts:
        found |= {name: part[name] for name in whole if name not in found}
        errors = training_steps.off_by(found, whole)
        # float32: one process's statistics, sent as an inverse deviation, lose a digit of their variance.
        assert max(errors.values()) < 1e-5, errors


@needs_triton
def test_interpreted_weights_changed_before_the_backward_pass(interpreted):
    interpreted(training_steps.interpreted_weights_changed_in_between)


MODES = {
    "autocast bfloat16": (torch.float32, torch.bfloat16),
    "autocast float16": (torch.float32, torch.float16),
    "bfloat16": (torch.bfloat16, None),
}
"""The dtype of the module, and that of autocast."""


def autocast(dtype):
    return partial(torch.autocast, "cuda", dtype, enabled=dtype is not None)


def on_a_gpu(seed, act, mode, size=(8, 14, 14, 192), **arguments):
    """Module, map and weights of the loss on a GPU, the context of the forward pass, and the step in float64."""
    weights_dtype, compute_dtype = MODES[mode]
    draw = Draw(seed, "cuda")
    batch, height, width, channels = size
    module = feed_forward(draw, channels, act=act, **arguments).to(weights_dtype)
    map_BCHW = tokens_as_map(draw, batch, channels, (height, width), weights_dtype)
    weights_BCHW = draw.values(batch, channels, height, width, dtype=weights_dtype)
    exact = step(layer_by_layer(module).double().cpu(), map_BCHW.double().cpu(), weights_BCHW.double().cpu())
    return module, map_BCHW, weights_BCHW, autocast(compute_dtype), exact


@needs_triton
@needs_gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("size", [(8, 14, 14, 192), (11, 7, 7, 97)], ids=str)
def test_step_on_a_gpu(act, mode, size):
    module, map_BCHW, weights_BCHW, context, exact = on_a_gpu(1, act, mode, size)
    plain = layer_by_layer(module)
    with context():
        assert steps_by_the_kernels(copy.deepcopy(module)(map_BCHW)) == 1
    found = step(module, map_BCHW, weights_BCHW, context)
    as_near_as_the_layers(found, step(plain, map_BCHW, weights_BCHW, context), exact, MODES[mode][1] or MODES[mode][0])


@needs_triton
@needs_gpu
@pytest.mark.parametrize("arguments", [{"dp_first": True}, {"wo_dp_conv": True}, {"stride": 2}, {"kernel_size": 5}])
@pytest.mark.parametrize("mode", MODES)
def test_other_forms_do_without_the_kernels_on_a_gpu(arguments, mode):
    weights_dtype, compute_dtype = MODES[mode]
    draw = Draw(2, "cuda")
    module = feed_forward(draw, 24, act="hs+se", **arguments).to(weights_dtype)
    with autocast(compute_dtype)():
        out_BCHW = module(tokens_as_map(draw, 2, 24, (6, 8), weights_dtype))
    assert steps_by_the_kernels(out_BCHW) == 0
    out_BCHW.float().sum().backward()


@needs_triton
@needs_gpu
@pytest.mark.parametrize("way", ["checkpointed", "frozen gate"])
def test_ways_on_a_gpu(way):
    module, map_BCHW, weights_BCHW, context, _ = on_a_gpu(3, "hs+se", "autocast bfloat16")
    module.conv[6].requires_grad_(way != "frozen gate")
    twin = copy.deepcopy(module)
    run = training_steps.checkpointed(module) if way == "checkpointed" else None
    found = step(module, map_BCHW, weights_BCHW, context, run=run)
    assert module.conv[1].num_batches_tracked.item() == 1
    wanted = step(twin, map_BCHW, weights_BCHW, context)
    assert found.keys() == wanted.keys()
    # The kernels add up in the same order each time.
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@needs_triton
@needs_gpu
def test_backends_on_a_gpu():
    module, map_BCHW, _, context, _ = on_a_gpu(4, "hs+se", "autocast bfloat16")
    with context():
        for backend, steps in (("layers", 0), ("torch", 0), ("auto", 1), ("triton", 1)):
            with use_backend(backend):
                assert steps_by_the_kernels(module(map_BCHW)) == steps


@needs_triton
@needs_gpu
def test_memory_kept_for_the_backward_pass():
    """The input in the dtype of the products, two hidden maps, and vectors: no other map."""
    draw, channels, hidden = Draw(5, "cuda"), 64, 256
    module = feed_forward(draw, channels, act="hs+se")
    map_BCHW = tokens_as_map(draw, 64, channels, (14, 14), torch.float32).requires_grad_()
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cuda", torch.bfloat16):
        module(map_BCHW)
    # Also the map that the last batch norm reads.
    assert sum(kept.values()) <= 1.05 * 64 * 14 * 14 * 2 * (2 * hidden + 2 * channels)


@needs_triton
@needs_gpu
@pytest.mark.parametrize("mode", MODES)
def test_captured_in_a_cuda_graph(mode):
    """Replayed on other images, it gives the same bits as the same step run kernel by kernel."""
    module, map_BCHW, weights_BCHW, context, _ = on_a_gpu(6, "hs+se", mode)
    map_BCHW = map_BCHW.contiguous().requires_grad_()
    leaves = [map_BCHW, *module.parameters()]

    def run():
        with context():
            out = module(map_BCHW)
        return out, torch.autograd.grad(out, leaves, weights_BCHW.to(out.dtype))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, gradients = run()
    with torch.no_grad():
        map_BCHW.copy_(map_BCHW.flip(0) * 1.5)
    before = copy.deepcopy(module.state_dict())
    graph.replay()
    replayed = [each.clone() for each in (out, *gradients, *module.buffers())]
    module.load_state_dict(before)
    out, gradients = run()
    assert all(map(torch.equal, replayed, (out, *gradients, *module.buffers())))
    assert module.conv[1].num_batches_tracked == before["conv.1.num_batches_tracked"] + 1


@needs_triton
@needs_gpu
@pytest.mark.parametrize(("act", "operators"), [("hs+se", 1), ("relu6", 1), ("hs+eca", 1), ("hs+ecah", 1)])
@pytest.mark.parametrize("mode", MODES)
def test_compiled_on_a_gpu(act, operators, mode):
    # A seed whose values keep off the kinks of the activations.
    module, map_BCHW, weights_BCHW, context, exact = on_a_gpu(10, act, mode, (4, 7, 7, 32))
    plain = layer_by_layer(module)
    found = step(module, map_BCHW, weights_BCHW, context, run=training_steps.compiled(module, operators))
    as_near_as_the_layers(found, step(plain, map_BCHW, weights_BCHW, context), exact, MODES[mode][1] or MODES[mode][0])


def model_step(model, images, labels, context):
    with context():
        loss = torch.nn.functional.cross_entropy(model(images).double(), labels)
    (1024 * loss).backward()  # as a gradient scaler does: float16 has no smaller gradients
    return (
        {"loss": loss.detach()} | {n: each.grad for n, each in model.named_parameters()} | dict(model.named_buffers())
    )


@needs_triton
@needs_gpu
@pytest.mark.parametrize("act", ["hs+se", "hs+eca", "relu6"])
@pytest.mark.parametrize("mode", ["autocast bfloat16", "autocast float16"])
@pytest.mark.parametrize("compiles", [False, True])
def test_model_on_a_gpu(act, mode, compiles):
    """Loss, the gradient of every parameter and all running statistics of a whole model."""
    torch.manual_seed(0)
    model = localvit.create_model("localvit_nano_patch4_32", act=act, num_classes=10).train()
    compare_model(model, torch.randn(16, 3, 32, 32), MODES[mode][1], compiles=compiles)


@needs_triton
@needs_gpu
@pytest.mark.parametrize("name", [name for name in SMALL if name.startswith("localvit")])
def test_family_on_a_gpu(name):
    torch.manual_seed(0)
    model = localvit.create_model(name, **SMALL[name]).train()
    assert any(isinstance(module, LocalityFeedForward) for module in model.modules())
    compare_model(model, images(name, 16, torch.float32), torch.bfloat16)


def compare_model(model, images, dtype, *, compiles=False):
    """One step under autocast by the kernels, by the layers, and by the layers in float64."""
    labels = torch.arange(len(images)) % model.num_classes
    with use_backend("layers"):
        exact = model_step(copy.deepcopy(model).double(), images.double(), labels, contextlib.nullcontext)
        by_layers = model_step(copy.deepcopy(model).cuda(), images.cuda(), labels.cuda(), autocast(dtype))
    model.cuda()
    if compiles:
        torch._dynamo.reset()
        model.compile(fullgraph=True)
    found = model_step(model, images.cuda(), labels.cuda(), autocast(dtype))
    # Of gradients that cancel, such as those of biases before attention, half precision leaves mostly rounding.
    clear = [name for name, error in off_by(by_layers, exact).items() if error < 0.01]
    assert "loss" in clear
    as_near_as_the_layers(*({name: step[name] for name in clear} for step in (found, by_layers, exact)), dtype)


@needs_triton
@needs_gpu
@pytest.mark.parametrize("dtype", HALF)
def test_a_second_launch_finds_its_compiled_kernel(dtype, monkeypatch):
    """Of the same shapes and dtypes, whatever the values; another dtype or batch has its own."""
    from localvit.ops.triton.launch import Launch
    from localvit.ops.triton.pointwise import launch_for, pointwise

    compiled, compile_and_run = [], Launch._compile_and_run
    monkeypatch.setattr(Launch, "_compile_and_run", lambda *arguments: compiled.append(compile_and_run(*arguments)))

    def run(batch, dtype):
        before = len(compiled)
        weight, rows = (torch.randn(*shape, 41, device="cuda", dtype=dtype) for shape in ((67,), (batch, 35)))
        out = pointwise(rows, weight)
        torch.testing.assert_close(out.double(), rows.double() @ weight.double().t(), rtol=0.02, atol=0.2)
        return len(compiled) - before

    launch_for.cache_clear()
    assert [run(3, dtype), run(3, dtype), run(5, dtype), run(5, dtype)] == [1, 0, 1, 0]
    assert run(3, HALF[1 - HALF.index(dtype)]) == 1
