"""The patch grid is known in each forward: by thread, nested, after an error, in backward, copied and compiled.

The expected values are what the same model computes with nothing else going on, and must be reproduced exactly.
"""

import copy
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import localvit
from localvit.surgery.localize import locality_modules

WIDE, TALL = (48, 80), (80, 48)
"""Grids of 3 x 5 and 5 x 3 patches: one number of tokens, so that only the shape tells them apart."""


def randomized(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in locality_modules(model).values():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / 5)
    return model.eval()


def vit(**kwargs):
    torch.manual_seed(0)
    defaults = {"img_size": WIDE, "depth": 3, "num_classes": 7, "dynamic_img_size": True}
    return randomized(localvit.localize(timm.create_model("test_vit", **defaults | kwargs)))


def image(size=WIDE, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(sum(size) + size[0]))


def in_thread(call, *args):
    """Call a function in a thread that has run nothing before."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(call, *args).result()


SMALL = {"img_size": 64, "num_classes": 7}
MODELS = {
    "vit": (vit, WIDE, TALL),
    "localvit": (partial(localvit.create_model, "localvit_nano_patch4_32", depth=2), (32, 32), (16, 64)),
    "pvt": (
        partial(
            localvit.create_model, "localvit_pvt_tiny", **SMALL, embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4)
        ),
        (64, 128),
        (128, 64),
    ),
    "tnt": (
        partial(localvit.create_model, "localvit_tnt_tiny", **SMALL, depth=2, embed_dim=48, num_heads_outer=3),
        (64, 128),
        (128, 64),
    ),
    "t2t": (
        partial(localvit.create_model, "localvit_t2t_7", **SMALL, depth=2, embed_dim=48, reduction=4),
        (64, 128),
        (128, 64),
    ),
    "swin": (
        partial(localvit.create_model, "localvit_swin_tiny", **SMALL, embed_dim=24, depths=(2, 1, 1, 1), window_size=4),
        (64, 128),
        (128, 64),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_two_threads_run_one_model_on_two_shapes(name):
    make, *sizes = MODELS[name]
    model, results = make().eval(), {size: [] for size in sizes}
    with torch.no_grad():
        expected = {size: model(image(size, 1)) for size in sizes}

    def run(size):
        with torch.no_grad():
            for _ in range(150 if name == "vit" else 15):
                results[size].append(torch.equal(model(image(size, 1)), expected[size]))

    threads = [threading.Thread(target=run, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for size in sizes:
        assert results[size] == [True] * (150 if name == "vit" else 15)


def replicas_of(model, count):
    """What `nn.DataParallel` makes of a model, by its own method, on one device: parameters stay shared."""
    replicas = []
    for _ in range(count):
        twins = {id(module): module._replicate_for_data_parallel() for module in model.modules()}
        for module in model.modules():
            twin = twins[id(module)]
            for name, child in module._modules.items():
                twin._modules[name] = None if child is None else twins[id(child)]
            for name, parameter in module._parameters.items():
                # A tensor of its own, so that the test sees whose weights are used.
                twin._parameters[name] = None if parameter is None else parameter.detach().clone()
        replicas.append(twins[id(model)])
    return replicas


@pytest.mark.parametrize("name", ["vit", "swin", "pvt"])
def test_data_parallel_replicas_have_grids_and_weights_of_their_own(name):
    make, *sizes = MODELS[name]
    model = make().eval()
    with torch.no_grad():
        expected = [model(image(size, 1)) for size in sizes]
        replicas = replicas_of(model, 2)
        for parameter in model.parameters():
            parameter.fill_(torch.nan)  # so that what uses the original's weights shows

    def run(index):
        with torch.no_grad():
            return [torch.equal(replicas[index](image(sizes[index], 1)), expected[index]) for _ in range(15)]

    with ThreadPoolExecutor(2) as executor:
        assert list(executor.map(run, range(2))) == [[True] * 15] * 2


@pytest.mark.parametrize("place", ["patch_embed", "norm_pre", "blocks.1", "blocks.1.attn", "blocks.1.mlp.fc1"])
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("method", ["__call__", "forward_features"])
def test_a_hook_runs_the_model_on_another_size(place, moment, method):
    """A nested call of the model has its own grid. That of another method raises, since both grids have 15 patches."""
    model = vit()
    nested = []

    def run_nested(module, *args):
        if not nested:
            nested.append(None)
            nested[0] = getattr(model, method)(image(TALL))

    with torch.no_grad():
        expected, expected_nested = model(image(WIDE)), model(image(TALL))
        module = model.get_submodule(place)
        (module.register_forward_pre_hook if moment == "before" else module.register_forward_hook)(run_nested)
        if method == "__call__":
            assert torch.equal(model(image(WIDE)), expected)
            assert torch.equal(nested[0], expected_nested)
        else:
            with pytest.raises(
                ValueError, match=r"15 image tokens .* fill several grids .*(3 x 5.*5 x 3|5 x 3.*3 x 5)"
            ):
                model(image(WIDE))


def test_nested_features_of_another_number_of_patches_are_distinguished():
    model = vit()
    with torch.no_grad():
        expected = model(image(WIDE))
        ran = []

        def run_nested(module, args):
            if not ran:
                ran.append(None)
                model.forward_features(image((32, 48)))

        model.blocks[1].register_forward_pre_hook(run_nested)
        assert torch.equal(model(image(WIDE)), expected)


def test_a_nested_forward_within_forward_features():
    model = vit()
    with torch.no_grad():
        expected = model.forward_features(image(WIDE))
        handle = None

        def run_nested(module, args):
            handle.remove()
            model(image(TALL))

        handle = model.blocks[1].register_forward_pre_hook(run_nested)
        assert torch.equal(model.forward_features(image(WIDE)), expected)


def test_a_forward_that_raises_leaves_nothing_behind():
    model = vit()
    with torch.no_grad():
        expected = model(image(WIDE))
        for error in (ValueError, KeyboardInterrupt):

            def fail(module, args, error=error):
                raise error("stop")

            handle = model.blocks[1].register_forward_pre_hook(fail)
            with pytest.raises(error, match="stop"):
                model(image(TALL))
            handle.remove()
            assert torch.equal(model(image(WIDE)), expected)


def test_a_block_in_a_thread_that_ran_no_forward_has_no_grid():
    model = vit()
    model(image(WIDE))
    tokens = torch.zeros(2, 1 + 15, model.embed_dim)
    with pytest.raises(ValueError, match="no patch grid is recorded for 15 image tokens"):
        in_thread(model.blocks[0], tokens)


def test_copies_and_files_record_for_themselves():
    model = vit()
    with torch.no_grad():
        expected = model(image(WIDE))
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for twin in (
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(file, weights_only=False),
        ):
            model(image(TALL))
            assert torch.equal(twin(image(WIDE)), expected)
            assert torch.equal(in_thread(twin, image(WIDE)).detach(), expected)


# Gradient checkpointing: blocks run again in the backward pass, on CUDA in a thread of autograd's own.


def checkpointed_by_block(model, use_reentrant):
    """The features of a model whose blocks are checkpointed one by one, as timm does it."""

    def run(images):
        x = model._pos_embed(model.patch_embed(images))
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=use_reentrant)
        return model.norm(x)

    return run


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def loss_of(output):
    return (output**3).sum()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("thread", [False, True], ids=["same thread", "another thread"])
@pytest.mark.parametrize("order", [[0, 1], [1, 0]], ids=str)
def test_checkpointed_blocks_get_the_grid_of_their_own_forward(use_reentrant, thread, order):
    """Two forwards on transposed grids before either backward."""
    model = vit().double()
    images = [image(WIDE).double(), image(TALL).double()]
    expected = []
    for each in images:
        model.zero_grad()
        loss_of(model.forward_features(each)).backward()
        expected.append(gradients(model))
    run = checkpointed_by_block(model, use_reentrant)
    losses = [loss_of(run(each)) for each in images]
    for index in order:
        model.zero_grad()
        in_thread(losses[index].backward) if thread else losses[index].backward()
        found = gradients(model)
        assert found.keys() >= {f"blocks.{i}.mlp.fc2.locality.conv.weight" for i in range(3)}
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[index][name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_model_is_recomputed_whole(use_reentrant):
    model = vit().double()
    expected = []
    for size in (WIDE, TALL):
        model.zero_grad()
        loss_of(model(image(size).double())).backward()
        expected.append(gradients(model))
    images = [image(size).double().requires_grad_() for size in (WIDE, TALL)]
    losses = [loss_of(checkpoint(model, each, use_reentrant=use_reentrant)) for each in images]
    for loss, wanted in zip(losses, expected, strict=True):
        model.zero_grad()
        in_thread(loss.backward)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-12, atol=1e-12)


def checkpointed_by_mlp(model):
    """Features of a model with a part of each block checkpointed, whose input is not the input of a block."""

    def run(images):
        x = model._pos_embed(model.patch_embed(images))
        for block in model.blocks:
            x = x + block.attn(block.norm1(x))
            x = x + checkpoint(block.mlp, block.norm2(x), use_reentrant=False)
        return x

    return run


def test_where_two_grids_fit_a_recomputation_raises():
    model = vit()
    run = checkpointed_by_mlp(model)
    loss = loss_of(run(image(WIDE)))
    in_thread(loss.backward, None, True)  # only one grid was ever recorded
    loss = loss_of(run(image(WIDE)))
    run(image((32, 48)))
    in_thread(loss.backward, None, True)  # the other has another number of patches
    run(image(TALL))
    loss = loss_of(run(image(WIDE)))
    with pytest.raises(ValueError, match=r"15 image tokens .*3 x 5.*5 x 3"):
        in_thread(loss.backward)


# Compiled


def test_threads_run_one_compiled_model():
    torch._dynamo.reset()
    model = vit()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    check_threads(model, compiled)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_threads_run_one_model_of_compiled_blocks(fullgraph):
    torch._dynamo.reset()
    model = vit()
    regional = copy.deepcopy(model)
    for block in regional.blocks:
        block.compile(fullgraph=fullgraph, backend="eager", dynamic=False)
    check_threads(model, regional)


def check_threads(model, other):
    with torch.no_grad():
        expected = {size: model(image(size)) for size in (WIDE, TALL)}
        for size in (WIDE, TALL):
            assert torch.equal(other(image(size)), expected[size])

        def run(size):
            with torch.no_grad():
                return [torch.equal(other(image(size)), expected[size]) for _ in range(20)]

        with ThreadPoolExecutor(2) as executor:
            for same in executor.map(run, (WIDE, TALL)):
                assert all(same)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_blocks_are_checkpointed(fullgraph):
    """The backward pass runs in the same thread, and in another one; each is the first after the compilation once."""
    torch._dynamo.reset()
    model = vit().double()
    model.zero_grad()
    loss_of(model(image(WIDE).double())).backward()
    expected = gradients(model)
    for block in model.blocks:
        block.compile(fullgraph=fullgraph, backend="aot_eager", dynamic=False)
    model.set_grad_checkpointing(True)
    for thread in (fullgraph, not fullgraph):
        model.zero_grad()
        loss = loss_of(model(image(WIDE).double()))
        in_thread(loss.backward) if thread else loss.backward()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
def test_exported(strict):
    model = vit()
    with torch.no_grad():
        program = torch.export.export(model, (image(WIDE),), strict=strict).module()
        model(image(TALL))
        assert torch.equal(program(image(WIDE)), model(image(WIDE)))


class Custom(nn.Module):
    """A module that is not a supported host."""

    def __init__(self):
        super().__init__()
        self.patches, self.mlp = nn.Conv2d(3, 8, 16, 16), nn.Linear(8, 8)

    def forward(self, images):
        return self.mlp(self.patches(images).flatten(2).transpose(1, 2))


def test_threads_run_a_custom_module():
    torch.manual_seed(0)
    model = localvit.localize(Custom(), grid="patches", filter_fn=["mlp"])
    check_threads(randomized(model), model)
