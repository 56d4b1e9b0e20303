"""Synchronized BatchNorm: torch's on accelerators, and an equivalent on CPUs, which torch lacks.

Shapes: N images of this process, C channels, S positions of an image (H x W, or any others).
"""

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm


def synchronize_batch_norms(model: nn.Module, device: torch.device) -> nn.Module:
    """Make every BatchNorm in `model` compute its statistics over all processes. Names and values are unchanged."""
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                setattr(parent, name, _SyncBatchNorm(child))
    return model


class _SyncBatchNorm(_BatchNorm):
    """A BatchNorm with training statistics over all processes, for any device."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.weight, self.bias = norm.weight, norm.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(self, name, getattr(norm, name))
        self.train(norm.training)

    def _check_input_dim(self, input: Tensor) -> None: ...

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x_NCS = input.float().flatten(2) if input.dtype != torch.float64 else input.flatten(2)
        count_1 = x_NCS.new_tensor([x_NCS.shape[0] * x_NCS.shape[2]])
        sums_and_count = all_reduce(torch.cat((x_NCS.sum((0, 2)), count_1)))
        count = sums_and_count[-1]
        if count <= 1:  # Equal on all processes, so that all raise.
            raise ValueError(
                f"Expected more than 1 value per channel when training, got {int(count)} in the batches of all "
                "processes: train with more images in each batch, or with larger ones"
            )
        mean_C = sums_and_count[:-1] / count
        centered_NCS = x_NCS - mean_C[:, None]
        var_C = all_reduce(centered_NCS.square().sum((0, 2))) / count
        if self.running_mean is not None:
            self._update_running_statistics(mean_C.detach(), (var_C * count / (count - 1)).detach())
        normal_NCS = centered_NCS * (var_C + self.eps).rsqrt()[:, None]
        if self.affine:
            normal_NCS = normal_NCS * self.weight[:, None] + self.bias[:, None]
        return normal_NCS.to(input.dtype).view_as(input)

    def _update_running_statistics(self, mean_C: Tensor, var_C: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(var_C.to(self.running_var.dtype), momentum)
