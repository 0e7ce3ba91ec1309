"""Consistency functions f(x, σ), which map every point of a path of the ODE to its image (Song 2023,
arXiv:2303.01469), and their loss by Geng 2024, "Consistency Models Made Easy", arXiv:2406.14548.

    x_t = x_0 + t ε,   x_r = x_0 + r ε,   r < t of the same image and noise
    E ‖f(x_t, t) − sg f(x_r, r)‖ / (t − r),   f(x, 0) = x                                  (eq. 7, 12)
    1 − r/t = q^−(s + 1) n(t),   n(t) = 1 + 8 sigmoid(−t),   at r = 0 if that is above 1    (eq. 14)

The stages s = 0, 1, … bring r closer to t. σ is the noise-to-signal ratio of a process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gzcli.core.errors import UsageError
from gzcli.core.types import Batch, DataInfo
from gzcli.models.denoising.denoiser import Denoiser
from gzcli.models.denoising.process import SIGMA_MAX, Level, Process, normal_draws, per_image, stratified
from gzcli.models.labelled import ClusterOptions, Guidance
from gzcli.models.nn import at_least

SMOOTH = 1e-3  # added under the root of ‖f(x_t, t) − f(x_r, r)‖ / (t − r), which has no gradient at 0
K = 8.0  # of n(t)
CELLS = 512  # cells of the table of times, equally spaced in ln σ


@dataclass(frozen=True)
class ConsistencyOptions:
    """How a consistency function is trained.

    log_mean: mean of ln t.
    log_std: standard deviation of ln t.
    q: factor by which each stage brings r closer to t; above 1.
    stages: number of stages of equal length. In the last, 1 − r/t is between q^−stages and nine times that.
    """

    log_mean: float = -1.1
    log_std: float = 2.0
    q: float = 2.0
    stages: int = 8


class ConsistencyFunction(Denoiser):
    """A network whose estimate of x_0 is the end of the path through x, instead of the mean of the images
    that x may come from. So it has neither a likelihood nor the applications of a denoiser.

    least: σ below which an image is clean.
    """

    watched = None  # its loss compares it with itself
    levels: Tensor  # [CELLS + 1, 2], the process's t and α from σ = least to its largest, at most SIGMA_MAX

    def __init__(
        self,
        data: DataInfo,
        net: nn.Module,
        process: Process,
        labels: ClusterOptions,
        tuning: ConsistencyOptions,
        least: float,
    ):
        if tuning.q <= 1:
            raise UsageError(f"`model.q` must be above 1, not {tuning.q:g}")
        at_least(1, stages=tuning.stages)
        super().__init__(data, net, process, labels)
        self.tuning, self.least = tuning, least
        top = process.ratio_level(SIGMA_MAX)
        self.sigma_max = top.sigma / top.alpha
        levels = map(process.ratio_level, np.geomspace(least, self.sigma_max, CELLS + 1).tolist())
        table = torch.tensor([[level.t, level.alpha] for level in levels], device="cpu")
        self.register_buffer("levels", table, persistent=False)
        self.on_step(-1)

    # ---- the function

    def level_of(self, sigma: Tensor) -> Level:
        """The process's levels with noise-to-signal ratios sigma [B]."""
        place = (sigma / self.least).log() * (CELLS / math.log(self.sigma_max / self.least))
        k = place.long().clamp(0, CELLS - 1)
        t, alpha = torch.lerp(self.levels[k], self.levels[k + 1], (place - k)[:, None].to(self.levels)).T
        return Level(t, per_image(alpha), per_image(alpha * sigma))

    def consistent(self, x: Tensor, sigma: Tensor, y: Tensor | None) -> Tensor:
        """f(x, σ) for x = x_0 + σ ε, with sigma [B] at least `least`."""
        level = self.level_of(sigma)
        return self.estimate(level.alpha * x, level, y).x0

    def guidance_scale(self, guidance: Guidance) -> float:
        """Always 1, because the mixture of two consistency functions is not one."""
        return 1.0

    # ---- training

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        eps, y = batch.noise.randn(*batch.x.shape), self.condition(batch)
        z = normal_draws(stratified(batch.noise.rand(len(batch)), batch.noise))
        t = (self.tuning.log_mean + self.tuning.log_std * z).exp()
        t = t.clamp(2 * self.least, self.sigma_max)
        r = t * (1 - self.gap * (1 + K * (-t).sigmoid()))
        r = torch.where(r < self.least, 0.0, r)
        x_t = batch.x + per_image(t) * eps
        with torch.no_grad():
            x_r = x_t + per_image(r - t) * self.guided(eps, x_t, t, y)
            target = torch.where(per_image(r) > 0, self.consistent(x_r, r.clamp(min=self.least), y), x_r)
        slope = (self.consistent(x_t, t, y) - target) / per_image(t - r)
        return {"loss": (slope.square().flatten(1).mean(1) + SMOOTH**2).sqrt().mean()}

    def guided(self, eps: Tensor, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """The noise along which x_t moves to x_r."""
        return eps

    def on_step(self, step: int) -> None:
        """Sets 1 − r/t at large t for the stage of the next step."""
        stage = (step + 1) * self.tuning.stages // max(self.data.steps, 1)
        self.gap = self.tuning.q ** -(min(stage, self.tuning.stages - 1) + 1)
