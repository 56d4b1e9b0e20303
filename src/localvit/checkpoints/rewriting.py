"""Adding to what a checkpoint says about its run, without touching its weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch

from localvit.checkpoints.contents import HEADER, read_checkpoint
from localvit.utils.files import atomic_write
from localvit.utils.plain_values import plain
from localvit.utils.weight_files import check_suffix, read_header, read_weight_file


def has_own_header(path: Path) -> bool:
    """Whether a file is a checkpoint in our layout, which `copy_with` can copy."""
    return path.suffix == ".safetensors" and path.is_file() and read_header(path, HEADER) is not None


def copy_with(source: Path, path: Path, about: Mapping[str, Any]) -> Path:
    """Copy a checkpoint in our layout, with these entries added to what it says about its run.

    Args:
        source: The checkpoint. It stays as it is, unless `path` is the same.
        path: The file to write, whole or not at all.
        about: Entries that JSON can represent. They replace those of equal name.

    Raises:
        CheckpointError: If `source` is damaged.
        ValueError: If `path` does not end in .safetensors, or `source` is not in our layout.
    """
    check_suffix(path, safetensors=True)
    read_checkpoint(source)  # raises for a damaged file
    header = read_header(source, HEADER)
    if header is None:
        raise ValueError(f"{source} is not a checkpoint in localvit's layout")
    header["about"] |= plain(about)
    tensors = read_weight_file(source)
    with atomic_write(path) as unfinished:
        safetensors.torch.save_file(tensors, unfinished, metadata={HEADER: json.dumps(header)})
    return path
