"""What others have hung on a module, which a faster form that does not run the module would pass by."""

from torch import nn


def is_untouched(module: nn.Module) -> bool:
    """Whether nobody has hung anything on a module to see, or to change, what passes, forward or backward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module)
