"""Solution flow models (SoFlow) — Luo, Yuan & Liu 2025, arXiv:2512.15657: few steps without a teacher and
without derivatives of the network.

    l = t + ρ (s − t),   x_l = x_t + (l − t) v,   v = x_0 − ε
    Δ = (f(x_t, t, s) − f(x_l, l, s)) / (l − t) = (F(x_t, t, s) − [ρ v + (1 − ρ) F(x_l, l, s)]) / ρ

The solution map f has the same value from x_t and from x_l, a little further on the same path, so the mean of
Δ is 0 as l → t. The bracket is a constant target for F. The paper's times run from data to noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gzcli.core.errors import UsageError
from gzcli.core.types import DataInfo
from gzcli.models.denoising.process import per_image
from gzcli.models.flow_matching.average_velocity import AverageVelocity, Interval, IntervalOptions
from gzcli.models.flow_matching.fm import FlowOptions
from gzcli.models.labelled import ClusterOptions
from gzcli.models.nn.nets import NetOptions


class SoFlow(AverageVelocity):
    """A network that learns the solution map of its own flow. Raises UsageError for shares outside 0 … 1.

    rho: ρ at the first and the last step; it changes geometrically in between. At 1 the target is the
      velocity. Smaller values blur less, and need F to be smooth in t.
    """

    paper = "Luo et al. 2025, arXiv:2512.15657"
    rho: Tensor  # a tensor, because a compiled step would freeze a number

    def __init__(
        self,
        data: DataInfo,
        *,
        net: NetOptions = NetOptions(),
        flow: FlowOptions = FlowOptions(),
        rho: tuple[float, float] = (1.0, 0.02),
        intervals: IntervalOptions = IntervalOptions(),
        labels: ClusterOptions = ClusterOptions(),
    ):
        if not all(0 < share <= 1 for share in rho):
            raise UsageError(f"the values of `model.rho` must be above 0 and at most 1, not {list(rho)}")
        super().__init__(data, net=net, flow=flow, intervals=intervals, labels=labels)
        self.ends = rho
        self.register_buffer("rho", torch.tensor(rho[0]), persistent=False)

    def on_step(self, step: int) -> None:
        first, last = self.ends
        self.rho.fill_(first * (last / first) ** min(1.0, (step + 1) / max(1, self.data.steps)))

    def interval_target(self, interval: Interval) -> tuple[Tensor, Tensor]:
        """ρ v + (1 − ρ) F(x_l, l, s), with a guided v. In evaluation, ρ has its last value, so that losses
        are comparable."""
        rho = self.rho if self.training else torch.full_like(self.rho, self.ends[1])
        x, t, v = interval.x, interval.t, interval.v
        if interval.guidance is not None:
            v = v + self.velocity_and_guidance(interval)[1]
        step = rho * (interval.s - t)
        return torch.lerp(self.average(interval, x + per_image(step) * v, t + step), v, rho), rho
