"""Training batches of images in memory, which are augmented many at once.

As with decoded images, all random numbers depend on the seed, the epoch and the image only, so that a batch does not
depend on the batch size, on the number of processes or on where a run was interrupted.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from localvit.data.batch_augmentation import BatchAugmentation
from localvit.data.cached_images import CachedImages
from localvit.data.image_randomness import combined
from localvit.data.training_batches import RandomImages, RandomPurpose, SampleKey, TrainingBatches, seed_sequence

T = TypeVar("T")
R = TypeVar("R")

_BYTES_AT_ONCE = {"cpu": 2**22, "cuda": 2**26}
"""Size of the float32 images that are augmented at once: as much as stays in the caches of a CPU; on a GPU enough that
launching kernels takes less time than running them."""


class RandomlyTransformedCache(RandomImages):
    """Images in memory, and their random transform."""

    images: CachedImages

    def __init__(
        self, images: CachedImages, augment: BatchAugmentation, seed: int, device: torch.device, *, erase_first: bool
    ) -> None:
        """
        Args:
            images: The images.
            augment: The random transform.
            seed: The run's seed.
            device: Where it is computed.
            erase_first: Whether the first repeat of an image may be erased.
        """
        self.images = images
        self.augment = augment
        self.seed = seed
        self.device = device
        self.erase_first = erase_first
        self._labels_N = torch.tensor(images.labels)

    def __call__(self, keys: Sequence[SampleKey]) -> tuple[Tensor, Tensor]:
        """The transformed images (B, C, H, W) and labels (B) of some samples of one epoch, on the device."""
        epoch_B, index_B, repeat_B = torch.tensor(keys).unbind(1)
        of_epoch = seed_sequence(self.seed, RandomPurpose.IMAGE, int(epoch_B[0])).generate_state(1, np.uint64)
        random_keys_B = combined(combined(int(of_epoch.astype(np.int64)[0]), index_B), repeat_B)
        pixels_BCHW = self.images.pixels_NCHW[index_B].to(self.device)
        images_BCHW = self.augment(pixels_BCHW, random_keys_B, None if self.erase_first else repeat_B > 0)
        return images_BCHW, self._labels_N[index_B].to(self.device)


class CachedBatches(TrainingBatches):
    """Training batches of images in memory, on the device of their random transform."""

    images: RandomlyTransformedCache

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        self.order.epoch = epoch
        keys = list(self.order)[first * self.batch_size : len(self) * self.batch_size]
        bytes_per_batch = self.batch_size * 4 * self.images.images.pixels_NCHW[0].numel()
        at_once = max(1, _BYTES_AT_ONCE[self.images.device.type] // bytes_per_batch) * self.batch_size
        parts = [keys[start : start + at_once] for start in range(0, len(keys), at_once)]
        prepared = map(self.prepare, parts) if self.images.device.type == "cpu" else ahead(self.prepare, parts)
        for images_BCHW, labels_B in prepared:
            yield from zip(images_BCHW.split(self.batch_size), labels_B.split(self.batch_size), strict=True)

    def prepare(self, keys: Sequence[SampleKey]) -> tuple[Tensor, Tensor]:
        return self.images(keys)


def ahead(function: Callable[[T], R], values: Sequence[T]) -> Iterator[R]:
    """`map`, with a thread that computes the next result while the caller uses the last one.

    A GPU then has its next images when it needs them.
    """
    with ThreadPoolExecutor(1) as executor:
        waiting = [executor.submit(function, value) for value in values[:1]]
        for number in range(len(values)):
            waiting += [executor.submit(function, value) for value in values[number + 1 : number + 2]]
            yield waiting.pop(0).result()
