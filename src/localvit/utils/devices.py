"""The device and the dtypes to run with."""

import os

import torch

from localvit.utils.distributed import read_launch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(requested: str | None) -> tuple[torch.device, str | None]:
    """Choose the device to use.

    Args:
        requested: A name such as "cuda", "cuda:1", "mps" or "cpu". None means CUDA if available, else MPS, else the
            CPU; so does an accelerator that is not available. Under torchrun, "cuda" and None give each process the
            device of its rank on the machine.

    Returns:
        The device, and a warning if it is not the requested one.

    Raises:
        ValueError: If torch does not know the name, or the CUDA device does not exist.
    """
    if torch.cuda.is_available():
        launch, _ = read_launch()
        best = torch.device("cuda", launch.local_rank % torch.cuda.device_count() if launch else 0)
    elif torch.backends.mps.is_available():
        best = torch.device("mps")
    else:
        best = torch.device("cpu")
    if requested is None:
        return best, None
    try:
        device = torch.device(requested)
    except RuntimeError as error:
        raise ValueError(f"--device {requested}: torch does not know this device; use cuda, mps or cpu") from error
    if device.type == "cuda" and torch.cuda.is_available():
        if device.index is None:
            return best, None
        if device.index >= torch.cuda.device_count():
            raise ValueError(
                f"--device {requested}: this machine has {torch.cuda.device_count()} CUDA device(s), counted from 0"
            )
        return device, None
    if device.type in ("cuda", "mps") and device.type != best.type:
        return best, f"no {device.type.upper()} device on this machine; running on {best.type}"
    return device, None


def cpu_cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
