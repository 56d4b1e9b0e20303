"""Replace the forward of one module, not of its class, so that copies, pickles and DataParallel replicas follow."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


def override_forward(module: nn.Module, forward: Callable[..., Any], *bound: Any) -> None:
    """Let calls of `module` run `forward(module, *bound, *args, **kwargs)`.

    `forward` must be a function of a file, so that it can be pickled; it reaches the original as
    `type(module).forward`. It is given the copy of a copied module, and the replica of a replicated one.
    """
    module.forward = partial(forward, module, *bound)  # type: ignore[method-assign]
    # A replica takes over all attributes, and with them the forward that is bound to the original.
    module._replicate_for_data_parallel = partial(_replicate, module, forward, *bound)  # type: ignore[method-assign]


def _replicate(module: nn.Module, forward: Callable[..., Any], *bound: Any) -> nn.Module:
    replica = type(module)._replicate_for_data_parallel(module)
    override_forward(replica, forward, *bound)
    return replica
