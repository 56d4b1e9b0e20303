"""Leaving out the images that cannot be read, before training on the others."""

import logging
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from localvit.data.images import DataError, Images, PreparedImages
from localvit.data.split import ImageSubset
from localvit.data.workers import init_worker, iterate_batches
from localvit.utils.distributed import all_gather, rank, run_on_all_ranks, world_size

logger = logging.getLogger(__name__)

_BATCH = 32


def leave_out_unreadable(images: Images, workers: int) -> Images:
    """The images that can be decoded. Decodes all of them once, and logs the name and reason of each other one.

    Call it on all processes; each decodes its share.

    Args:
        images: The images.
        workers: Number of worker processes of this process; 0 decodes in it.

    Raises:
        DataError: None can be read.
        RuntimeError: A worker process died, or another process failed.
    """
    share = range(rank(), len(images), world_size())
    parts = all_gather(run_on_all_ranks(lambda: _unreadable(images, share, workers)))
    reasons = {index: reason for part in parts for index, reason in part.items()}
    if not reasons:
        return images
    for _, reason in sorted(reasons.items()):
        logger.warning(f"left out {reason}")
    if len(reasons) == len(images):
        raise DataError(f"none of the {len(images):,} images can be read, such as {reasons[0]}")
    logger.warning(f"{len(reasons):,} of {len(images):,} images cannot be read and are left out")
    return ImageSubset(images, [index for index in range(len(images)) if index not in reasons])


def _unreadable(images: Images, indices: Sequence[int], workers: int) -> dict[int, str]:
    loader: DataLoader = DataLoader(
        Subset(PreparedImages(images, _nothing), list(indices)),
        batch_size=_BATCH,
        num_workers=min(workers, -(-len(indices) // _BATCH)),
        collate_fn=list,
        worker_init_fn=init_worker,
    )
    return {index: reason for batch in iterate_batches(loader) for index, reason in batch if isinstance(reason, str)}


def _nothing(image: Image.Image) -> Tensor:
    return torch.empty(0)
