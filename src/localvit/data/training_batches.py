"""Training batches: shuffled and augmented images that do not depend on the number of worker processes.

All random numbers are seeded by where they are used (seed, epoch, image or step), never by earlier random numbers. Any
number of worker processes therefore gives bit-exact batches, and a run can resume at any step.

Shapes: B batch size, C channels, H and W height and width in pixels.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from localvit.data.images import Images, PreparedImages, UnreadableImage
from localvit.data.workers import init_worker, iterate_batches


class RandomPurpose(IntEnum):
    """What random numbers are used for; each purpose has a stream of its own."""

    WEIGHTS = 0
    ORDER = 1
    IMAGE = 2
    STEP = 3


def seed_random(seed: int, purpose: RandomPurpose, epoch: int = 0, index: int = 0, repeat: int = 0) -> None:
    """Seed the generators of Python, NumPy and torch, which augmentations use, from these numbers only.

    Args:
        seed: The run's seed.
        purpose: What the random numbers are for.
        epoch: Epoch, from 0.
        index: Image or step within the epoch.
        repeat: Repeat of the image within the epoch, or the process.
    """
    words = seed_sequence(seed, purpose, epoch, index, repeat).generate_state(4, np.uint32)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    # Augmentation uses the CPU generator only; seeding every accelerator would take a hundred times as long.
    seed_torch = torch.default_generator.manual_seed if purpose == RandomPurpose.IMAGE else torch.manual_seed
    seed_torch(int(words[2]) << 32 | int(words[3]))


def seed_sequence(
    seed: int, purpose: RandomPurpose, epoch: int = 0, index: int = 0, repeat: int = 0
) -> np.random.SeedSequence:
    """The seeds of a use of random numbers; the arguments are those of `seed_random`."""
    return np.random.SeedSequence(seed, spawn_key=(purpose, epoch, index, repeat))


SampleKey = tuple[int, int, int]
"""A training sample: epoch, index in the data set, and repeat within the epoch, all from 0."""


class RandomImages:
    """Images to which a random transform is applied."""

    images: Images
    """The images without it."""
    seed: int
    """The run's seed."""


class AugmentedImages(RandomImages, Dataset):
    """Randomly transformed images. Item `SampleKey` is (tensor (C, H, W), label), or the reason it is unreadable."""

    def __init__(
        self,
        images: Images,
        transform: Callable[[Image.Image], Tensor],
        seed: int,
        *,
        first_transform: Callable[[Image.Image], Tensor] | None = None,
    ) -> None:
        """
        Args:
            images: The images to train on.
            transform: Random transform to a tensor.
            seed: The run's seed.
            first_transform: Transform for the first repeat of each image, if it differs.
        """
        self.images = images
        self.repeated = PreparedImages(images, transform)
        self.first = PreparedImages(images, first_transform or transform)
        self.seed = seed

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, int] | str:
        epoch, index, repeat = key
        seed_random(self.seed, RandomPurpose.IMAGE, epoch, index, repeat)
        _, image = (self.repeated if repeat else self.first)[index]
        return image if isinstance(image, str) else (image, self.images.labels[index])


