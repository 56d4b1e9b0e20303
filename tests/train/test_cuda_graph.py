"""Training with CUDA graphs: what is refused, the same numbers as without, and the memory that replays share."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from tiny import STILL, tiny_config

import localvit
import localvit.train.cuda_graph as cuda_graph_module
from localvit.checkpoints import save_checkpoint
from localvit.train.builder import build
from localvit.train.config import TrainConfig
from localvit.train.cuda_graph import GraphedModel, ModelCall, check_graph_support
from localvit.train.recipe import describe_errors
from localvit.train.run_folder import STATE
from localvit.train.step import train_step

SETTINGS = STILL | {
    **{"input_size": (16,), "model_args": {"depth": 2}, "batch_size": 6, "drop_path_rate": 0.3},
    **{"opt": "momentum", "lr": 0.5, "weight_decay": 0.0, "warmup_epochs": 0, "epochs": 1},
}
"""Stochastic depth, and an update in proportion to the gradient."""
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")


@pytest.mark.parametrize("other", ["compile", "grad_checkpointing"])
def test_settings_that_cannot_be_combined(other):
    with pytest.raises(ValidationError) as raised:
        TrainConfig(cuda_graph=True, **{other: True})
    message = describe_errors(raised.value)
    assert "cuda_graph" in message
    assert other in message
    assert "\n" not in message


def test_without_a_cuda_device_nothing_starts(tiny_digits, tmp_path):
    """Refused before the images are opened: their folder does not even exist."""
    config = tiny_config(tmp_path / "no images", tmp_path / "run", cuda_graph=True)
    with pytest.raises(ValueError, match=r"^cuda_graph needs a CUDA device.* on cpu: .*--no-cuda-graph") as raised:
        build(config)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(cuda_graph_module, "world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"^cuda_graph works in one process, and this run has 2: .*--no-cuda-graph"):
        check_graph_support(TrainConfig(cuda_graph=True), torch.device("cuda", 0))
    check_graph_support(TrainConfig(), torch.device("cuda", 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_distilled", [False, True])
def test_what_is_captured_is_the_model_under_autocast(dtype, is_distilled):
    model = localvit.create_model(
        "localvit_nano_patch4_32", img_size=16, num_classes=3, depth=1, distilled=is_distilled
    )
    if is_distilled:
        model.set_distilled_training(True)
    images_BCHW = torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected = model(images_BCHW)
    outputs = ModelCall(model, images_BCHW.device, dtype)(images_BCHW)
    assert isinstance(outputs, tuple) == is_distilled
    for one, other in zip(*((each if is_distilled else (each,)) for each in (outputs, expected)), strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, other)


def replay_with_fixed_memory(call, sample_BCHW):
    """What matters of a capture, without a GPU: warm-up runs, and gradients that each replay writes to the same memory.

    The model has a single output.
    """
    parameters = list(call.parameters())
    fixed = [torch.empty_like(parameter) for parameter in parameters]
    for _ in range(3):
        call(sample_BCHW)

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, images_BCHW, *parameters):
            with torch.enable_grad():
                ctx.output = call(images_BCHW)
            return ctx.output.detach()

        @staticmethod
        def backward(ctx, grad):
            for memory, value in zip(fixed, torch.autograd.grad(ctx.output, parameters, grad), strict=True):
                memory.copy_(value)
            return (None, *(memory.detach() for memory in fixed))

    return lambda images_BCHW: Replay.apply(images_BCHW, *parameters)


@pytest.mark.parametrize("grad_accum", [1, 3])
def test_steps_with_gradients_in_fixed_memory(tiny_digits, tmp_path, monkeypatch, grad_accum):
    """Bit-exact, buffers included: on the CPU the replay computes what the model does."""
    monkeypatch.setattr(cuda_graph_module, "_capture", replay_with_fixed_memory)
    changes = SETTINGS | {"grad_accum": grad_accum, "batch_size": 6 // grad_accum}
    plain = build(tiny_config(tiny_digits, tmp_path / "plain", **changes))
    graphed = build(tiny_config(tiny_digits, tmp_path / "graphed", **changes))
    sample_BCHW = torch.zeros(changes["batch_size"], 3, 16, 16)
    graphed = replace(graphed, wrapped_model=GraphedModel(graphed.state.model, sample_BCHW, torch.float32))
    (losses, expected), (losses_graphed, found) = (after_steps(each, 2) for each in (plain, graphed))
    assert losses_graphed == losses
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert counts(found) == {2 * grad_accum}


def test_another_batch_size_runs_without_the_graphs(monkeypatch):
    monkeypatch.setattr(cuda_graph_module, "_capture", lambda call, sample_BCHW: None)
    model = localvit.create_model("localvit_nano_patch4_32", img_size=16, num_classes=3, depth=1)
    graphed = GraphedModel(model, torch.zeros(4, 3, 16, 16), torch.float32)
    images_BCHW = torch.randn(1, 3, 16, 16)
    assert torch.equal(graphed(images_BCHW), model(images_BCHW))


def after_steps(training, count):
    """The losses of the next steps, and the state dict after them."""
    state, losses = training.state, []
    batches = training.device_batches(state.epoch, state.step * training.config.grad_accum)
    for _ in range(count):
        losses.append(train_step(training, batches, stop=False).loss)
        state.step += 1
    return losses, {name: value.clone() for name, value in state.model.state_dict().items()}


def counts(state_dict):
    """How many batches the batch norms have seen."""
    return {value.item() for name, value in state_dict.items() if name.endswith("num_batches_tracked")}


def check_close(found, expected, before, dtype):
    """Compare how far weights and statistics moved, over all of them.

    Kernels may add in another order, which float32 rounds at 6e-8 and bfloat16 at 4e-3; deep sums amplify it.
    """
    names = [name for name, value in expected.items() if value.is_floating_point()]
    moved, difference = (
        torch.cat([(one[name] - other[name]).double().flatten() for name in names]).norm()
        for one, other in ((expected, before), (found, expected))
    )
    assert moved > 0
    assert difference <= {torch.float32: 1e-3, torch.bfloat16: 5e-2}[dtype] * moved
    assert counts(found) == counts(expected)


@on_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [{}, {"grad_accum": 2}, {"channels_last": True}, {"distillation": "hard"}], ids=str)
def test_steps_with_graphs_are_those_without(tiny_digits, tmp_path, dtype, changes):
    if "distillation" in changes:
        teacher = localvit.create_model("localvit_nano_patch4_32", img_size=16, num_classes=3)
        save_checkpoint(teacher, tmp_path / "teacher.safetensors", class_names=["0", "1", "2"])
        arguments = SETTINGS["model_args"] | {"distilled": True}
        changes = changes | {"teacher": str(tmp_path / "teacher.safetensors"), "model_args": arguments}
    found = []
    for cuda_graph in (False, True):
        settings = SETTINGS | {"device": "cuda", "dtype": dtype, "cuda_graph": cuda_graph} | changes
        training = build(tiny_config(tiny_digits, tmp_path / str(cuda_graph), **settings))
        before = {name: value.clone() for name, value in training.state.model.state_dict().items()}
        assert counts(before) == {0}
        found.append((before, *after_steps(training, 3)))
    (before, losses, expected), (before_graphed, losses_graphed, graphed) = found
    assert all(torch.equal(before_graphed[name], value) for name, value in before.items())
    assert losses_graphed == pytest.approx(losses, rel=1e-4 if dtype == "float32" else 2e-2)
    check_close(graphed, expected, before, getattr(torch, dtype))
    assert counts(graphed) == {3 * changes.get("grad_accum", 1)}


@on_gpu
def test_capturing_leaves_the_random_generators(tiny_digits, tmp_path):
    config = tiny_config(tiny_digits, tmp_path, device="cuda", **SETTINGS)
    model = build(config).state.model
    torch.manual_seed(7)
    expected = torch.rand(3), torch.rand(3, device="cuda")
    torch.manual_seed(7)
    GraphedModel(model, torch.zeros(6, 3, 16, 16, device="cuda"), torch.float32)
    assert all(map(torch.equal, (torch.rand(3), torch.rand(3, device="cuda")), expected))


@on_gpu
def test_a_run_with_graphs_resumes(tiny_digits, tmp_path):
    """With and without graphs, after one of three steps."""
    settings = SETTINGS | {"device": "cuda", "dtype": "float32"}
    whole = build(tiny_config(tiny_digits, tmp_path / "whole", cuda_graph=True, **settings))
    before = {name: value.clone() for name, value in whole.state.model.state_dict().items()}
    _, expected = after_steps(whole, 3)
    first = build(tiny_config(tiny_digits, tmp_path / "first", cuda_graph=True, **settings))
    after_steps(first, 1)
    torch.save(first.state.to_entries(first.describe()), tmp_path / STATE)
    for cuda_graph in (True, False):
        config = tiny_config(tiny_digits, tmp_path / f"resumed {cuda_graph}", cuda_graph=cuda_graph, **settings)
        _, found = after_steps(build(config, resume=str(tmp_path / STATE)), 2)
        check_close(found, expected, before, torch.float32)
        assert counts(found) == {3}


@on_gpu
def test_a_model_that_reads_numbers_on_the_host_is_refused():
    class Reading(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * x.sum().item()

    with pytest.raises(ValueError, match=r"^cuda_graph: Reading cannot be captured .*--no-cuda-graph") as raised:
        GraphedModel(Reading(3, 3).cuda(), torch.zeros(2, 3, device="cuda"), torch.float32)
    assert "\n" not in str(raised.value)
