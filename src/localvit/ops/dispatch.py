"""How each part of the locality module runs: every rule that chooses between implementations stands here.

Three backends, each including the ones before it:

- "layers": every layer as written;
- "torch": the recomputing path in training, fused convolutions in models made by `localvit.fuse`;
- "triton": the Triton kernels as well, on NVIDIA GPUs in half precision; elsewhere the operators run their references.

"auto", the default, is "triton" for tensors that have kernels and "torch" for all others; in training on the CPU in
float32, it runs kernels in C++ where they can be compiled. Where a GPU cannot run its kernels, or the CPU's cannot be
compiled, the log says so once.

An implementation is chosen only where it computes the same as the layers; everywhere else the layers run.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from localvit.ops import cpu_kernels
from localvit.ops.batch_norms import leaves_single_values
from localvit.ops.kernel_gates import known_gate
from localvit.ops.stages import ChannelGate, Norm, Stage, Stages, is_plain, is_untouched, stages_of
from localvit.utils.exporting import is_exporting

Backend = Literal["auto", "layers", "torch", "triton"]
ENVIRONMENT_VARIABLE = "LOCALVIT_BACKEND"

KERNEL_DTYPES = (torch.bfloat16, torch.float16)
"""Dtypes in which the Triton kernels compute."""
MAP_DTYPES = (torch.float32, *KERNEL_DTYPES)
"""Dtypes of the maps that they read in training, under autocast."""
LEAST_CAPABILITY = (8, 0)
"""The first NVIDIA GPUs with matrix products in bfloat16."""
LEAST_SHARED_MEMORY = 81 * 1024
"""Bytes for a block of threads: every kernel has tiles that need no more.

The most is taken by the projection in training, for 7 x 7 maps: operands and a gate's factors of two steps at a time.
GPUs of compute capability 8.6, 8.9 and 12.0 have 99 KB.
"""

LEAST_CPU_VALUES = 1 << 20
"""Values of a hidden map from which on the CPU's kernels train: for less, compiling them would take longer than it
saves."""

_logger = logging.getLogger(__name__)


def set_backend(backend: Backend) -> None:
    """Choose the fastest implementations that may run, for all models of the process.

    The environment variable LOCALVIT_BACKEND sets it from the start.

    Raises:
        ValueError: for an unknown backend.
        ModuleNotFoundError: for "triton" where Triton is not installed.
    """
    global _backend
    _backend = _checked(backend, "backend")


def backend() -> Backend:
    """The backend in force."""
    return _backend


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """A context in which another backend is in force. Raises as `set_backend`."""
    before = _backend
    set_backend(backend)
    try:
        yield
    finally:
        set_backend(before)


def _checked(backend: str, name: str) -> Backend:
    if backend not in get_args(Backend):
        raise ValueError(f"{name}={backend!r} is not known; choose one of {', '.join(get_args(Backend))}")
    if backend == "triton" and find_spec("triton") is None:
        raise ModuleNotFoundError(f"{name}='triton' needs Triton, which is not installed: pip install triton")
    return backend  # type: ignore[return-value]


_backend: Backend = _checked(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE)


def training_path(layers: nn.Sequential, map_BCHW: Tensor) -> tuple[Stages, torch.dtype | None] | None:
    """The stages of layers that train in a faster path, and the dtype of the kernels; None where the layers run.

    Without kernels (None for the dtype), that is the recomputing path (`localvit.ops.recompute`). Both need gradients,
    plain tensors, and batch norms that use the batch's statistics and keep running ones by a momentum. Tracers and
    function transforms (fx, jit, torch.func, forward-mode differentiation) see the layers. torch.compile sees the
    kernels, but chooses by itself what to recompute; batch norms over several processes recompute by kernels only.
    """
    if (
        _backend == "layers"
        or not torch.is_grad_enabled()
        or not is_plain(map_BCHW)  # an fx proxy is not plain either
        or _sees_operations()
    ):
        return None
    compiles = torch.compiler.is_compiling()
    if compiles and _kernel_dtype(map_BCHW) is None:
        return None
    if not compiles and not torch.amp.is_autocast_available(map_BCHW.device.type):
        return None  # such as the meta device, which has no values
    if (stages := stages_of(layers)) is None:
        return None
    if map_BCHW.numel() == 0 or leaves_single_values(list(layers), map_BCHW):
        return None  # The layers know what to do with an empty map, and refuse single values.
    if not all(_trains(stage.norm) for stage in stages.stages):
        return None
    if dtype := fits_kernels(stages, map_BCHW):
        return stages, dtype
    if compiles or any(type(stage.norm) is nn.SyncBatchNorm for stage in stages.stages):
        return None
    return stages, None


def stages_to_fold(module: nn.Module, layers: nn.Sequential) -> Stages | None:
    """The stages of a module's layers that `localvit.fuse` folds; None where the module has to stay as it is.

    Raises:
        ValueError: in training mode.
    """
    if module.training:
        raise ValueError("batch norms use each batch's statistics in training mode: call eval() before fuse()")
    if not is_untouched(module) or (stages := stages_of(layers)) is None:
        return None
    norms = [*(stage.norm for stage in stages.stages), stages.last_norm]
    folds = all(not norm.training and norm.running_mean is not None for norm in norms)
    return stages if folds else None


def _trains(norm: Norm) -> bool:
    return norm.training and norm.affine and norm.track_running_stats and norm.momentum is not None


def _sees_operations() -> bool:
    """Whether torch.jit traces, or a function transform or forward-mode differentiation is active."""
    return torch.jit.is_tracing() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def fits_kernels(stages: Stages, map_BCHW: Tensor) -> torch.dtype | None:
    """The dtype in which the Triton kernels train a module with these stages; None where they do not."""
    dtype = _kernel_dtype(map_BCHW)
    if dtype is None or not has_papers_form(stages) or not all(map(_writes_in_place, stages.stages)):
        return None
    if not torch.is_autocast_enabled(map_BCHW.device.type) and stages.first.weight.dtype != dtype:
        return None
    return None if torch.compiler.is_compiling() and not _fits_operator(stages.stages[1].gate, stages) else dtype


def _writes_in_place(stage: Stage) -> bool:
    """Whether kernels can write a norm's running statistics: they may be parts of other tensors."""
    return all(each is None or each.is_contiguous() for each in stage.norm._buffers.values())


