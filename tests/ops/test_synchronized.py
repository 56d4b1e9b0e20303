"""Statistics over two processes, of which the other sends what torch's SyncBatchNorm sends, also for an empty batch.

Shapes: N values of a channel, E channels, T tiles.
"""

import pytest
import torch
import torch.distributed as dist

from localvit.ops.synchronized import gather_statistics, reduce_slopes
from processes import pool

CHANNELS, EPS = 5, 1e-3


def values(rank, count):
    generator = torch.Generator().manual_seed(rank)
    return 3 + torch.randn(count, CHANNELS, generator=generator, dtype=torch.float64)


def connect(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)


def by_kernels(store, grad_NE, values_NE):
    """Statistics and slopes of this package, whose tiles have 3 and 4 values."""
    connect(0, store)
    tiles = values_NE.float().split((3, 4))
    statistics = (
        torch.tensor([3.0, 4.0]),
        torch.stack([tile.mean(0) for tile in tiles]),
        torch.stack([(tile - tile.mean(0)).square().sum(0) for tile in tiles]),
    )
    gathered = gather_statistics(*statistics, EPS, dist.group.WORLD)
    count, mean, inverse_deviation = overall(gathered)
    norm_4E = torch.stack((mean, inverse_deviation, 2 * inverse_deviation, -mean)).float()
    grad_weight = (grad_NE * (values_NE - mean) * inverse_deviation).sum(0)
    slopes = reduce_slopes(grad_weight.float(), grad_NE.sum(0).float(), norm_4E, count, dist.group.WORLD)
    dist.destroy_process_group()
    return gathered, slopes


def by_layers(store, grad_NE, values_NE, mean_E):
    """The messages of torch's SyncBatchNorm."""
    connect(1, store)
    count = len(values_NE)
    message = torch.zeros(2 * CHANNELS + 1)
    if count:
        inverse_deviation = (values_NE.var(0, correction=0) + EPS).rsqrt()
        message = torch.cat((values_NE.mean(0), inverse_deviation, torch.tensor([count]))).float()
    dist.all_gather([torch.empty_like(message) for _ in range(2)], message)
    dist.all_reduce(torch.cat((grad_NE.sum(0), (grad_NE * (values_NE - mean_E)).sum(0))).float())
    dist.destroy_process_group()


def overall(gathered):
    """Count, mean and inverse deviation over the processes, by Chan's formula."""
    counts, means, squares = (each.double() for each in gathered)
    count = counts.sum()
    mean = (counts[:, None] * means).sum(0) / count
    variance = (squares + counts[:, None] * (means - mean).square()).sum(0) / count
    return count, mean, (variance + EPS).rsqrt()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize("others", [11, 0])
def test_the_other_process_runs_torchs_layers(others, tmp_path):
    own_NE, other_NE, grads_NE = values(0, 7), values(1, others), values(2, 7 + others) - 3
    all_NE = torch.cat((own_NE, other_NE)).requires_grad_()
    weight, bias = torch.full((CHANNELS,), 2.0, dtype=torch.float64), torch.zeros(CHANNELS, dtype=torch.float64)
    out = torch.nn.functional.batch_norm(all_NE, None, None, weight, bias, training=True, eps=EPS)
    (wanted_NE,) = torch.autograd.grad(out, all_NE, grads_NE)
    variance_E, mean_E = torch.var_mean(all_NE.detach(), 0, correction=0)

    store = tmp_path / "store"
    with pool(2) as both:
        own = both.submit(by_kernels, store, grads_NE[:7], own_NE)
        both.submit(by_layers, store, grads_NE[7:], other_NE, mean_E).result()
        gathered, (by_grad, by_value, constant) = own.result()
    count, mean, inverse_deviation = overall(gathered)
    assert count == 7 + others
    # float32: messages are rounded, and a variance comes from its inverse deviation.
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(mean, mean_E, **close)
    torch.testing.assert_close(inverse_deviation, (variance_E + EPS).rsqrt(), **close)
    grad_NE = by_grad * grads_NE[:7] + by_value * (own_NE - mean_E) + constant
    torch.testing.assert_close(grad_NE, wanted_NE[:7], **close)
