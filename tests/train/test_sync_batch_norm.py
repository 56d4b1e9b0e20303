"""The synchronized BatchNorm for CPUs, in a group of one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from localvit import LocalityFeedForward
from localvit.train.sync_batch_norm import synchronize_batch_norms

pytestmark = pytest.mark.filterwarnings("ignore:.*all_reduce is deprecated:FutureWarning")


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def made():
    torch.manual_seed(0)
    return LocalityFeedForward(6, 6, reduction=2).double().train()


@pytest.mark.parametrize("batch", [0, 1])
def test_a_single_value_per_channel_changes_nothing(group, batch):
    module = synchronize_batch_norms(made(), torch.device("cpu"))
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module(torch.randn(batch, 6, 1, 1, dtype=torch.float64))
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


def test_gradient_checkpointing_counts_each_batch_once(group):
    plain = made()
    module = synchronize_batch_norms(copy.deepcopy(plain), torch.device("cpu"))
    x = torch.randn(3, 6, 5, 7, dtype=torch.float64)
    plain(x)
    checkpoint(module, x.requires_grad_(), use_reentrant=False).sum().backward()
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)


def test_norms_without_running_statistics(group):
    plain = nn.BatchNorm2d(6, track_running_stats=False, dtype=torch.float64)
    module = synchronize_batch_norms(nn.Sequential(copy.deepcopy(plain)), torch.device("cpu"))
    x = torch.randn(3, 6, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(module(x), plain(x), rtol=1e-12, atol=1e-12)
