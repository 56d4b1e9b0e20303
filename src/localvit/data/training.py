"""Pictures to train on: shuffled, augmented and batched so that nothing depends on who prepares them.

Every random draw is a function of where it is made (the seed, the epoch, the picture or step), never of what was drawn
before; so any number of worker processes gives the same bits, and a run can begin again at any epoch.

Shapes: B pictures of a batch, C channels, H and W pixels.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from localvit.data.pictures import Pictures, PreparedPictures, UnreadablePicture


class Draws(IntEnum):
    """What random numbers are for, so that no two purposes share any."""

    WEIGHTS = 0
    ORDER = 1
    PICTURE = 2
    STEP = 3


def seed_draws(seed: int, purpose: Draws, epoch: int = 0, place: int = 0) -> None:
    """Start Python's, NumPy's and torch's generators (augmentations use all three) from these numbers alone."""
    words = _sequence(seed, purpose, epoch, place).generate_state(4, np.uint32)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))


def _sequence(seed: int, purpose: Draws, epoch: int, place: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=(purpose, epoch, place))


class AugmentedPictures(Dataset):
    """Pictures under a random transform: item (epoch, i) is (tensor (C, H, W), label), or why i cannot be read."""

    def __init__(self, pictures: Pictures, transform: Callable[[Image.Image], Tensor], seed: int) -> None:
        self.pictures = pictures
        self.prepared = PreparedPictures(pictures, transform)
        self.seed = seed

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int] | str:
        epoch, index = place
        seed_draws(self.seed, Draws.PICTURE, epoch, index)
        _, picture = self.prepared[index]
        return picture if isinstance(picture, str) else (picture, self.pictures.labels[index])


class ShuffledEpoch(Sampler[tuple[int, int]]):
    """Each picture of a data set once, as (epoch, index), in an order that follows from the seed and the epoch."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng(_sequence(self.seed, Draws.ORDER, self.epoch, 0)).permutation(self.count)
        return ((self.epoch, int(index)) for index in order)


class TrainingBatches:
    """The full batches of each epoch: pictures (B, C, H, W) and labels (B), int64.

    Raises ValueError when the pictures do not fill one batch.
    """

    def __init__(self, pictures: AugmentedPictures, *, batch_size: int, workers: int, pin_memory: bool) -> None:
        count = len(pictures.pictures)
        if count < batch_size:
            raise ValueError(f"batch_size={batch_size} is more than the {count} pictures to train on")
        self.batch_size = batch_size
        self.order = ShuffledEpoch(count, pictures.seed)
        self.loader: DataLoader = DataLoader(
            pictures,
            batch_size=batch_size,
            sampler=self.order,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_collate,
            drop_last=True,
            pin_memory=pin_memory,
        )

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch. Raises UnreadablePicture, or RuntimeError when a worker process dies."""
        self.order.epoch = epoch
        for batch in self.loader:
            if isinstance(batch, str):
                raise UnreadablePicture(batch)
            yield batch


def _collate(items: Sequence[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor] | str:
    for item in items:
        if isinstance(item, str):
            return item
    pictures, labels = zip(*items, strict=True)
    return torch.stack(pictures), torch.tensor(labels)
