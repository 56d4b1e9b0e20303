"""The batches of an epoch on the device: the next one is copied while a step computes.

Shapes: B images of a batch, C channels, H and W pixels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from localvit.inference.runner import InferenceOptions

Batch = tuple[Tensor, Tensor]
"""Images (B, C, H, W) and labels (B)."""


class DeviceBatches(Iterator[Batch]):
    """Batches that are moved to the device. On a GPU they are copied in a stream of their own, beside the step's work.

    Args:
        batches: in memory, which should be pinned for a GPU, or on the device already.
        options: device and memory format.
    """

    def __init__(self, batches: Iterator[Batch], options: InferenceOptions) -> None:
        self._batches = batches
        self._options = options
        self._stream = torch.cuda.Stream(options.device) if options.device.type == "cuda" else None
        self._fetched: Batch | Exception | None = None

    def __next__(self) -> Batch:
        self.fetch()
        fetched, self._fetched = self._fetched, None
        if not isinstance(fetched, tuple):
            assert fetched is not None
            raise fetched
        if self._stream is not None:
            current = torch.cuda.current_stream(self._options.device)
            current.wait_stream(self._stream)
            for tensor in fetched:
                tensor.record_stream(current)  # so that its memory is not reused before the step has read it
        return fetched

    def fetch(self) -> None:
        """Load the next batch and start to copy it, unless that is done. Call it once the device has work to do.

        An error in loading it, or the end of the epoch, is raised where the batch is asked for.
        """
        if self._fetched is not None:
            return
        try:
            batch = next(self._batches)
            # What was prepared on the GPU is ready for the current stream only.
            stream = None if batch[0].is_cuda else self._stream
            with torch.cuda.stream(stream):  # does nothing without a stream
                self._fetched = to_device(batch, self._options)
        except Exception as error:
            self._fetched = error


def to_device(batch: Batch, options: InferenceOptions) -> Batch:
    """Move a batch, without waiting for it where its memory is pinned."""
    images_BCHW, labels_B = batch
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    images_BCHW = images_BCHW.to(options.device, non_blocking=True, memory_format=layout)
    return images_BCHW, labels_B.to(options.device, non_blocking=True)
