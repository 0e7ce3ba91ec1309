"""A network that denoises: what it estimates, how it is trained, and how it is guided by labels.

The inputs of the network net(x, t, y, drop) are the noised image x [B, C, H, W]; its time t [B], or [B, 2]
for a network of two times; labels y [B] or [B, K], None where they are unknown; and drop [B], the rows whose
label is hidden. It predicts one of four functions of x_t = α x_0 + σ ε, and each gives x_0 and ε:

    eps       ε
    x0        x_0
    v         (α ε − σ x_0) / √(α² + σ²), of the same variance at every time (Salimans 2022)
    velocity  dx_t/dt = α′ x_0 + σ′ ε
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gzcli.core.errors import UsageError
from gzcli.core.types import Batch, DataInfo, Noise, Progress
from gzcli.core.units import Size, sides
from gzcli.models.denoising.ode import (
    LikelihoodOptions,
    Velocity,
    dequantised,
    grey_levels,
    log_density,
)
from gzcli.models.denoising.process import Level, Levels, Process, TimeSampling, draw_times
from gzcli.models.denoising.samplers import Denoise, Estimate, Sampler, draws_like
from gzcli.models.labelled import ClusterOptions, Labelled
from gzcli.models.nn import to_fp32

Prediction = Literal["eps", "x0", "v", "velocity"]


class Denoiser(Labelled):
    """A network on a process.

    prediction: what the network predicts.
    time_sampling: how a batch draws its times.
    rescale: whether the network sees x / √(α² + σ²) in place of x.
    """

    latents = True
    best = "loss"
    net: nn.Module
    process: Process

    def __init__(
        self,
        data: DataInfo,
        net: nn.Module,
        process: Process,
        labels: ClusterOptions,
        *,
        prediction: Prediction,
        time_sampling: TimeSampling = "stratified",
        rescale: bool = False,
    ):
        super().__init__(data, labels)
        self.net, self.process = net, process
        self.prediction, self.time_sampling, self.rescale = prediction, time_sampling, rescale

    # ---- training

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The error of the network's prediction at one random time an image."""
        t = self.draw_times(batch.noise, len(batch))
        eps, x = self.ends(batch)
        y, drop = self.training_labels(batch)
        at = self.process.levels_at(t)
        x_t = at.alpha * x + at.sigma * eps
        inputs = self.inputs(x_t, at, self.training_guide(batch))
        out = to_fp32(self.net(inputs, self.clock(t), y, drop))
        return self.objective(out, self.target(x, eps, at), at)

    def draw_times(self, noise: Noise, n: int) -> Tensor:
        """The times of a batch, [n]."""
        return draw_times(self.process, noise, n, self.time_sampling)

    def ends(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The noise ε and the images x_0 [B, C, H, W] of a batch."""
        return batch.noise.randn(*batch.x.shape), batch.x

    def target(self, x: Tensor, eps: Tensor, at: Level | Levels) -> Tensor:
        """What the network is to predict."""
        if self.prediction == "eps":
            return eps
        if self.prediction == "x0":
            return x
        if self.prediction == "v":
            return (at.alpha * eps - at.sigma * x) / self.process.norm(at)
        d_alpha, d_sigma = self.process.derivatives(at.t)
        return d_alpha * x + d_sigma * eps

    def objective(self, out: Tensor, target: Tensor, at: Levels) -> dict[str, Tensor]:
        """The loss of predictions at these noise levels, and what is logged beside it."""
        return {"loss": (out - target).square().mean()}

    # ---- the network

    def inputs(self, x: Tensor, at: Level | Levels, guide: Tensor | None = None) -> Tensor:
        """The first input of the network, with an image that guides it if the network takes one."""
        return x / self.process.norm(at) if self.rescale else x

    def clock(self, t: Tensor) -> Tensor:
        """The network's second input at times t [B]; a network of two times gets t twice, [B, 2]."""
        return self.process.scale * t

    def training_guide(self, batch: Batch) -> Tensor | None:
        """The image that guides the network in training."""
        return None

    def output(
        self,
        x: Tensor,
        at: Level | Levels,
        y: Tensor | None = None,
        scale: float = 1.0,
        guide: Tensor | None = None,
    ) -> Tensor:
        """The guided output at noise levels `at`."""
        t = at.t if isinstance(at.t, Tensor) else x.new_full((len(x),), at.t)
        return self.guided(self.inputs(x, at, guide), self.clock(t), y, scale)

    def guided(self, x: Tensor, t: Tensor, y: Tensor | None, scale: float) -> Tensor:
        """The output u + scale · (c − u) in fp32, of c with labels and u without (Ho & Salimans 2022,
        arXiv:2207.12598, eq. 6): one pass of a doubled batch, at scales 1 and 0 of the batch alone."""
        if y is None or scale in (0, 1):
            return to_fp32(self.net(x, t, y if scale else None))
        n = x.shape[0]
        hidden = torch.arange(2 * n, device=x.device) >= n
        both = to_fp32(self.net(x.repeat(2, 1, 1, 1), torch.cat([t, t]), torch.cat([y, y]), hidden))
        return torch.lerp(both[n:], both[:n], scale)

    def split(self, out: Tensor, x: Tensor, at: Level | Levels) -> Estimate:
        """The estimates of x_0 and ε that an output at x means."""
        alpha, sigma = at.alpha, at.sigma
        if self.prediction == "eps":
            return Estimate((x - sigma * out) / alpha, out)
        if self.prediction == "x0":
            return Estimate(out, (x - alpha * out) / sigma)
        if self.prediction == "v":
            r = self.process.norm(at)
            return Estimate((alpha * x / r - sigma * out) / r, (sigma * x / r + alpha * out) / r)
        d_alpha, d_sigma = self.process.derivatives(at.t)
        det = alpha * d_sigma - sigma * d_alpha
        return Estimate((d_sigma * x - sigma * out) / det, (alpha * out - d_alpha * x) / det)

    def estimate(
        self,
        x: Tensor,
        at: Level | Levels,
        y: Tensor | None = None,
        scale: float = 1.0,
        guide: Tensor | None = None,
    ) -> Estimate:
        """The guided estimates of x_0 and ε at noise levels `at`."""
        return self.split(self.output(x, at, y, scale, guide), x, at)

    def denoiser(
        self,
        y: Tensor | None = None,
        *,
        guidance: float = 1.0,
        interval: Sequence[float] = (0.0, 1.0),
        clip: bool = True,
        dynamic: float | None = None,
        guide: Tensor | None = None,
    ) -> Denoise:
        """The function `denoise(x, t)` of samplers.

        y: labels that the estimates are conditioned on.
        guidance: strength of the labels, at times in `interval`, in shares of the longest.
        clip: whether x_0 is brought into the range of images, by `dynamic` as `into_range` does.
        guide: an image that guides the network.
        """
        self.check_guidance(guidance, y)

        def denoise(x: Tensor, t: float) -> Estimate:
            scale = guidance if interval[0] <= t / self.process.longest <= interval[1] else 1.0
            at = self.process.level_of(x, t)
            x0, eps = self.estimate(x, at, y, scale, guide)
            if not clip or self.data.levels is None:
                return Estimate(x0, eps)
            level, x0 = self.process.level(t), self.into_range(x0, dynamic)
            return Estimate(x0, (x - level.alpha * x0) / level.sigma)

        return denoise

    def velocity(
        self, y: Tensor | None = None, guidance: float = 1.0, interval: Sequence[float] = (0.0, 1.0)
    ) -> Velocity:
        """The right-hand side of the probability-flow ODE, for solvers; arguments as in `denoiser`.

        Raises UsageError for guidance without labels.
        """
        self.check_guidance(guidance, y)

        def predict(x: Tensor, t: Tensor, y: Tensor | None, scale: float) -> Tensor:
            return self.output(x, self.process.levels_at(t), y, scale)

        def f(x: Tensor, t: Tensor) -> Tensor:
            out = guided_within(predict, x, t, y, guidance, interval)
            if self.prediction == "velocity":
                return out
            return self.process.velocity(x, *self.split(out, x, self.process.levels_at(t)), t)

        return f

    def into_range(self, x0: Tensor, dynamic: float | None = None) -> Tensor:
        """Images clamped to [-1, 1], or thresholded at the quantile `dynamic` of |x_0| (Saharia 2022);
        latents unchanged."""
        if self.data.levels is None:
            return x0
        if dynamic is None:
            return x0.clamp(-1, 1)
        s = x0.abs().flatten(1).quantile(dynamic, 1).clamp(min=1)[:, None, None, None]
        return x0.clamp(-s, s) / s

    # ---- sampling

    def draw(
        self, n: int, labels: Tensor | None, noise: Noise, progress: Progress, options: Any, walk: Sampler
    ) -> Tensor:
        """n images [n, C, H, W] in [-1, 1] by a sampler, with a family's `options` of sampling."""
        x, y = self.start(n, labels, noise, options.size)
        denoise = self.denoiser(
            y,
            guidance=self.strength(options.guidance),
            interval=options.interval,
            clip=options.clip,
            dynamic=getattr(options, "dynamic", None),
        )
        path = self.process.path(options.steps, options.spacing)
        return self.into_range(walk(denoise, x, path, randn=draws_like(noise, x), progress=progress))

    def start(
        self, n: int, labels: Tensor | None, noise: Noise, size: Size | None
    ) -> tuple[Tensor, Tensor | None]:
        """The noise that n images are drawn from, and their labels."""
        x = self.process.prior_std * noise.randn(n, *self.shape_of(size))
        return x, self.sampled_labels(labels, n, noise)

    def shape_of(self, size: Size | None) -> tuple[int, ...]:
        """The shape (C, H, W) of images of a size in pixels; None: that of training. Raises UsageError for
        another size where the network is made for one, or where latents are drawn."""
        if size is None or sides(size) == self.data.shape[1:]:
            return self.data.shape
        if self.data.levels is None or not getattr(self.net, "any_size", False):
            why = "latents" if self.data.levels is None else "one size of images"
            height, width = self.data.shape[1:]
            raise UsageError(
                f"`size` {size}: the network of `{type(self).__name__}` is made for {why}",
                hint=f"leave `size` out: it draws {width}×{height}; the U-Nets of ddpm, fm and sgm draw any",
            )
        return self.data.shape[0], *sides(size)


def guided_within(
    predict: Callable[[Tensor, Tensor, Tensor | None, float], Tensor],
    x: Tensor,
    t: Tensor,
    y: Tensor | None,
    scale: float,
    interval: Sequence[float],
) -> Tensor:
    """predict(x, t, y, scale) for rows whose time is in the interval; for the others predict(x, t, y, 1), by
    half the passes of the network (Kynkäänniemi 2024, arXiv:2404.07724)."""
    low, high = interval
    if scale == 1 or (low <= 0 and high >= 1):
        return predict(x, t, y, scale)
    inside = (low <= t) & (t <= high)
    if bool(inside.all()):
        return predict(x, t, y, scale)
    if not bool(inside.any()):
        return predict(x, t, y, 1.0)
    out = torch.empty_like(x)
    for rows, strength in ((inside, scale), (~inside, 1.0)):
        out[rows] = predict(x[rows], t[rows], None if y is None else y[rows], strength)
    return out


class LikelihoodByODE(Denoiser):
    """A denoiser whose likelihood is that of its probability-flow ODE."""

    likelihood = "ode"

    def log_prob(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        *,
        noise: Noise,
        ode: LikelihoodOptions = LikelihoodOptions(),
    ) -> Tensor:
        """[B] nats of the discrete image by the ODE from data to noise, see ode.py. Raises UsageError for
        latents."""
        levels = grey_levels(self.data.levels)
        path = self.process.rising(dequantised(levels), ode.steps)
        return log_density(
            self.velocity(self.known_labels(labels)),
            x,
            [level.t for level in path],
            ode,
            levels=levels,
            alpha=path[0].alpha,
            noise=noise,
            std=self.process.prior_std,
        )
