"""The order of the training images."""

import numpy as np
import pytest

from localvit.data.training_batches import EpochSampler


def order(count, epoch=3, seed=5, **arguments):
    sampler = EpochSampler(count, seed, **arguments)
    sampler.epoch = epoch
    keys = list(sampler)
    assert len(keys) == len(sampler)
    assert {key[0] for key in keys} <= {epoch}
    return [(index, repeat) for _, index, repeat in keys]


@pytest.mark.parametrize("count", [39, 255, 256, 257, 515, 1031])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_repeated_augmentation_follows_the_published_rule(count, processes):
    """Shuffle; repeat each 3 times in a row; distribute; keep floor(floor(N / 256) * 256 / processes) each."""
    shuffled = [index for index, _ in order(count)]
    rows = np.stack([np.repeat(shuffled, 3), np.tile([0, 1, 2], count)], axis=1)
    kept = (count // 256 * 256 if count >= 256 else count) // processes
    for process in range(processes):
        expected = [tuple(row) for row in rows[process::processes][:kept].tolist()]
        assert order(count, repeats=3, num_processes=processes, process=process) == expected


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_without_repeats_the_processes_share_the_data_set(processes):
    shares = [order(23, num_processes=processes, process=process) for process in range(processes)]
    assert {len(share) for share in shares} == {23 // processes}
    indices = [index for share in shares for index, _ in share]
    assert len(set(indices)) == len(indices) == 23 // processes * processes
    assert {repeat for share in shares for _, repeat in share} == {0}


def test_epochs_and_seeds_shuffle_differently():
    orders = [order(101, epoch=epoch, seed=seed) for epoch, seed in ((0, 0), (1, 0), (0, 1))]
    assert all(sorted(each) == [(index, 0) for index in range(101)] for each in orders)
    assert len({tuple(each) for each in orders}) == 3