def fits_cpu_kernels(stages: Stages, map_BCHW: Tensor) -> bool:
    """Whether a module with these stages that `training_path` found trains by the CPU's kernels, not by recomputing.

    The kernels are compiled by the first question about a map that is large enough.
    """
    if _backend != "auto" or map_BCHW.device.type != "cpu" or not has_papers_form(stages):
        return False
    if torch.is_autocast_enabled("cpu") or is_in_torch_dispatch_mode():
        return False
    first, second = stages.stages
    if first.act != second.act:
        return False
    modules = (stages.first, first.norm, first.conv, second.norm, second.conv, *filter(None, [second.gate]))
    tensors = (map_BCHW, *(entry for module in modules for entry in (*module.parameters(), *module.buffers())))
    if any(each.is_floating_point() and each.dtype != torch.float32 for each in tensors):
        return False
    hidden = stages.first.weight.shape[0]
    if map_BCHW.numel() // map_BCHW.shape[1] * hidden < LEAST_CPU_VALUES:
        return False
    lanes = cpu_kernels.lanes()
    return lanes is not None and hidden % lanes == 0


def _fits_operator(gate: ChannelGate | None, stages: Stages) -> bool:
    """Whether an operator can compute the stages: it calls no layer of a gate, and exchanges nothing with processes."""
    if any(type(stage.norm) is nn.SyncBatchNorm for stage in stages.stages):
        return False
    return gate is None or known_gate(gate) is not None


