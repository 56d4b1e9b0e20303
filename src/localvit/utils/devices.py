"""Which device to run on, and in what precision."""

import os

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(requested: str | None) -> tuple[torch.device, str | None]:
    """The device to use, and a warning when it is not the requested one.

    Without a request: CUDA where there is one, else MPS, else the CPU. A request for an accelerator that is not there
    falls back the same way. Under torchrun each process gets the CUDA device of its LOCAL_RANK.

    Raises ValueError for a name that torch does not know or a CUDA index that does not exist.
    """
    if torch.cuda.is_available():
        best = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    elif torch.backends.mps.is_available():
        best = torch.device("mps")
    else:
        best = torch.device("cpu")
    if requested is None:
        return best, None
    try:
        device = torch.device(requested)
    except RuntimeError as error:
        raise ValueError(f"--device {requested}: torch knows no such device; try cuda, mps or cpu") from error
    if device.type == "cuda" and torch.cuda.is_available():
        if device.index is None:
            return best, None
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"--device {requested}: this machine has {torch.cuda.device_count()} CUDA device(s)")
        return device, None
    if device.type in ("cuda", "mps") and device.type != best.type:
        return best, f"no {device.type.upper()} device on this machine; running on {best.type}"
    return device, None
