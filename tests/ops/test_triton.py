"""The Triton kernels against float64, interpreted on the CPU, and run on a GPU where there is one."""

import random

import backward_kernels
import forward_kernels
import launches
import pytest
import torch
from launches import needs_gpu, needs_triton

DEPTHWISE = forward_kernels.DEPTHWISE | backward_kernels.DEPTHWISE
CASES = forward_kernels.CASES | backward_kernels.CASES | DEPTHWISE


def compare(case, dtypes, device="cpu", large=False):
    """Run a case on fresh random tensors; a message of failure says which."""
    seed = random.SystemRandom().randrange(2**31)
    for dtype in dtypes:
        try:
            case(launches.Draw(seed, device), dtype, large=large)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {dtype}: {error}") from error


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_interpreted(interpreted, name):
    """In float16 and not bfloat16, whose products the interpreter cannot compute."""
    dtypes = (torch.float64, torch.bfloat16) if name in DEPTHWISE else (torch.float32, torch.float16)
    interpreted(compare, CASES[name], dtypes)


@needs_triton
@pytest.mark.parametrize("name", forward_kernels.NOT_A_NUMBER)
def test_interpreted_not_a_number(interpreted, name):
    interpreted(compare, forward_kernels.NOT_A_NUMBER[name], [torch.float32])


@needs_triton
@pytest.mark.parametrize("kind", ["channels apart", "empty"])
def test_what_the_kernels_cannot_read_is_refused(kind):
    from localvit.ops.triton.inference import depthwise_act_pool
    from localvit.ops.triton.training import norm_act_depthwise
    from localvit.ops.triton.training_backward import norm_act_depthwise_backward

    good, weight, vectors = torch.randn(2, 3, 5, 7), torch.randn(7, 3, 3), torch.randn(4, 7)
    bad = good.contiguous(memory_format=torch.channels_last) if kind == "channels apart" else good[:0]
    refused = [
        (depthwise_act_pool, bad, weight, vectors[0], "hs"),
        (norm_act_depthwise, bad, vectors, weight, "hs"),
        (norm_act_depthwise_backward, good, good, vectors, vectors[:3], bad, vectors, weight, "hs"),
        (norm_act_depthwise_backward, bad, good, vectors, vectors[:3], good, vectors, weight, "hs"),
    ]
    for function, *given in refused:
        with pytest.raises(ValueError, match="contiguous channels"):
            function(*given)


@needs_triton
@needs_gpu
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", CASES | forward_kernels.NOT_A_NUMBER)
def test_on_a_gpu(name, large):
    """In one dtype each, since sizes are compiled in: every case takes seconds for the compiler."""
    dtype = torch.bfloat16 if large else torch.float16
    compare((CASES | forward_kernels.NOT_A_NUMBER)[name], [dtype], "cuda", large)
