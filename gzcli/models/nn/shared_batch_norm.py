"""Batch norm over the batch of all ranks, so that several processes compute the same as one.

torch's batch norm uses only the images of its rank. Its `SyncBatchNorm` works only on GPUs, and has no second
derivative. Models are written with torch's layers, which `share_batch_norm` converts in a run of several
ranks. Each rank draws its own dropout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gzcli.core import ranks
from gzcli.models.nn import to_fp32


class AllMean(torch.autograd.Function):
    """`ranks.mean` with gradients of any order, because each rank's loss depends on the inputs of all."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, module: nn.Module) -> Tensor:
        ctx.module = module
        return ranks.mean_over_ranks(t, module).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return AllMean.apply(grad, ctx.module), None


class SharedBatchNorm(_BatchNorm):
    """Batch norm with the mean and the variance of the images of all ranks, and their exact gradient."""

    def forward(self, x: Tensor) -> Tensor:
        count = ranks.sharing(self)
        if count == 1:
            return super().forward(x)
        dims, shape = [0, *range(2, x.ndim)], (1, -1) + (1,) * (x.ndim - 2)
        x_fp32 = to_fp32(x)
        mean = AllMean.apply(x_fp32.mean(dims), self)
        centred = x_fp32 - mean.view(shape)
        var = AllMean.apply(centred.square().mean(dims), self)
        self.update_running(mean.detach(), var.detach(), count * x.numel() // x.shape[1])
        y = centred * (var + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            y = y * to_fp32(self.weight).view(shape) + to_fp32(self.bias).view(shape)
        return y.to(x.dtype)

    @torch.no_grad()
    def update_running(self, mean: Tensor, var: Tensor, n: int) -> None:
        """Updates the running statistics by those of a batch with n values per channel, like torch's
        layers."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        weight = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), weight)
        self.running_var.lerp_((var * (n / (n - 1))).to(self.running_var), weight)

    def _check_input_dim(self, input: Tensor) -> None:
        """Does nothing: unlike torch's layers, it allows any number of dimensions."""


def share_batch_norm(model: nn.Module) -> None:
    """Makes torch's batch norms in a model use the images of all ranks in training. The layers stay the same
    objects, with their parameters and buffers."""
    for module in model.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            module.__class__ = SharedBatchNorm
