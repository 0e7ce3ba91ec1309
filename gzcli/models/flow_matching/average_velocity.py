"""Flows of average velocities: a network F(x, t, s) of two times, whose solution map

    f(x, t, s) = x + (s − t) F(x, t, s)

moves x from time t along the flow to time s in one network call. F(x, t, t) is the velocity of `fm`, so its
applications, scores and likelihood apply here. Times run from noise at t = 0 to data at t = 1.

Guidance ω is an input of the network (Geng 2025, arXiv:2512.02012), whose targets over intervals are those of
the guided velocity. A guided sample then takes one call, too:

    v + (ω − 1) (F(x, t, t | c) − F(x, t, t | ∅))

MeanFlow (arXiv:2505.13447) mixes ω′ v + κ F(c) + (1 − ω′ − κ) F(∅). Here ω′ = 1, so that guidance adds no
noise to the target, and κ = ω − 1. The mean of the target is the guided velocity ω v(x | c) + (1 − ω) v(x);
at ω = 1 it is that of the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from gzcli.core.errors import UsageError
from gzcli.core.types import Batch, DataInfo, Noise, Progress, no_progress
from gzcli.models.denoising.denoiser import LOSSES, GuidanceOptions
from gzcli.models.denoising.process import per_image
from gzcli.models.flow_matching.fm import FlowMatching, FlowOptions
from gzcli.models.labelled import ClusterOptions
from gzcli.models.nn import at_least, to_fp32
from gzcli.models.nn.nets import NetOptions

WEIGHT_EPS = 1e-3  # added to an image's error in the weight of that image
UNGUIDED = 0.5  # share of images with unguided targets; without them unguided samples are worse


@dataclass(frozen=True)
class MapOptions(GuidanceOptions):
    """The solution maps of a sample.

    steps: number of solution maps from noise to image. Each takes one network call, or two if `guidance` is
      above `model.trained_guidance`.
    """

    steps: int = 4


@dataclass(frozen=True)
class IntervalOptions:
    """How the average velocity is trained.

    map_every: every N-th image trains the average over an interval, the others the velocity. 1: all.
    weight_power: p of the loss weight (e + .001)^−p of an image with error e. 0: unweighted.
    time_scale: factor of both times as inputs of the network. A smaller factor makes F smoother in time and
      its targets over intervals less scattered.
    trained_guidance: largest guidance scale that the network learns, as an input. Guided samples then take
      one call per step instead of two. 1: none. Needs labels or clusters.
    """

    map_every: int = 2
    weight_power: float = 0.5
    time_scale: float = 100.0
    trained_guidance: float = 1.0


@dataclass(frozen=True)
class Interval:
    """Images x [B, C, H, W] at times t [B] on paths of velocity v, the times s > t, and the network's labels.
    guidance: ω of each image, [B], or None."""

    x: Tensor
    t: Tensor
    s: Tensor
    v: Tensor
    y: Tensor | None
    drop: Tensor | None
    guidance: Tensor | None


class AverageVelocity(FlowMatching):
    """A network of the average velocity F between two times. A model defines the target of F over intervals.

    Without `trained_guidance`, guidance is applied to F in each call of sampling, which is exact only as s →
    t.
    """

    differentiates: ClassVar[bool] = False  # whether the target has a derivative of F

    def __init__(
        self,
        data: DataInfo,
        *,
        net: NetOptions = NetOptions(),
        flow: FlowOptions = FlowOptions(),
        intervals: IntervalOptions = IntervalOptions(),
        labels: ClusterOptions = ClusterOptions(),
    ):
        if flow.prediction != "velocity" or flow.bounded or flow.process != "straight":
            hint = "omit `model.prediction`, `model.bounded` and `model.process`"
            raise UsageError(
                "average velocities need straight paths and a network that predicts velocities", hint=hint
            )
        at_least(1, map_every=intervals.map_every, trained_guidance=intervals.trained_guidance)
        if self.differentiates:
            net.check_twice_differentiable()
        classes = labels.kinds(data)
        guided = intervals.trained_guidance > 1 and classes != 0 and labels.label_dropout > 0
        super().__init__(data, net.build(data, classes=classes, times=2 + guided), flow, labels)
        self.map_every, self.weight_power = intervals.map_every, intervals.weight_power
        self.time_scale = intervals.time_scale
        self.trained_guidance = intervals.trained_guidance if guided else 1.0

    def time_input(self, t: Tensor, guidance: Tensor | float = 1.0) -> Tensor:
        """The network's second input: t and s − t, for times t and s [B, 2]; for t [B], s is t. If guidance ω
        is learned, of each image [B] or of all, 1 − 1/ω is a third number: [B, 2 or 3]."""
        t, s = (t, t) if t.ndim == 1 else t.unbind(1)
        times = [t, s - t]
        if self.trained_guidance > 1:
            times.append((1 - 1 / guidance) * torch.ones_like(t))
        return self.time_scale * torch.stack(times, 1)

    def guided_output(self, x: Tensor, t: Tensor, y: Tensor | None, scale: float) -> Tensor:
        """The guided output. At scales of the training it takes one pass of the batch."""
        if y is None or not 1 < scale <= self.trained_guidance:
            return super().guided_output(x, t, y, scale)
        share = torch.full_like(t[:, :1], self.time_scale * (1 - 1 / scale))
        return self.raw_output(x, torch.cat([t[:, :2], share], 1), y)

    # ---- training

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The weighted error of F: at s = t from the velocity, and for `interval_rows` at s > t from
        `interval_target`."""
        n, noise = len(batch), batch.noise
        t, rows = self.draw_times(noise, n), self.interval_rows(noise, n)
        s, ends = t.clone(), torch.stack([noise.rand(n), noise.rand(n)])[:, rows].sort(0).values
        t[rows], s[rows] = self.process.times(ends)
        eps, x = self.noise_and_images(batch)
        y, drop = self.training_labels(batch)
        level = self.process.levels_at(t)
        x_t, v = level.alpha * x + level.sigma * eps, self.target(x, eps, level)
        target, rho, guidance = v.clone(), torch.ones_like(t), torch.ones_like(t)
        labels, hidden = (None if of is None else of[rows] for of in (y, drop))
        scales = None
        if self.trained_guidance > 1:
            scales = guidance[rows] = self.draw_guidance(noise, n, drop)[rows]
        with torch.no_grad():
            interval = Interval(x_t[rows], t[rows], s[rows], v[rows], labels, hidden, scales)
            target[rows], rho[rows] = self.interval_target(interval)
        out = to_fp32(self.net(x_t, self.time_input(torch.stack([t, s], 1), guidance), y, drop))
        error = LOSSES[self.loss_type](out, target, reduction="none").flatten(1).mean(1)
        power = self.weight_power if self.training else 0.0  # at 1 the loss would be nearly constant
        weight = ((error / rho**2).detach() + WEIGHT_EPS) ** -power
        if (by_noise := self.loss_weight(level)) is not None:
            weight = weight * by_noise
        return {"loss": (weight * error / rho).mean(), "error": error.detach().mean()}

    def interval_rows(self, noise: Noise, n: int) -> Tensor:
        """The indices of this process's n rows that are every `map_every`-th row of the global batch, for any
        number of ranks."""
        start, every = getattr(noise, "start", 0), self.map_every
        return (-start % every + every * torch.arange(-(-n // every), device=noise.device)) % n

    def draw_guidance(self, noise: Noise, n: int, drop: Tensor | None) -> Tensor:
        """The guidance of n images, log-uniform in 1 … `trained_guidance`. It is 1 for the fraction
        `UNGUIDED`, and if the label is hidden."""
        share = (noise.rand(n) - UNGUIDED).clamp(min=0) / (1 - UNGUIDED)
        guidance = self.trained_guidance**share
        return guidance if drop is None else guidance.masked_fill(drop, 1.0)

    def interval_target(self, interval: Interval) -> tuple[Tensor, Tensor | float]:
        """The target of F over an interval, and the divisor ρ of F's error. ρ is the fraction of the interval
        over which F is compared with itself, or 1."""
        raise NotImplementedError

    def average(self, of: Interval, x: Tensor, t: Tensor) -> Tensor:
        """F from x at t [B] to the end of the interval."""
        scale = 1.0 if of.guidance is None else of.guidance
        return to_fp32(self.net(x, self.time_input(torch.stack([t, of.s], 1), scale), of.y, of.drop))

    def velocity_and_guidance(self, of: Interval) -> tuple[Tensor, Tensor | float]:
        """F(x, t, t | c), and (ω − 1) (F(x, t, t | c) − F(x, t, t | ∅))."""
        time = self.time_input(of.t)
        if of.guidance is None or of.y is None or of.drop is None:
            return self.raw_output(of.x, time, of.y, of.drop), 0.0
        hidden = torch.cat([of.drop, torch.ones_like(of.drop)])
        x, y = of.x.repeat(2, 1, 1, 1), torch.cat([of.y, of.y])
        labelled, unlabelled = self.raw_output(x, torch.cat([time, time]), y, hidden).chunk(2)
        return labelled, per_image(of.guidance - 1) * (labelled - unlabelled)

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
        """Draws n images [n, C, H, W] in [-1, 1] by solution maps from noise at t = 0 to data at t = 1."""
        x, y = self.initial_noise(n, labels, noise, options.size)
        f = self.velocity(y, self.guidance_scale(options.guidance))
        for i, (t, s) in enumerate(pairwise(self.process.ode_times(options.steps))):
            ends = torch.stack([x.new_full((n,), t), x.new_full((n,), s)], 1)
            x = x + (s - t) * f(x, ends)
            progress(i + 1, options.steps, x)
        return self.into_range(x)
