"""The passes of the locality module's training step over its hidden maps, on the CPU in float32, in C++.

torch has no operators that merge several passes over a map into one. `cpu_kernels.cpp` is compiled on first use, by the
toolchain of torch.compile: torch finds the compiler and the processor's instructions, and keeps the result in its
cache.

Shapes: B images, H and W the grid, E channels. `norm_4E` is a batch norm: mean, scale (weight over deviation), bias and
inverse deviation.
"""

import logging
from ctypes import CDLL, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_logger = logging.getLogger(__name__)


@cache
def library() -> CDLL | None:
    """The compiled functions; None where they cannot be compiled, which is logged once."""
    _logger.info("loading the CPU's training kernels, which are compiled on first use")
    toolchain = logging.getLogger("torch.utils.cpp_extension")
    before = toolchain.level
    try:
        # When it is imported, it warns of a CUDA compiler without a GPU, which is not needed here.
        toolchain.setLevel(logging.ERROR)
        # Not at the top: this takes seconds, and needs parts of torch that only torch.compile needs.
        from torch._inductor.codecache import CppCodeCache
        from torch._inductor.cpu_vec_isa import pick_vec_isa

        compiled = CppCodeCache.load((Path(__file__).parent / "cpu_kernels.cpp").read_text())
        if not pick_vec_isa():
            raise NotImplementedError("torch.compile knows no vector instructions of this processor")
        compiled.lanes.restype = c_int64
        compiled.lanes()
    except Exception as error:  # Whatever the reason, training can do without them.
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        _logger.info("the CPU's training kernels are not used: %s", reason)
        return None
    finally:
        toolchain.setLevel(before)
    return compiled


def lanes() -> int | None:
    """The number of channels must be a multiple of it; None where nothing can be compiled."""
    compiled = library()
    return None if compiled is None else int(compiled.lanes())


def moments(z_BHWE: Tensor) -> Tensor:
    """Mean and sum of squared deviations from it of each image and channel, (B, 2, E)."""
    moments_B2E = _sums(z_BHWE, 2)
    _call("moments", z_BHWE, moments_B2E, *z_BHWE.shape)
    return moments_B2E


def norm_act_depthwise(z_BHWE: Tensor, norm_4E: Tensor, weight_9E: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """Batch norm, activation and depth-wise 3x3 convolution with zeros around the map; and the result's `moments`."""
    out_BHWE, moments_B2E = torch.empty_like(z_BHWE), _sums(z_BHWE, 2)
    _call("depthwise", act == "hs", z_BHWE, norm_4E, weight_9E, out_BHWE, moments_B2E, *z_BHWE.shape)
    return out_BHWE, moments_B2E


def norm_act_means(z_BHWE: Tensor, norm_4E: Tensor, act: str) -> Tensor:
    """Batch norm and activation, and the means (B, E) of the result, which is not stored."""
    mean_BE = z_BHWE.new_empty(z_BHWE.shape[0], z_BHWE.shape[3])
    _call("channel_means", act == "hs", z_BHWE, norm_4E, mean_BE, *_positions(z_BHWE))
    return mean_BE


def norm_act_gate(z_BHWE: Tensor, norm_4E: Tensor, gate_BE: Tensor, act: str) -> Tensor:
    """Batch norm, activation and a gate's factors."""
    out_BHWE = torch.empty_like(z_BHWE)
    _call("gated", act == "hs", z_BHWE, norm_4E, gate_BE, out_BHWE, *_positions(z_BHWE))
    return out_BHWE


def norm_act_gate_backward(
    grad_BHWE: Tensor, z_BHWE: Tensor, norm_4E: Tensor, gate_BE: Tensor, act: str
) -> tuple[Tensor, Tensor]:
    """What the backward pass needs of `norm_act_gate`, given the gradient of its result: the result again, and sums.

    Returns:
        The result, and sums over positions (B, 5, E) from which every gradient of the gate and of the batch norm can be
        computed: of g * a, g * s, s, g * s * d and s * d, with the gradient g, the activated value a, the activation's
        slope s and the deviation d of z from the mean.
    """
    out_BHWE, sums_B5E = torch.empty_like(z_BHWE), _sums(z_BHWE, 5)
    _call(
        *("gated_backward", act == "hs", grad_BHWE, z_BHWE, norm_4E, gate_BE, out_BHWE, sums_B5E),
        *_positions(z_BHWE),
    )
    return out_BHWE, sums_B5E


def norm_act_depthwise_backward_(
    grad_BHWE: Tensor,
    out_BHWE: Tensor,
    out_norm_4E: Tensor,
    gate_B2E: Tensor,
    slopes_2E: Tensor,
    z_BHWE: Tensor,
    norm_4E: Tensor,
    weight_9E: Tensor,
    act: str,
) -> tuple[Tensor, Tensor]:
    """Through gate, activation and batch norm after `norm_act_depthwise`, the convolution, and its activation.

    Args:
        grad_BHWE: the gradient of `norm_act_gate`'s result; becomes that of norm(z).
        out_BHWE, out_norm_4E: the convolution's map, and the batch norm after it.
        gate_B2E: the gate's factors, and what its means add to the gradient of each position.
        slopes_2E: what a deviation from the mean, and what any value adds to the gradient of the convolution's map.
        z_BHWE, norm_4E, weight_9E: the arguments of the forward pass.
        act: of both activations.

    Returns:
        The gradient of the weight for each image, (B, 9, E), and the sums (B, 2, E) of the gradient of norm(z), and of
        it times the deviation of z from the mean.
    """
    weight_sums_B9E, sums_B2E = _sums(z_BHWE, 9), _sums(z_BHWE, 2)
    _call(
        *("depthwise_backward", act == "hs", grad_BHWE, out_BHWE, out_norm_4E, gate_B2E, slopes_2E),
        *(z_BHWE, norm_4E, weight_9E, weight_sums_B9E, sums_B2E, *z_BHWE.shape),
    )
    return weight_sums_B9E, sums_B2E


def norm_backward_(grad_BHWE: Tensor, z_BHWE: Tensor, norm_4E: Tensor, slopes_3E: Tensor) -> None:
    """From the gradient of norm(z) to that of z, in place.

    Args:
        slopes_3E: the factor of the gradient, that of the deviation of z from the mean, and a summand.
    """
    _call("norm_backward", grad_BHWE, z_BHWE, norm_4E, slopes_3E, *_positions(z_BHWE))


def _sums(z_BHWE: Tensor, number: int) -> Tensor:
    return z_BHWE.new_empty(z_BHWE.shape[0], number, z_BHWE.shape[3])


def _positions(z_BHWE: Tensor) -> tuple[int, int, int]:
    batch, height, width, channels = z_BHWE.shape
    return batch, height * width, channels


def _call(name: str, *arguments: Tensor | int) -> None:
    for each in arguments:
        assert isinstance(each, int) or (each.is_contiguous() and each.dtype == torch.float32)
    converted = (
        c_void_p(each.data_ptr()) if isinstance(each, Tensor) else c_int64(each)
        for each in (*arguments, torch.get_num_threads())
    )
    getattr(library(), name)(*converted)
