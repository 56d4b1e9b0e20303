"""Labeled images of a Hugging Face data set, read as a stream: `hfids/NAME`, or a folder that `datasets` can read."""

from collections.abc import Iterator
from typing import Any

from localvit.data.image_stream import ImageStream, StreamedImage
from localvit.data.images import DataError, reason_of

_MOST_SHARDS = 1024
"""A folder of image files has as many shards as files; selecting each of them would take quadratic time."""


class HubStream(ImageStream):
    """The images of one split, in its order."""

    def __init__(self, name: str, cache: str, splits: list[str], *, title: str) -> None:
        """
        Args:
            name: Name on the Hugging Face Hub, or the path of a folder.
            cache: Folder where `datasets` keeps what it downloads.
            splits: Names of the split, of which the first that exists is read.
            title: Name of the data set, for messages.

        Raises:
            DataError: There is no such split, or it has no columns of images and class labels.
            Exception: Whatever `datasets` raises for a data set that it cannot open.
        """
        import datasets

        builder = datasets.load_dataset_builder(name, cache_dir=cache)
        streams = builder.as_streaming_dataset()
        split = next((each for each in splits if each in streams), None)
        if split is None:
            raise DataError(f"--data-set {title} has no split {' or '.join(splits)}, only {', '.join(streams)}")
        stream: Any = streams[split]
        if stream.features is None:  # a format that says nothing about its columns, such as JSON
            stream = stream._resolve_features()
        self.title = title
        self.split = split
        self.image_key = _column(stream.features, datasets.Image, "image", title)
        self.label_key = _column(stream.features, datasets.ClassLabel, "label", title)
        self.class_names = list(stream.features[self.label_key].names)
        self.stream = stream.select_columns([self.image_key, self.label_key]).cast_column(
            self.image_key, datasets.Image(decode=False)
        )
        self.num_shards = min(stream.num_shards, _MOST_SHARDS)
        info = (builder.info.splits or {}).get(split)
        self.num_images = getattr(info, "num_examples", None) or None

    def read_shard(self, shard: int) -> Iterator[StreamedImage]:
        index = 0
        try:
            for row in self.stream.shard(self.num_shards, shard, contiguous=True):
                yield self._image(row, shard, index)
                index += 1
        except DataError:
            raise
        except Exception as error:  # of the network, the file system, or a file's format
            raise DataError(
                f"--data-set {self.title}: cannot be read after image {index:,} of shard {shard} ({reason_of(error)})"
            ) from error

    def _image(self, row: dict[str, Any], shard: int, index: int) -> StreamedImage:
        image, label = row[self.image_key], row[self.label_key]
        # A path inside a table need not be unique.
        name = f"{self.title}[{shard}, {index}]" + (f" {image['path']}" if image and image["path"] else "")
        if image is None or label is None or label < 0:  # datasets' labels of test sets without labels are -1
            raise DataError(f"{name} has no {'image' if image is None else 'label'}")
        content = image["bytes"]
        return StreamedImage((shard, index), name, label, _read(image["path"]) if content is None else content)


def _column(features: Any, kind: type, usual_name: str, title: str) -> str:
    """The only column of a kind, or that with the usual name."""
    names = [name for name, feature in features.items() if isinstance(feature, kind)]
    if usual_name in names:
        return usual_name
    if len(names) != 1:
        found = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
        raise DataError(
            f"--data-set {title} has {len(names) or 'no'} columns of {kind.__name__}, and none is named "
            f"{usual_name}: {found}"
        )
    return names[0]


def _read(path: str) -> bytes:
    """The content of an image file, which may be on another machine."""
    from datasets.download.streaming_download_manager import xopen

    with xopen(path, "rb") as file:
        return file.read()
