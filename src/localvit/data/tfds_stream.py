"""Labeled images of TensorFlow Datasets, read as a stream: `tfds/NAME`, as it was prepared in its folder."""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from localvit.data.image_stream import ImageStream, StreamedImage
from localvit.data.images import DataError, reason_of


class TfdsStream(ImageStream):
    """The images of one split. Its record files are the shards."""

    def __init__(self, name: str, folder: str, splits: list[str], *, title: str) -> None:
        """
        Args:
            name: Name in the catalog.
            folder: The folder of prepared data sets (`data_dir`).
            splits: Names of the split, of which the first that exists is read.
            title: Name of the data set, for messages.

        Raises:
            DataError: There is no such split, or it has no image and class label.
            Exception: Whatever tensorflow-datasets raises for a data set that it cannot open.
        """
        import tensorflow as tf
        import tensorflow_datasets as tfds

        tf.config.set_visible_devices([], "GPU")  # which TensorFlow would take whole
        self.builder = tfds.builder(name, data_dir=folder)
        info = self.builder.info
        split = next((each for each in splits if each in info.splits), None)
        if split is None:
            found = ", ".join(info.splits) or f"none, because {folder} has no prepared {name}"
            raise DataError(f"--data-set {title} has no split {' or '.join(splits)}, only {found}")
        features = dict(info.features.items())
        label: Any = features.get("label")
        if "image" not in features or not hasattr(label, "names"):
            raise DataError(f"--data-set {title} needs the features image and label, and has {', '.join(features)}")
        self.title = title
        self.split = split
        # Without names in its metadata, a label is a number only.
        self.class_names = list(label.names) if label.names else None
        self.ends = list(accumulate(info.splits[split].shard_lengths))
        self.num_shards = len(self.ends)
        self.num_images = self.ends[-1] if self.ends else 0

    def read_shard(self, shard: int) -> Iterator[StreamedImage]:
        import tensorflow_datasets as tfds

        start = self.ends[shard - 1] if shard else 0
        index = 0
        try:
            rows = self.builder.as_dataset(
                split=f"{self.split}[{start}:{self.ends[shard]}]",
                shuffle_files=False,
                decoders={"image": tfds.decode.SkipDecoding()},
            )
            for row in tfds.as_numpy(rows):
                name = f"{self.title}[{start + index}]"
                yield StreamedImage((shard, index), name, int(row["label"]), bytes(row["image"]))
                index += 1
        except Exception as error:  # TensorFlow's own types
            raise DataError(
                f"--data-set {self.title}: cannot be read after image {start + index:,} ({reason_of(error)})"
            ) from error
