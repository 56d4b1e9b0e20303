"""The Triton kernels, interpreted on the CPU, compiled for NVIDIA without one, and run on a GPU where there is one."""

import importlib
import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec

import launches
import pytest
import torch

from localvit.ops import operators, use_backend
from localvit.ops.activations import ACTIVATIONS

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")


def fresh_seed():
    return random.SystemRandom().randrange(2**31)


@pytest.fixture(scope="module")
def interpreted():
    """Runs a function in a process of its own, for Triton must know before its import that it is to interpret."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            try:
                pool.submit(launches.begin).result()
            except Exception as error:
                if "only 0-dimensional arrays can be converted" in str(error):
                    pytest.skip("this Triton's interpreter is older than this NumPy, and cannot run a loop on it")
                raise
        yield lambda function, *args: pool.submit(function, *args).result()


@needs_triton
@pytest.mark.parametrize("operator", launches.MODULES)
@pytest.mark.parametrize("grid", launches.GRIDS)
def test_interpreted(interpreted, operator, grid):
    interpreted(launches.compare, operator, fresh_seed(), launches.GRIDS[grid])


@needs_triton
def test_interpreted_variance_far_from_zero(interpreted):
    interpreted(launches.far_mean, fresh_seed())


@needs_triton
@pytest.mark.parametrize("operator", ["depthwise_act_pool", "norm_act_depthwise"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_interpreted_not_a_number(interpreted, operator, act):
    interpreted(launches.not_a_number, operator, act)


@needs_triton
@pytest.mark.parametrize("operator", launches.MODULES)
@pytest.mark.parametrize("kind", ["channels apart", "empty"])
def test_what_the_kernels_cannot_read_is_refused(operator, kind):
    launch = getattr(importlib.import_module(f"localvit.ops.triton.{launches.MODULES[operator]}"), operator)
    given = launches.arguments(launches.Draw(1), operator, (2, 3, 5, 7), torch.float32)
    spoiled = [
        each.contiguous(memory_format=torch.channels_last) if kind == "channels apart" else each[:0]
        for each in given
        if each.dim() == 4 and each.shape[0] == 2
    ]
    with pytest.raises(ValueError, match="contiguous channels"):
        launch(*spoiled, *given[len(spoiled) :], "hs")


POINTERS = {
    "depthwise_act_pool": ({"x", "y"}, {"weight", "bias", "sums"}),
    "norm_act_depthwise": ({"z", "out"}, {"scale", "shift", "weight", "counts", "means", "squares"}),
    "norm_act_depthwise_backward": (
        {"grad_out", "z", "grad_u"},
        {"scale", "shift", "weight", "center", "weight_sums", "sums"},
    ),
}


@needs_triton
@pytest.mark.parametrize("operator", launches.MODULES)
@pytest.mark.parametrize(
    ("capability", "dtype", "act", "width"),
    [(90, torch.bfloat16, "hs", 14), (80, torch.float16, "relu6", 1), (90, torch.float64, "hs", 7)],
)
def test_compiled_for_nvidia(operator, capability, dtype, act, width, tmp_path, monkeypatch):
    """The compiler accepts less than the interpreter, and needs no GPU. It specializes on ones and multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from localvit.ops.triton.tiles import LAUNCH, Tiles

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module = importlib.import_module(f"localvit.ops.triton.{launches.MODULES[operator]}")
    kernel = getattr(module, f"{operator}_kernel")
    tiles = Tiles(module.TILE_AREA, 2, 14, width, 48)
    constants = tiles.constants(torch.empty(0, dtype=dtype), act) | ({"width": 1} if width == 1 else {})
    maps, values = POINTERS[operator]
    short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}[dtype]
    signature = dict.fromkeys(kernel.arg_names, "i32")
    signature |= dict.fromkeys(maps, f"*{short}") | dict.fromkeys(values, "*fp64" if short == "fp64" else "*fp32")
    signature |= dict.fromkeys(constants, "constexpr")
    assert set(signature) == set(kernel.arg_names)
    aligned = [name for name in kernel.arg_names if name in {*maps, *values, "channels"} or "stride" in name]
    source = ASTSource(
        kernel,
        signature,
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=LAUNCH)
    assert compiled.asm["cubin"]


@needs_triton
@needs_gpu
@pytest.mark.parametrize("operator", launches.MODULES)
@pytest.mark.parametrize("ranges", [*launches.GRIDS.values(), launches.LARGE])
def test_on_a_gpu(operator, ranges):
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    launches.compare(operator, fresh_seed(), ranges, "cuda", dtypes)


@needs_triton
@needs_gpu
def test_variance_far_from_zero_on_a_gpu():
    launches.far_mean(fresh_seed(), "cuda")


@needs_triton
@needs_gpu
@pytest.mark.parametrize("operator", ["depthwise_act_pool", "norm_act_depthwise"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_not_a_number_on_a_gpu(operator, act):
    launches.not_a_number(operator, act, "cuda")


@needs_triton
@needs_gpu
@pytest.mark.parametrize("operator", launches.MODULES)
def test_kernels_run_on_a_gpu(operator):
    """Through the public functions, twice, bit-identical."""
    seed = fresh_seed()
    given = launches.arguments(launches.Draw(seed, "cuda"), operator, (32, 14, 14, 768), torch.bfloat16)
    in_torch = getattr(operators, operator)(*given, "hs")
    with use_backend("triton"):
        found, again = (getattr(operators, operator)(*given, "hs") for _ in range(2))
    wanted = launches.expected(operator, given, "hs")
    launches.check_close(found, wanted, torch.bfloat16, 32 * 14 * 14, f"{operator}, seed {seed}")
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True)), f"seed {seed}"
    assert not torch.equal(found[1], in_torch[1]), f"the reference ran, seed {seed}"  # it sums in another order
