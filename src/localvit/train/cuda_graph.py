"""The forward and backward pass of training as CUDA graphs: captured once, and launched as a whole in each step.

A pass of a small model consists of a thousand short kernels, and launching them one by one takes longer than running
them. A graph replays the captured kernels with the captured addresses. What follows from that:

- All batches have one shape, that of the captured one; `TrainingBatches` has only full batches.
- Weights, buffers and the static input stay where they are; optimizers and checkpoints write them in place.
- What Python does in a forward pass happens only once, when it is captured: hooks of modules do not run again.
- The gradients of a replay are in the same memory as those of the one before.

Random numbers (dropout, stochastic depth) are those of the generator's seed at each replay, as without a graph.

Shapes: B images of a batch, C channels, H and W pixels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from localvit.train.buffers import SavedBuffers
from localvit.train.config import TrainConfig
from localvit.utils.distributed import world_size


def check_graph_support(config: TrainConfig, device: torch.device) -> None:
    """Raise ValueError if the run is to use CUDA graphs, and they cannot be captured on this device."""
    if not config.cuda_graph:
        return
    if device.type != "cuda":
        raise ValueError(f"cuda_graph needs a CUDA device, and this run is on {device}: turn it off (--no-cuda-graph)")
    if world_size() > 1:
        raise ValueError(
            f"cuda_graph works in one process, and this run has {world_size()}: turn it off (--no-cuda-graph), or "
            "train in one process with more --grad-accum"
        )


class ModelCall(nn.Module):
    """Calls a model in training mode under autocast.

    A graph is captured for this module and not for the model, so that the model keeps its own forward. The casts of
    weights are not cached, because a cast from before the capture would be replayed with its old values.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        """
        Args:
            model: the model, in training mode.
            device: its device.
            dtype: the dtype of autocast; float32 turns it off.
        """
        super().__init__()
        self.model = model
        self._autocast = {"device_type": device.type, "dtype": dtype, "enabled": dtype != torch.float32}

    def forward(self, images_BCHW: Tensor) -> Any:
        """The model's outputs: logits, or a tuple of them."""
        arguments: dict[str, Any] = self._autocast
        with torch.autocast(**arguments, cache_enabled=False):
            return self.model(images_BCHW)


def _capture(call: ModelCall, sample_BCHW: Tensor) -> Any:
    """`call` with a forward that replays the graphs."""
    device = sample_BCHW.device
    try:
        with torch.cuda.device(device), torch.random.fork_rng([device]):
            # Not all parameters have a gradient: the tokenizer of LocalViT-T2T has a norm without a use.
            return torch.cuda.make_graphed_callables(call, (sample_BCHW,), allow_unused_input=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(
            f"cuda_graph: {type(call.model).__name__} cannot be captured ({str(error).splitlines()[0]}): turn it off "
            "(--no-cuda-graph)"
        ) from error


class GraphedModel(nn.Module):
    """A model whose forward and backward pass in training are replayed from CUDA graphs.

    Use it as the model, in training mode only. A batch of another shape runs without the graphs. Further backward
    passes into the same gradients are possible after `keep_gradients`.
    """

    def __init__(self, model: nn.Module, sample_BCHW: Tensor, dtype: torch.dtype) -> None:
        """Capture the graphs. Weights, buffers, gradients and random generators are afterwards as before.

        Args:
            model: the model, on a CUDA device.
            sample_BCHW: a batch with the shape and memory format of all batches. Its memory becomes that of the input.
            dtype: the dtype of autocast; float32 turns it off.

        Raises:
            ValueError: if the model does something that cannot be captured, such as to read a number on the host.
        """
        super().__init__()
        self.call = ModelCall(model.train(), sample_BCHW.device, dtype)
        self._shape = sample_BCHW.shape
        buffers_before = SavedBuffers(model)  # the warm-up runs change statistics
        self._replay: Any = _capture(ModelCall(model, sample_BCHW.device, dtype), sample_BCHW)
        buffers_before.restore()

    def forward(self, images_BCHW: Tensor) -> Any:
        """The model's outputs. Those of graphs are overwritten by the next call."""
        return (self._replay if images_BCHW.shape == self._shape else self.call)(images_BCHW)

    @torch.no_grad()
    def keep_gradients(self) -> None:
        """Give the gradients memory of their own, which the next replay does not overwrite."""
        found = [(each, each.grad) for each in self.call.parameters() if each.grad is not None]
        copies = torch._foreach_mul([grad for _, grad in found], 1.0)
        for (parameter, _), copy in zip(found, copies, strict=True):
            parameter.grad = copy
