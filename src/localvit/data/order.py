"""Images to train on: shuffled, augmented and batched so that nothing depends on who prepares them.

Every random draw is a function of where it is made (the seed, the epoch, the image or step), never of what was drawn
before; so any number of worker processes gives the same bits, and a run can begin again at any epoch.

Shapes: B images of a batch, C channels, H and W pixels.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from localvit.data.images import Images, PreparedImages, UnreadableImage
from localvit.data.workers import leave_quietly, loaded


class Draws(IntEnum):
    """What random numbers are for, so that no two purposes share any."""

    WEIGHTS = 0
    ORDER = 1
    IMAGE = 2
    STEP = 3


def seed_draws(seed: int, purpose: Draws, epoch: int = 0, place: int = 0, repeat: int = 0) -> None:
    """Start Python's, NumPy's and torch's generators (augmentations use all three) from these numbers alone."""
    words = _sequence(seed, purpose, epoch, place, repeat).generate_state(4, np.uint32)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    # Augmentation draws on the CPU alone, where asking for every accelerator would take a hundred times as long.
    seed_torch = torch.default_generator.manual_seed if purpose == Draws.IMAGE else torch.manual_seed
    seed_torch(int(words[2]) << 32 | int(words[3]))


def _sequence(seed: int, purpose: Draws, epoch: int, place: int, repeat: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=(purpose, epoch, place, repeat))


Place = tuple[int, int, int]
"""An image as it is trained on: epoch, index in the data set, and which of its repeats in the epoch, all from 0."""


class AugmentedImages(Dataset):
    """Images under a random transform: a `Place` holds (tensor (C, H, W), label), or why it cannot be read."""

    def __init__(
        self,
        images: Images,
        transform: Callable[[Image.Image], Tensor],
        seed: int,
        *,
        first_transform: Callable[[Image.Image], Tensor] | None = None,
    ) -> None:
        """`first_transform` is for the first of an image's repeats, where that differs."""
        self.images = images
        self.repeated = PreparedImages(images, transform)
        self.first = PreparedImages(images, first_transform or transform)
        self.seed = seed

    def __getitem__(self, place: Place) -> tuple[Tensor, int] | str:
        epoch, index, repeat = place
        seed_draws(self.seed, Draws.IMAGE, epoch, index, repeat)
        _, image = (self.repeated if repeat else self.first)[index]
        return image if isinstance(image, str) else (image, self.images.labels[index])


class ShuffledEpoch(Sampler[Place]):
    """The images that one process trains on in an epoch, in an order that follows from the seed and the epoch.

    Images are shuffled, each repeated in a row, and dealt out in turn to the processes. With one repeat each process
    gets its share of the data set. With more (repeated augmentation, arXiv 1902.05509) it gets no more images than
    that, of a number rounded down to a multiple of 256, so fewer different ones: the published rule, except that a
    data set of less than 256 images counts whole, where the published program would train on nothing.
    """

    def __init__(self, count: int, seed: int, *, repeats: int = 1, num_processes: int = 1, process: int = 0) -> None:
        self.count = count
        self.seed = seed
        self.repeats = repeats
        self.num_processes = num_processes
        self.process = process
        self.epoch = 0

    def __len__(self) -> int:
        rounded = self.count // 256 * 256 if self.repeats > 1 else 0
        return (rounded or self.count) // self.num_processes

    def __iter__(self) -> Iterator[Place]:
        order = np.random.default_rng(_sequence(self.seed, Draws.ORDER, self.epoch, 0, 0)).permutation(self.count)
        dealt = ((int(index), repeat) for index in order for repeat in range(self.repeats))
        mine = islice(dealt, self.process, None, self.num_processes)
        return ((self.epoch, index, repeat) for index, repeat in islice(mine, len(self)))


class TrainingBatches:
    """The full batches that a process trains on in each epoch: images (B, C, H, W) and labels (B), int64.

    Raises ValueError when the images do not fill one step of `batches_per_step` batches.
    """

    def __init__(
        self,
        images: AugmentedImages,
        *,
        batch_size: int,
        repeats: int,
        workers: int,
        pin_memory: bool,
        batches_per_step: int = 1,
        num_processes: int = 1,
        process: int = 0,
    ) -> None:
        self.batch_size = batch_size
        self.images = images
        self.order = ShuffledEpoch(
            len(images.images), images.seed, repeats=repeats, num_processes=num_processes, process=process
        )
        if len(self.order) < batch_size * batches_per_step:
            times = f" times grad_accum={batches_per_step}" if batches_per_step > 1 else ""
            raise ValueError(
                f"batch_size={batch_size}{times} is more than the {len(self.order)} images to train on"
                + (" in each process" if num_processes > 1 else "")
            )
        self._batches = _BatchesFrom(self.order, batch_size)
        self.loader: DataLoader = DataLoader(
            images,
            batch_sampler=self._batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_collate,
            pin_memory=pin_memory,
            worker_init_fn=leave_quietly,
        )

    def __len__(self) -> int:
        return len(self.order) // self.batch_size

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch, from number `first`.

        Raises UnreadableImage, or RuntimeError when a worker process dies.
        """
        self.order.epoch = epoch
        self._batches.first = first
        for batch in loaded(self.loader):
            yield _checked(batch)

    def batch(self, epoch: int, number: int) -> tuple[Tensor, Tensor, list[str]]:
        """One batch of `epoch`, made here and now, and the names of its images."""
        self.order.epoch = epoch
        places = list(islice(self.order, number * self.batch_size, (number + 1) * self.batch_size))
        images_BCHW, labels_B = _checked(_collate([self.images[place] for place in places]))
        return images_BCHW, labels_B, [self.images.images.name(index) for _, index, _ in places]


class _BatchesFrom(Sampler[list[Place]]):
    """The full batches of an order, from number `first`."""

    def __init__(self, order: ShuffledEpoch, batch_size: int) -> None:
        self.order = order
        self.batch_size = batch_size
        self.first = 0

    def __iter__(self) -> Iterator[list[Place]]:
        places = iter(self.order)
        for number in range(len(self.order) // self.batch_size):
            batch = list(islice(places, self.batch_size))
            if number >= self.first:
                yield batch


def _collate(items: Sequence[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor] | str:
    for item in items:
        if isinstance(item, str):
            return item
    images_BCHW, labels_B = default_collate(list(items))  # stacks into the memory that worker processes share
    return images_BCHW, labels_B


def _checked(batch: tuple[Tensor, Tensor] | str) -> tuple[Tensor, Tensor]:
    if isinstance(batch, str):
        raise UnreadableImage(batch)
    return batch
