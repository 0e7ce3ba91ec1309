"""Variational dequantisation (Ho et al. 2019, "Flow++", arXiv:1902.00275, §3.1), which learns the noise on
the grey levels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.core.errors import UsageError
from gzcli.core.types import DataInfo, Noise
from gzcli.models.normalizing_flow import layers
from gzcli.models.normalizing_flow.nets import ActNormConv, ConvNet


def grey_levels(data: DataInfo) -> int:
    """The number of grey levels of images. Raises UsageError for latents, which have none."""
    if data.levels is None:
        raise UsageError(
            "`model.dequant` is for grey levels, and latents have none", hint="set `model.dequant=uniform`"
        )
    return data.levels


class VariationalDequantiser(nn.Module):
    """u ~ q(u | x) on [0, 1)^D: logistic noise through couplings conditioned on x, then a sigmoid.

    log P(x) ≥ E_q[log p((k + u) / L) − log q(u | x)] − D log L (eq. 12). It starts as uniform noise.

    depth: number of couplings.
    hidden: channels of the couplings' networks.
    """

    def __init__(self, data: DataInfo, *, depth: int = 4, hidden: int = 32):
        super().__init__()
        self.levels = grey_levels(data)
        channels = 4 * data.shape[0]  # squeezed
        kept = channels // 2
        self.context = ActNormConv(channels, hidden, 3)
        self.steps = nn.ModuleList(
            layers.AffineCoupling(channels, ConvNet(kept + hidden, channels, hidden), flip=i % 2 == 1)
            for i in range(depth)
        )

    def forward(self, x: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """x [B, C, H, W] in [-1, 1] → v = (k + u) / L, and log q(u | x) [B]."""
        tiny = torch.finfo(x.dtype).eps
        base = noise.rand(*x.shape).to(x.dtype).clamp(tiny, 1 - tiny)
        y = layers.squeeze(base.logit())
        log_q = log_logistic(y)
        context = F.relu(self.context(layers.squeeze(x)))
        for step in self.steps:
            y, log_det = step(y, context)
            log_q = log_q - log_det
        # du/dy of the sigmoid is the logistic density
        v, _ = layers.dequantise(x, self.levels, layers.unsqueeze(y).sigmoid())
        return v, log_q - log_logistic(y)


def log_logistic(y: Tensor) -> Tensor:
    """The log-density of the standard logistic distribution, summed over all but the first dimension, [B]."""
    return -(F.softplus(y) + F.softplus(-y)).flatten(1).sum(1)
