"""Every kernel compiled for NVIDIA's architectures, which needs no GPU: what is launched, and what it takes of a chip.

The launches of localvit_tiny are recorded rather than run, so that a kernel is compiled for the sizes, dtypes and tiles
that it runs with.
"""

import re
import sys
from importlib.util import find_spec

import pytest
import torch
from launches import little_shared_memory

from localvit.locality import LocalityFeedForward
from localvit.ops.dispatch import LEAST_SHARED_MEMORY

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or sys.platform != "linux", reason="Triton is not installed"
)

BATCH, GRID, CHANNELS, HIDDEN = 2, (14, 14), 192, 768
LITTLE = (86, 89, 120)
"""Compute capabilities of GPUs that take the tiles for little shared memory."""
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024} | dict.fromkeys(LITTLE, 99 * 1024)
"""Shared memory of a block, from NVIDIA's table of compute capabilities."""
REGISTERS = 65536
"""Of a multiprocessor, for all threads of a block."""
SPILLED_BYTES = {
    **{("normalized_gradient", 90): 192, ("normalized_gradient", 120): 64},
    **{("pointwise 3", 100): 128, ("pointwise 4", 80): 384},
}
"""Of a thread: what the compiler may keep in local memory, where that is more than `FEW_BYTES`."""
FEW_BYTES = 32


def training():
    """One step of the locality module under autocast: its kernels in their order."""
    from localvit.ops.kernel_training import feed_forward
    from localvit.ops.stages import stages_of

    module = LocalityFeedForward(CHANNELS, CHANNELS, reduction=CHANNELS).train()
    x = torch.randn(BATCH, CHANNELS, *GRID, requires_grad=True)
    feed_forward(stages_of(module.conv), x, torch.bfloat16).float().sum().backward()


def inference():
    from localvit.ops.triton import inference, pointwise, squeeze_excite

    def values(*shape):
        return torch.zeros(shape, dtype=torch.bfloat16)

    tokens = values(BATCH, 1 + GRID[0] * GRID[1], CHANNELS)
    pointwise.pointwise(tokens, values(HIDDEN, CHANNELS), values(HIDDEN), "hs", None, 1)
    hidden = values(BATCH, *GRID, HIDDEN)
    inference.depthwise_act_pool(hidden, values(HIDDEN, 3, 3), values(HIDDEN), "hs")
    layers = values(4, HIDDEN), values(4), values(HIDDEN, 4), values(HIDDEN)
    gate = squeeze_excite.squeeze_excite(torch.zeros(BATCH, HIDDEN), 196, *layers)
    rows, weight, bias = hidden.flatten(1, 2), values(CHANNELS, HIDDEN), values(CHANNELS)
    pointwise.pointwise(rows, weight, bias, None, gate, 0, 1)


def projection_of_few_positions():
    """In training: tiles have rows of three images, so that a factor of the gate is read for each value."""
    from localvit.ops.triton.pointwise import normalized_pointwise

    rows, weight = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((5, 49, HIDDEN), (CHANNELS, HIDDEN)))
    normalized_pointwise(rows, weight, torch.zeros(4, HIDDEN), "hs", torch.zeros(5, HIDDEN))


@pytest.fixture(scope="module")
def launches():
    """Those of a GPU with enough shared memory for all tiles."""
    return recorded_launches()


@pytest.fixture(scope="module")
def launches_in_little_memory():
    with little_shared_memory():
        return recorded_launches()


def recorded_launches():
    """The kernel, arguments, constants and options of each launch, by a name of its own."""
    from localvit.ops.triton.launch import Launch

    recorded = {}

    def record(launch, *tensors):
        name = launch.kernel.__name__.removesuffix("_kernel")
        number = sum(other.split(" ")[0] == name for other in recorded)
        arguments = *tensors, *launch.numbers
        recorded[f"{name} {number}" if number else name] = launch.kernel, arguments, launch.constants, launch.options

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launch, "__call__", record)
        inference()
        training()
        projection_of_few_positions()
    return recorded


IN_ORDER = [
    *("pointwise", "depthwise_act_pool", "squeeze_excite", "pointwise 1"),
    *("pointwise 2", "norm_vectors", "norm_act_depthwise", "norm_vectors 1", "channel_means", "squeeze_excite 1"),
    *("pointwise 3", "projection_gradients", "squeeze_excite_backward", "normalized_gradient", "norm_gradients"),
    *("norm_act_depthwise_backward", "norm_gradients 1", "expansion_gradients"),
    "pointwise 4",
]
"""In inference: expansion, depth-wise convolution, gate, projection. In training: forward pass, backward pass; and the
projection of few positions.
"""


def test_launches(launches):
    assert list(launches) == IN_ORDER


AGAIN = {"norm_vectors 1", "norm_gradients 1"}
"""Compiled before, with the same sizes."""


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        *((name, 90) for name in IN_ORDER if name not in AGAIN),
        *((name, capability) for name in ("pointwise 3", "norm_act_depthwise_backward") for capability in (80, 100)),
        *((name, capability) for name in ("pointwise 4", "expansion_gradients") for capability in LITTLE),
        *(("pointwise 4", 80), ("pointwise 3", 120), ("normalized_gradient", 120)),
    ],
)
def test_compiled_for_nvidia(launches, launches_in_little_memory, name, capability, tmp_path, monkeypatch):
    """The compiler accepts less than the interpreter."""
    import triton
    from compiled_kernels import resources, source_of
    from triton.backends.compiler import GPUTarget

    from localvit.ops.triton.rows import LARGE_SHARED_MEMORY

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, arguments, constants, options = (launches_in_little_memory if capability in LITTLE else launches)[name]
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source_of(kernel, arguments, constants), target=target, options=options.given)
    used = resources(compiled.asm["cubin"], tmp_path)
    assert used["STACK"] + used["LOCAL"] <= SPILLED_BYTES.get((name, capability), FEW_BYTES), used
    assert used["REG"] * 32 * options.num_warps <= REGISTERS, used
    assert compiled.metadata.shared <= SHARED_BYTES[capability]
    # What the package asks of a GPU is enough for every kernel, and no more than the largest needs.
    if capability == 80 or capability in LITTLE:
        asked = LARGE_SHARED_MEMORY if capability == 80 else LEAST_SHARED_MEMORY
        assert compiled.metadata.shared <= asked
        assert name != "pointwise 4" or compiled.metadata.shared > asked - 1024


@pytest.mark.parametrize("name", ["pointwise 1", "pointwise 3", "expansion_gradients"])
@pytest.mark.parametrize("waits", [False, True])
def test_waits_for_products_of_computed_operands(launches, name, waits, tmp_path, monkeypatch):
    """On compute capability 9 they read their left operand from registers, which the next one may overwrite."""
    import triton
    from compiled_kernels import source_of
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, arguments, constants, options = launches[name]
    constants = list(constants)
    position = kernel.arg_names.index("WAIT") - len(arguments)
    assert constants[position] is False  # There is no GPU here.
    constants[position] = waits
    source = source_of(kernel, arguments, constants)
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options._asdict()).asm["ttgir"]
    assert re.search("warp_group_dot .*: tensor<.*#ttg.dot_op", text)
    in_the_loop = text[text.index("scf.for") : text.index("scf.yield")]
    pending = {int(number) for number in re.findall(r"warp_group_dot_wait .*pendings = (\d+)", in_the_loop)}
    assert (pending == {0}) == waits