def _kernel_dtype(map_BCHW: Tensor) -> torch.dtype | None:
    """The dtype in which the Triton kernels of the training step compute on a map; None where they do not run."""
    kind = map_BCHW.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else map_BCHW.dtype
    if not _has_kernels(map_BCHW.device, dtype) or map_BCHW.dtype not in MAP_DTYPES:
        return None
    # Such as torch's FLOP counter, which has to see each of torch's operations.
    return None if is_in_torch_dispatch_mode() else dtype


def _has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    return (
        _backend in ("auto", "triton")
        and device.type == "cuda"
        and dtype in KERNEL_DTYPES
        and _runs_kernels(0 if device.index is None else device.index)
    )


# Otherwise torch.compile would trace the questions.
@torch.compiler.assume_constant_result
def _runs_kernels(index: int) -> bool:
    return _missing_for_kernels(index) is None


@cache
def _missing_for_kernels(index: int) -> str | None:
    """Why the kernels do not run on a GPU; logged once."""
    missing = None
    # To torch, AMD's devices are `cuda` too.
    if torch.version.hip is not None:
        missing = "they are made for NVIDIA GPUs"
    elif find_spec("triton") is None:
        missing = "Triton is not installed"
    else:
        device: Any = torch.cuda.get_device_properties(index)
        shared = device.shared_memory_per_block_optin
        if (device.major, device.minor) < LEAST_CAPABILITY or shared < LEAST_SHARED_MEMORY:
            missing = (
                f"{device.name} has compute capability {device.major}.{device.minor} and {shared // 1024} KB of shared "
                f"memory for a block; they need {'.'.join(map(str, LEAST_CAPABILITY))} and "
                f"{LEAST_SHARED_MEMORY // 1024} KB"
            )
    if missing is not None:
        _logger.info("the Triton kernels are not used: %s", missing)
    return missing


def runs_directly(x: Tensor) -> bool:
    """Whether an operator runs without torch's dispatcher: on a GPU, where its time counts and no compiler looks."""
    return x.is_cuda and not torch.compiler.is_compiling()


def runs_triton(x: Tensor) -> bool:
    """Whether an operator runs its Triton kernels on a map, rather than the reference."""
    return _has_kernels(x.device, x.dtype) and x.numel() > 0


def fused_path(weight: Tensor) -> Literal["operator", "onednn", "torch"]:
    """How a fused module with this weight runs: by the operator that has kernels, or each convolution by itself."""
    if (_backend == "triton" or _has_kernels(weight.device, weight.dtype)) and not _is_observed():
        return "operator"
    if (
        _backend != "layers"
        and weight.device.type == "cpu"
        and is_plain(weight)
        and weight.dtype in ONEDNN_DTYPES
        and torch.backends.mkldnn.enabled
        # oneDNN's fused convolution has no gradient, does not follow autocast, and torch.jit cannot record its scalars.
        and not (torch.is_grad_enabled() or forward_ad._current_level >= 0 or torch.is_autocast_enabled("cpu"))
        and not (is_exporting() or torch.jit.is_tracing())
    ):
        return "onednn"
    return "torch"


def _is_observed() -> bool:
    """Whether something has to see each of torch's operations: a function transform, a tracer, a dispatch mode.

    torch.compile and torch.export see the operators instead.
    """
    return not torch.compiler.is_compiling() and (_sees_operations() or is_in_torch_dispatch_mode())


def has_papers_form(stages: Stages) -> bool:
    """Whether the kernels compute a module: expansion, depth-wise 3x3 convolution, a gate or none, projection."""
    if len(stages.stages) != 2:
        return False
    first, second = stages.stages
    depthwise = first.conv
    is_depthwise = depthwise.groups > 1 and first.gate is None
    geometry = depthwise.kernel_size, depthwise.stride, depthwise.padding
    return is_depthwise and geometry == ((3, 3), (1, 1), (1, 1)) and stages.first.groups == second.conv.groups == 1


def _onednn_dtypes() -> frozenset[torch.dtype]:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return frozenset()
    fast_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return frozenset({torch.float32, torch.bfloat16} if fast_bfloat16 else {torch.float32})


ONEDNN_DTYPES = _onednn_dtypes()
"""Dtypes that oneDNN computes at full speed on this machine."""
