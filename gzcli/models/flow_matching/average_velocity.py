"""Flows of average velocities: a network F(x, t, s) of two times, whose solution map

    f(x, t, s) = x + (s − t) F(x, t, s)

takes x at time t along the flow to time s in one network call. F(x, t, t) is the velocity of `fm`, so that
its applications, scores and likelihood hold here. Times run from noise at t = 0 to data at t = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gzcli.core.errors import UsageError
from gzcli.core.types import Batch, DataInfo, Noise, Progress, no_progress
from gzcli.models.denoising.denoiser import GuidanceOptions
from gzcli.models.flow_matching.fm import FlowMatching, FlowOptions
from gzcli.models.labelled import ClusterOptions
from gzcli.models.nn import at_least, to_fp32
from gzcli.models.nn.unet import UNet, UNetOptions

SMALLEST = 1e-3  # added to an image's error in its weight


@dataclass(frozen=True)
class MapOptions(GuidanceOptions):
    """The solution maps of a sample, whose F(x, t, s) are guided.

    steps: solution maps from noise to image, each of one network call.
    """

    steps: int = 4


@dataclass(frozen=True)
class IntervalOptions:
    """How the average velocity is trained.

    map_every: one image in so many trains the average over an interval, the others the velocity; 1: all.
    weight_power: p of the weight (e + .001)^−p of an image with the error e; 0: none.
    time_scale: factor of both times as the network's input. The less, the smoother is F in them, and the less
      do its targets over intervals scatter.
    """

    map_every: int = 2
    weight_power: float = 0.5
    time_scale: float = 100.0


class TwoTimes(UNet):
    """A U-Net whose second input is two times, [B, 2]."""

    def __init__(self, *sizes: Any, **options: Any):
        super().__init__(*sizes, **options)
        self.time[0] = nn.Linear(2 * self.dim, 4 * self.dim)


class AverageVelocity(FlowMatching):
    """A U-Net of the average velocity F between two times. A model defines the target of F over intervals.

    The papers train a guided F. Here F(x, t, t) stays the velocity of the data, for likelihoods and scores,
    and guidance acts on F of each call in sampling. That is exact only as s → t, but on MNIST it lowers the
    fd of one call from 141 to 49, and of four from 38 to 19.
    """

    def __init__(
        self,
        data: DataInfo,
        unet: UNetOptions,
        flow: FlowOptions,
        intervals: IntervalOptions,
        labels: ClusterOptions,
    ):
        if flow.prediction != "velocity" or flow.bounded:
            hint = "leave `model.prediction` and `model.bounded` out"
            raise UsageError("a network of average velocities predicts no images", hint=hint)
        super().__init__(data, TwoTimes.of(data, unet, classes=labels.kinds(data)), flow, labels)
        at_least(1, map_every=intervals.map_every)
        self.map_every, self.weight_power = intervals.map_every, intervals.weight_power
        self.time_scale = intervals.time_scale

    def time_input(self, t: Tensor) -> Tensor:
        """The network's second input, t and s − t [B, 2], at times t and s [B, 2]; of t [B], s is t."""
        t, s = (t, t) if t.ndim == 1 else t.unbind(1)
        return self.time_scale * torch.stack([t, s - t], 1)

    # ---- training

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The error of F at s = t towards the velocity, and of `interval_rows` at s > t towards
        `interval_target`; each image's is weighted."""
        n, noise = len(batch), batch.noise
        t, rows = self.draw_times(noise, n), self.interval_rows(noise, n)
        s, ends = t.clone(), torch.stack([noise.rand(n), noise.rand(n)])[:, rows].sort(0).values
        t[rows], s[rows] = self.process.times(ends)
        eps, x = self.noise_and_images(batch)
        y, drop = self.training_labels(batch)
        level = self.process.levels_at(t)
        x_t, v = level.alpha * x + level.sigma * eps, self.target(x, eps, level)
        target, rho = v.clone(), torch.ones_like(t)
        labels = (None, None) if y is None or drop is None else (y[rows], drop[rows])
        with torch.no_grad():
            target[rows], rho[rows] = self.interval_target(x_t[rows], t[rows], s[rows], v[rows], *labels)
        out = to_fp32(self.net(x_t, self.time_input(torch.stack([t, s], 1)), y, drop))
        error = (out - target).square().flatten(1).mean(1)
        power = self.weight_power if self.training else 0.0  # at 1 the loss would tell nothing
        weight = ((error / rho**2).detach() + SMALLEST) ** -power
        return {"loss": (weight * error / rho).mean(), "error": error.detach().mean()}

    def interval_rows(self, noise: Noise, n: int) -> Tensor:
        """Every `map_every`-th row of the global batch, whatever its ranks: of n rows of this process."""
        start, every = getattr(noise, "start", 0), self.map_every
        return (-start % every + every * torch.arange(-(-n // every), device=noise.device)) % n

    def interval_target(
        self, x: Tensor, t: Tensor, s: Tensor, v: Tensor, y: Tensor | None, drop: Tensor | None
    ) -> tuple[Tensor, Tensor | float]:
        """The target of F(x, t, s) for x [B, C, H, W] at t < s [B] on a path of velocity v, and ρ, by which
        an error of F is divided: the share of the interval over which F is compared with itself, or 1."""
        raise NotImplementedError

    # ---- sampling

    @torch.no_grad()
    def sample(  # type: ignore[override]
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        options: MapOptions = MapOptions(),
    ) -> Tensor:
        """n images [n, C, H, W] in [-1, 1] by solution maps from noise at t = 0 to data at t = 1."""
        x, y = self.initial_noise(n, labels, noise, options.size)
        f = self.velocity(y, self.guidance_scale(options.guidance))
        for i, (t, s) in enumerate(pairwise(self.process.ode_times(options.steps))):
            ends = torch.stack([x.new_full((n,), t), x.new_full((n,), s)], 1)
            x = x + (s - t) * f(x, ends)
            progress(i + 1, options.steps, x)
        return self.into_range(x)
