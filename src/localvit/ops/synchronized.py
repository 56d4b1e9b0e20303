"""Batch norms over several processes in the training step by kernels: what the processes exchange between its kernels.

These are the messages of torch's `SyncBatchNorm`: means, inverse deviations and the count in the forward pass, sums of
the gradient in the backward pass. So the results are also right if another process runs the layers, such as one with
hooks, or with an empty batch.

Shapes: E channels, R processes, T tiles of a map.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup


def group_of(norm: nn.Module) -> ProcessGroup | None:
    """The processes over which a batch norm computes its statistics; None for this one only."""
    if type(norm) is not nn.SyncBatchNorm or not dist.is_available() or not dist.is_initialized():
        return None
    group: Any = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def gather_statistics(
    counts_T: Tensor, means_TE: Tensor, squares_TE: Tensor, eps: float, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and squared deviations from it, for each process: (R,), (R, E), (R, E).

    Args:
        counts_T: the same for the tiles of this process; so are the other two.
        eps: of the batch norm.
        group: the processes.
    """
    count = counts_T.sum()
    mean_E = (counts_T[:, None] * means_TE).sum(0) / count
    # Chan's formula: the sum of squares minus the squared mean would cancel digits.
    squares_E = (squares_TE + counts_T[:, None] * (means_TE - mean_E).square()).sum(0)
    own = torch.cat((mean_E, (squares_E / count + eps).rsqrt(), count[None]))
    all_processes = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_processes, own, group)
    means_RE, inverse_deviations_RE, counts_R1 = torch.stack(all_processes).split((len(mean_E), len(mean_E), 1), 1)
    squares_RE = (inverse_deviations_RE.pow(-2) - eps).clamp(min=0) * counts_R1
    # An empty batch has the inverse deviation 0.
    return counts_R1.contiguous().flatten(), means_RE.contiguous(), squares_RE.where(counts_R1 > 0, 0.0)


def reduce_slopes(
    grad_weight_E: Tensor, grad_bias_E: Tensor, norm_4E: Tensor, count: Tensor, group: ProcessGroup
) -> Tensor:
    """The slopes (3, E) of `localvit.ops.triton.batch_norm.NormGradients`, given this process's other gradients.

    Args:
        norm_4E: vectors of the batch norm, over all processes.
        count: values of each channel in all processes.
    """
    _, inverse_deviation_E, scale_E, _ = norm_4E
    sums_2E = torch.stack((grad_bias_E, grad_weight_E / inverse_deviation_E))
    dist.all_reduce(sums_2E, group=group)
    total_E, product_E = sums_2E / count
    return torch.stack((scale_E, -scale_E * inverse_deviation_E.square() * product_E, -scale_E * total_E))
