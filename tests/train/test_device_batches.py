"""Batches on the device, the next of which is loaded while a step computes: each once, in order, errors in their place.

Sizes: 2 images of 3 channels and 5 x 7 pixels.
"""

import copy

import pytest
import torch
from tiny import STILL, same, tiny_config

from localvit.data.images import UnreadableImage
from localvit.inference.runner import InferenceOptions
from localvit.train.builder import build
from localvit.train.device_batches import DeviceBatches
from localvit.train.step import train_step

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
OPTIONS = InferenceOptions(device=torch.device("cpu"))


def numbered(count):
    return [(torch.full((2, 3, 5, 7), float(number)), torch.tensor([number, number])) for number in range(count)]


@pytest.mark.parametrize("fetches", [(0, 0, 0), (1, 0, 0), (2, 1, 0), (1, 1, 2)])
def test_each_batch_once_and_in_order(fetches):
    """However often the next batch is fetched before it is taken, and also at the end."""
    batches = DeviceBatches(iter(numbered(3)), OPTIONS)
    found = []
    for images_BCHW, labels_B in batches:
        assert (images_BCHW == labels_B[0]).all()
        for _ in range(fetches[len(found)]):
            batches.fetch()
        found.append(labels_B[0].item())
    assert found == [0, 1, 2]
    with pytest.raises(StopIteration):
        next(batches)


def test_the_memory_format_is_that_of_the_options():
    options = InferenceOptions(device=torch.device("cpu"), channels_last=True)
    images_BCHW, _ = next(DeviceBatches(iter(numbered(1)), options))
    assert images_BCHW.is_contiguous(memory_format=torch.channels_last)


def test_an_unreadable_image_of_the_next_step_leaves_this_one(tiny_digits, tmp_path):
    """The step before it is taken as if there was none; the next changes nothing."""
    after = []
    for number, readable in enumerate((True, False)):
        training = build(tiny_config(tiny_digits, tmp_path / str(number), batch_size=6, **STILL))
        training.state.begin_epoch()

        def some(training=training, readable=readable):
            yield next(training.batches.epoch(0))
            if not readable:
                raise UnreadableImage("b.png cannot be decoded")

        batches = DeviceBatches(some(), training.options)
        assert train_step(training, batches, stop=False).nonfinite is None
        after.append(copy.deepcopy(training.state.model.state_dict()))
    assert same(*after)
    with pytest.raises(UnreadableImage, match=r"b.png cannot be decoded"):
        train_step(training, batches, stop=False)
    assert same(training.state.model.state_dict(), after[1])


@on_gpu
def test_copies_beside_the_work_of_a_gpu():
    """Many batches of random values, each read after work that takes longer than its copy."""
    host = [(torch.randn(32, 3, 224, 224).pin_memory(), torch.arange(32).pin_memory()) for _ in range(4)]
    batches = DeviceBatches(iter(host * 8), InferenceOptions(device=torch.device("cuda")))
    product = torch.randn(4096, 4096, device="cuda")
    sums = []
    for images_BCHW, _ in batches:
        for _ in range(8):
            product = product @ product / 64
        sums.append(images_BCHW.double().sum())
        del images_BCHW  # its memory is free for the next batch
        batches.fetch()
    expected = [images_BCHW.double().sum().item() for images_BCHW, _ in host]
    # Sums in float64, in another order.
    assert [each.item() for each in sums] == pytest.approx(expected * 8, rel=1e-9)


@on_gpu
def test_batches_that_a_gpu_prepares():
    """Such as those of `--cache`: they may still be computed when they are fetched, also where their layout changes."""
    host = [torch.randn(32, 3, 224, 224) for _ in range(4)]
    product = torch.randn(4096, 4096, device="cuda")

    def prepared():
        nonlocal product
        for images_BCHW in host * 8:
            there_BCHW = images_BCHW.cuda()
            for _ in range(8):
                product = product @ product / 64
            yield there_BCHW + product[0, 0].clamp(0, 0).nan_to_num(), torch.zeros(32, device="cuda")

    options = InferenceOptions(device=torch.device("cuda"), channels_last=True)
    sums = [images_BCHW.double().sum() for images_BCHW, _ in DeviceBatches(prepared(), options)]
    expected = [images_BCHW.double().sum().item() for images_BCHW in host]
    # Sums in float64, in another order.
    assert [each.item() for each in sums] == pytest.approx(expected * 8, rel=1e-9)
