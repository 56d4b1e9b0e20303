"""A fused locality module by its four kernels: expansion, depth-wise convolution, gate, projection.

Shapes: B batch, N tokens (prefix tokens first), C channels outside, H and W the grid, S = H * W, E hidden channels.
"""

from collections.abc import Sequence

from torch import Tensor

from localvit.ops.kernel_gates import KNOWN
from localvit.ops.reference import check_tokens, split
from localvit.ops.triton.inference import depthwise_act_pool
from localvit.ops.triton.pointwise import pointwise


def feed_forward(
    x_BNC: Tensor,
    height: int,
    width: int,
    num_prefix_tokens: int,
    parameters: Sequence[Tensor],
    act1: str,
    act2: str,
    gate: str | None,
) -> Tensor:
    """As `localvit.ops.operators.feed_forward`, for tokens in bfloat16 or float16."""
    if x_BNC.stride(2) != 1:
        x_BNC = x_BNC.contiguous()
    check_tokens(x_BNC.shape, height, width, num_prefix_tokens)
    (expansion, bias1_E, depthwise, bias2_E, projection, bias3_C), gate_parameters = split(parameters)
    x_BSE = pointwise(x_BNC, expansion, bias1_E, act1, skipped=num_prefix_tokens)
    x_BHWE, sum_BE = depthwise_act_pool(x_BSE.view(x_BSE.shape[0], height, width, -1), depthwise, bias2_E, act2)
    gate_BE = None if gate is None else KNOWN[gate].factors(sum_BE, height * width, gate_parameters)
    return pointwise(x_BHWE.flatten(1, 2), projection, bias3_C, None, gate_BE, num_prefix_tokens=num_prefix_tokens)
