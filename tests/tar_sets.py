"""Small webdatasets: tar files with images of noise and their labels."""

import io
import json
import tarfile

import numpy as np
from PIL import Image


def png_bytes(number, side=16):
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, "PNG")
    return packed.getvalue()


def write_shard(path, members):
    with tarfile.open(path, "w") as shard:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            shard.addfile(entry, io.BytesIO(content))


def members(numbers, **options):
    for number in numbers:
        yield f"a.b/{number:03d}.png", png_bytes(number, **options)
        yield f"a.b/{number:03d}.cls", str(number % 3).encode()
        yield f"a.b/{number:03d}.extra.json", b"{}"


def write_set(folder, counts=(5, 1, 7), num_samples=None, **options):
    """A webdataset of shards with these numbers of images."""
    folder.mkdir(exist_ok=True)
    start, names = 0, []
    for index, count in enumerate(counts):
        names.append(f"validation-{index:04d}.tar")
        write_shard(folder / names[-1], members(range(start, start + count), **options))
        start += count
    split = {"name": "validation", "num_samples": num_samples or start, "filenames": names}
    info = {"splits": {"validation": split | {"shard_lengths": list(counts)}}}
    (folder / "_info.json").write_text(json.dumps(info))
    return folder