class EpochSampler(Sampler[SampleKey]):
    """The samples that one process trains on in an epoch. Their order depends on the seed and the epoch only.

    Images are shuffled, each is repeated consecutively, and the samples are distributed to the processes in turn.
    Without repeats, each process gets its share of the data set. With repeats (repeated augmentation, arXiv
    1902.05509), each process gets as many samples as without, after rounding the data set's size down to a multiple of
    256, so it sees fewer distinct images. This is the published rule, except that a data set of less than 256 images is
    not rounded; the published program would train on nothing.
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

    def __iter__(self) -> Iterator[SampleKey]:
        generator = np.random.default_rng(seed_sequence(self.seed, RandomPurpose.ORDER, self.epoch))
        order = generator.permutation(self.count)
        samples = ((int(index), repeat) for index in order for repeat in range(self.repeats))
        own_samples = islice(samples, self.process, None, self.num_processes)
        return ((self.epoch, index, repeat) for index, repeat in islice(own_samples, len(self)))


class TrainingBatches(ABC):
    """The full batches that one process trains on in each epoch: images (B, C, H, W) and labels (B), int64."""

    def __init__(
        self,
        images: RandomImages,
        *,
        batch_size: int,
        repeats: int,
        batches_per_step: int = 1,
        num_processes: int = 1,
        process: int = 0,
    ) -> None:
        """
        Args:
            images: The images of all processes.
            batch_size: Images per batch and process.
            repeats: How many times each image is used (repeated augmentation).
            batches_per_step: Batches whose gradients are accumulated in one step.
            num_processes: Number of training processes.
            process: Rank of this one.

        Raises:
            ValueError: The images do not fill one step.
        """
        self.batch_size = batch_size
        self.images = images
        self.order = EpochSampler(
            len(images.images), images.seed, repeats=repeats, num_processes=num_processes, process=process
        )
        if len(self.order) < batch_size * batches_per_step:
            times = f" times grad_accum={batches_per_step}" if batches_per_step > 1 else ""
            raise ValueError(
                f"batch_size={batch_size}{times} is more than the {len(self.order)} images to train on"
                + (" in each process" if num_processes > 1 else "")
                + ": use a smaller batch, or add images"
            )

    def __len__(self) -> int:
        return len(self.order) // self.batch_size

    @abstractmethod
    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the batches of an epoch, starting at batch `first`."""

    @abstractmethod
    def prepare(self, keys: Sequence[SampleKey]) -> tuple[Tensor, Tensor]:
        """Prepare some samples in this process; returns their images and labels. Raises UnreadableImage."""

    def batch(self, epoch: int, number: int) -> tuple[Tensor, Tensor, list[str]]:
        """Prepare one batch of an epoch in this process; returns its images, labels and image names."""
        self.order.epoch = epoch
        keys = list(islice(self.order, number * self.batch_size, (number + 1) * self.batch_size))
        return *self.prepare(keys), [self.images.images.name(index) for _, index, _ in keys]


class LoadedBatches(TrainingBatches):
    """Training batches whose images are decoded whenever they are used, by worker processes."""

    images: AugmentedImages

    def __init__(
        self, images: AugmentedImages, *, batch_size: int, workers: int, pin_memory: bool, **order: int
    ) -> None:
        """
        Args:
            images: The images of all processes.
            batch_size: Images per batch and process.
            workers: Number of worker processes; 0 decodes in this process.
            pin_memory: Whether to load into pinned memory, for a CUDA device.
            order: The other arguments of `TrainingBatches`.

        Raises:
            ValueError: The images do not fill one step.
        """
        super().__init__(images, batch_size=batch_size, **order)
        self._batches = _BatchSampler(self.order, batch_size)
        self.loader: DataLoader = DataLoader(
            images,
            batch_sampler=self._batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_collate,
            pin_memory=pin_memory,
            worker_init_fn=init_worker,
        )

    def epoch(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the batches of an epoch, starting at batch `first`.

        Raises:
            UnreadableImage: An image cannot be decoded.
            RuntimeError: A worker process died.
        """
        self.order.epoch = epoch
        self._batches.first = first
        for batch in iterate_batches(self.loader):
            yield _checked(batch)

    def prepare(self, keys: Sequence[SampleKey]) -> tuple[Tensor, Tensor]:
        return _checked(_collate([self.images[key] for key in keys]))


class _BatchSampler(Sampler[list[SampleKey]]):
    """The full batches of an epoch, starting at batch `first`."""

    def __init__(self, order: EpochSampler, batch_size: int) -> None:
        self.order = order
        self.batch_size = batch_size
        self.first = 0

    def __iter__(self) -> Iterator[list[SampleKey]]:
        keys = iter(self.order)
        for number in range(len(self.order) // self.batch_size):
            batch = list(islice(keys, self.batch_size))
            if number >= self.first:
                yield batch


def _collate(items: Sequence[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor] | str:
    for item in items:
        if isinstance(item, str):
            return item
    images_BCHW, labels_B = default_collate(list(items))  # stacks into memory shared between worker processes
    return images_BCHW, labels_B


def _checked(batch: tuple[Tensor, Tensor] | str) -> tuple[Tensor, Tensor]:
    if isinstance(batch, str):
        raise UnreadableImage(f"{batch}; --skip-unreadable leaves such images out")
    return batch
