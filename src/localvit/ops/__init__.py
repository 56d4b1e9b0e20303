"""How the locality module's layers run: one result, several speeds.

`stages` reads a module's layers, `dispatch` decides how they run, and the rest computes: `recompute` for training,
`cpu_training` and `kernel_step` for training by kernels on the CPU and on GPUs, `folded` for inference, `operators`
with `reference` and `triton` for the steps that have a kernel. `batch_norms` holds what all agree on: when running
statistics change.
"""

from localvit.ops.batch_norms import run_layers
from localvit.ops.dispatch import backend, set_backend, stages_to_fold, use_backend
from localvit.ops.folded import FusedConvolutions, FusedFeedForward
from localvit.ops.recompute import feed_forward
from localvit.ops.stages import ChannelGate, Stages, is_untouched

__all__ = [
    "ChannelGate",
    "FusedConvolutions",
    "FusedFeedForward",
    "Stages",
    "backend",
    "feed_forward",
    "is_untouched",
    "run_layers",
    "set_backend",
    "stages_to_fold",
    "use_backend",
]
