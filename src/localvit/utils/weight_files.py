"""Reading a file of tensors without running anything that is in it."""

import argparse
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, what is wrong with it and what to do."""


def read_weight_file(path: str | Path) -> dict[str, Any]:
    """The dictionary that a `.safetensors` or torch file holds, on the CPU.

    A torch file may hold tensors, plain containers and the `argparse.Namespace` of published checkpoints, nothing that
    runs code (torch's `weights_only`).

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is truncated, would run code, or holds no dictionary.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; give the checkpoint file in it")
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named:
            raise CheckpointError(
                f"{path} asks to run code ({named[1]}) while it is read, and was refused; "
                "save it again as plain tensors, or as safetensors"
            ) from error
        raise CheckpointError(_damaged(path, ValueError("not plain tensors"))) from error
    except (safetensors.SafetensorError, EOFError, RuntimeError, OSError, zipfile.BadZipFile, ValueError) as error:
        raise CheckpointError(_damaged(path, error)) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def _damaged(path: Path, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"{path} is no checkpoint or is cut off ({path.stat().st_size:,} bytes: {reason[:160]}); fetch or copy it again"
    )
