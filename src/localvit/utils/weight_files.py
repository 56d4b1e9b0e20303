"""Reading a file of tensors, and what it says about them, without running anything that is in it."""

import argparse
import json
import math
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

HEADER = "localvit"
"""Key of a checkpoint's header, in the metadata of a safetensors file or among the entries of a torch file."""
MAX_NUMBER = 100_000
"""The largest number that an argument in a file may have or contain: far above any layer's width or image's side."""
MAX_LENGTH = 10_000
"""The largest number of characters or items of an argument in a file."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message names the file, what is wrong with it and what to do."""


def read_weight_file(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """The dictionary in a `.safetensors` or torch file, on the CPU. `mmap` reads each tensor only when it is used.

    A torch file may contain tensors, plain containers and the `argparse.Namespace` of published checkpoints, but
    nothing that runs code (torch's `weights_only`).

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is truncated, would run code, or does not contain a dictionary.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: give the path of the checkpoint file in it")
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            with _path_for_safetensors(path) as readable:
                return safetensors.torch.load_file(readable)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (PermissionError, MemoryError):
        raise
    except (safetensors.SafetensorError, EOFError, RuntimeError, OSError, zipfile.BadZipFile, ValueError) as error:
        raise CheckpointError(_damaged(path, error)) from error
    except Exception as error:  # bytes that are not a pickle raise IndexError, KeyError, struct.error and others
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise CheckpointError(
                f"{path} would run code ({refused[1]}) when it is read, so it was refused; "
                "save it again as plain tensors or as safetensors"
            ) from error
        raise CheckpointError(_damaged(path, ValueError("not plain tensors"))) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} contains a {type(content).__name__}, not a dictionary of tensors")
    return content


def check_suffix(path: Path, *, safetensors: bool) -> None:
    """Raise ValueError for a name under which `read_weight_file` would not recognize a file that is to be written."""
    if safetensors and path.suffix != ".safetensors":
        raise ValueError(f"{path} would be a safetensors file: let its name end in .safetensors, or it cannot be read")
    if not safetensors and path.suffix == ".safetensors":
        raise ValueError(f"{path} would be a torch file and not a safetensors file: let its name end in .pth")


def read_header(path: str | Path, key: str) -> dict[str, Any] | None:
    """The JSON object under `key` in the metadata of a safetensors file; None if there is no such key.

    Raises CheckpointError if it is not JSON or not an object.
    """
    with _path_for_safetensors(Path(path)) as readable, safetensors.safe_open(readable, framework="pt") as file:
        text = (file.metadata() or {}).get(key)
    if text is None:
        return None
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} has a damaged header: {key!r} is not JSON ({error}); copy the file again"
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a damaged header: {key!r} is a {type(header).__name__}, not an object")
    return header


@contextmanager
def _path_for_safetensors(path: Path) -> Iterator[Path]:
    """A path of the same file that safetensors reads; it refuses those that are not valid UTF-8."""
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        with path.open("rb") as file:
            yield Path(f"/dev/fd/{file.fileno()}")
    else:
        yield path


def check_plain_arguments(path: str | Path, arguments: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the arguments in a file are plain values: no objects, and no absurd sizes."""
    for name, value in arguments.items():
        if not isinstance(name, str) or not _is_plain(value):
            raise CheckpointError(
                f"{path} has an argument {name!r} that was refused: it must be None, a number up to {MAX_NUMBER:,}, a "
                f"short text, or a list of these, not {repr(value)[:60]}"
            )


def _is_plain(value: object, depth: int = 0) -> bool:
    if value is None or isinstance(value, bool):
        return True
    if type(value) in (int, float):
        return math.isfinite(value) and abs(value) <= MAX_NUMBER  # type: ignore[arg-type]
    if type(value) is str:
        return len(value) <= MAX_LENGTH and all(
            len(digits) <= len(str(MAX_NUMBER)) and int(digits) <= MAX_NUMBER for digits in re.findall(r"[0-9]+", value)
        )
    if type(value) in (list, tuple, dict) and len(value) <= MAX_LENGTH and depth < 4:  # type: ignore[arg-type]
        items = [*value, *value.values()] if isinstance(value, dict) else value
        return all(_is_plain(item, depth + 1) for item in items)  # type: ignore[attr-defined]
    return False


def _damaged(path: Path, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"{path} is not a checkpoint or is truncated ({path.stat().st_size:,} bytes: {reason[:160]}); "
        "download or copy it again"
    )
