"""What kernels read by its address: values one behind the other, on the device of the input."""

import copy

import pytest
import torch
from launches import needs_gpu, needs_triton

from localvit.locality import LocalityFeedForward
from localvit.ops.operands import operands


def test_values_one_behind_the_other():
    whole = torch.arange(35.0).view(5, 7)
    parts = [whole, whole[1:3], whole[:, 2], whole.t(), whole[2, 3]]
    found = operands(parts, -1)
    assert all(each.is_contiguous() for each in found)
    assert all(map(torch.equal, found, parts))
    assert found[0] is whole


def test_another_device_is_refused():
    with pytest.raises(RuntimeError, match=r"the input is on cuda:1 and a parameter of the locality module on cpu"):
        operands([torch.ones(3)], 1)


@needs_triton
@needs_gpu
def test_a_module_that_left_the_gpu_is_refused():
    """Also where its kernels have run before: their launches would read the address of another memory."""
    module = LocalityFeedForward(16, 16).to("cuda", torch.bfloat16).train()
    map_BCHW = torch.randn(2, 16, 3, 5, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):
        module(map_BCHW)
    with pytest.raises(RuntimeError, match="on the same device"):
        copy.deepcopy(module).cpu()(map_BCHW)
    assert module(map_BCHW).isfinite().all()
