"""Tensors that kernels read by their addresses, which say nothing of strides and devices."""

from collections.abc import Sequence

from torch import Tensor


def operands(parameters: Sequence[Tensor], device: int) -> list[Tensor]:
    """Parameters with values one behind the other, on the device of the map that they are used with.

    Args:
        parameters: of any strides, such as parts of other tensors.
        device: the map's, as `Tensor.get_device` gives it.

    Raises:
        RuntimeError: for a parameter on another device, as from torch's own operators.
    """
    for parameter in parameters:
        if parameter.get_device() != device:
            where = "the CPU" if device < 0 else f"cuda:{device}"
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but the input is on {where} and a parameter of the "
                f"locality module on {parameter.device}: move the model and its input to one device"
            )
    return [parameter.contiguous() for parameter in parameters]
