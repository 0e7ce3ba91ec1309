"""Score-based generative modelling — Song et al. 2021, arXiv:2011.13456: a network learns ∇ log p_t of data
under an SDE.

    x_t = α(t) x_0 + σ(t) ε,   score(x_t, t) = −ε̂(x_t, t) / σ(t)
    E λ(t) ‖score(x_t, t) + ε/σ(t)‖²                                                        (eq. 7)

Times run from data at t = 0 to noise at t = 1; images are made by the reverse SDE (eq. 6), or by the ODE of
the same marginals, dx/dt = f x − ½ g² score (eq. 13).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from gzcli.core.types import Batch, DataInfo, Noise, Progress, no_progress
from gzcli.models.denoising.guided import stratified
from gzcli.models.denoising.inpainting import Inpainting
from gzcli.models.denoising.samplers import Denoise, dpmpp
from gzcli.models.denoising.schedule import Level, clean
from gzcli.models.labelled import ClusterOptions
from gzcli.models.nn import to_fp32
from gzcli.models.nn.ode import Velocity, solve
from gzcli.models.score.options import ScoreOptions
from gzcli.models.score.sde import SDE, Spacing

SCALE = 1000.0  # the networks were designed for times 0 … 1000


class ScoreModel(Inpainting):
    """A network that predicts the noise ε in x_t (eps) or, with r² = α² + σ², v = (α ε − σ x_0) / r.

    v has the same variance at every time; for VP it is that of Salimans 2022.

    rescale: whether the network sees x / r in place of x.
    """

    best = "loss"
    walk_back = staticmethod(dpmpp)
    quantiles: Tensor  # of the distribution of times, [4097]

    def __init__(
        self,
        data: DataInfo,
        net: nn.Module,
        sde: SDE,
        score: ScoreOptions,
        labels: ClusterOptions,
        *,
        rescale: bool,
    ):
        super().__init__(data, net, labels)
        self.sde, self.rescale = sde, rescale
        self.prediction, self.weighting = score.prediction, score.weighting
        low, high = (math.atan2(e.sigma, e.alpha) for e in (sde.level(sde.start), sde.level(1.0)))
        u = np.linspace(0, 1, 4097)
        if score.time_sampling == "uniform":
            t = sde.start + u * (1 - sde.start)
        else:
            t = sde.times(np.log(np.tan(low + u * (high - low))))
        self.register_buffer("quantiles", torch.from_numpy(t).float(), persistent=False)

    # ---- training

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The weighted error at one time an image (eq. 7)."""
        x, noise = batch.x, batch.noise
        t = self.draw_times(noise, len(batch))
        alpha, sigma, r = self.at(t)
        eps = noise.randn(*x.shape)
        y, drop = self.training_labels(batch)
        x_t = alpha * x + sigma * eps
        target = eps if self.prediction == "eps" else (alpha * eps - sigma * x) / r
        out = to_fp32(self.net(self.inputs(x_t, r), SCALE * t, y, drop))
        error = (out - target).square().flatten(1).mean(1)  # [B]
        weight = error.new_ones(())
        if self.weighting != "even" and self.prediction == "v":
            weight = (alpha / r).view(-1) ** 2  # the error of ε is α/r times that of v
        if self.weighting == "likelihood":
            weight = weight * self.sde.rates(t)[1] / sigma.view(-1) ** 2
        return {"loss": (weight * error).mean()}

    def draw_times(self, noise: Noise, n: int) -> Tensor:
        """The times of a batch, [B] in [t_min, 1]."""
        u = stratified(noise.rand(n), noise).to(self.quantiles.dtype)
        place = u * (len(self.quantiles) - 1)
        k = place.long().clamp_(max=len(self.quantiles) - 2)
        return torch.lerp(self.quantiles[k], self.quantiles[k + 1], place - k)

    # ---- the network

    def at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """α, σ and r = √(α² + σ²) at t [B], each [B, 1, 1, 1]."""
        alpha, sigma = self.sde.marginal(t[:, None, None, None])
        return alpha, sigma, (alpha**2 + sigma**2).sqrt()

    def inputs(self, x: Tensor, r: Tensor) -> Tensor:
        """The input of the network."""
        return x / r if self.rescale else x

    def split(self, x: Tensor, t: Tensor, y: Tensor | None, guidance: float = 1.0) -> tuple[Tensor, Tensor]:
        """The estimates (x_0, ε) from x at times t [B]."""
        alpha, sigma, r = self.at(t)
        out = self.guided(self.inputs(x, r), SCALE * t, y, guidance)
        if self.prediction == "eps":
            return (x - sigma * out) / alpha, out
        return (alpha * x / r - sigma * out) / r, (sigma * x / r + alpha * out) / r

    def denoiser(
        self,
        y: Tensor | None = None,
        *,
        guidance: float = 1.0,
        interval: Sequence[float] = (0.0, 1.0),
        clip: bool = True,
    ) -> Denoise:
        """The `denoise(x, t)` that samplers call; options as in `SamplingOptions`."""
        self.check_guidance(guidance, y)

        def denoise(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
            scale = guidance if interval[0] <= t <= interval[1] else 1.0
            x0, eps = self.split(x, x.new_full((len(x),), t), y, scale)
            if not clip or self.data.levels is None:
                return x0, eps
            _, alpha, sigma = self.sde.level(t)
            x0 = self.into_range(x0)
            return x0, (x - alpha * x0) / sigma

        return denoise

    def velocity(
        self, y: Tensor | None, guidance: float = 1.0, interval: Sequence[float] = (0.0, 1.0)
    ) -> Velocity:
        """The right-hand side of the probability-flow ODE (eq. 13).

        y: labels that it is conditioned on.
        guidance: strength of the labels.
        interval: times t between which guidance acts.
        """
        self.check_guidance(guidance, y)

        def predict(x: Tensor, t: Tensor, y: Tensor | None, scale: float) -> Tensor:
            return self.split(x, t, y, scale)[1]

        def f(x: Tensor, t: Tensor) -> Tensor:
            eps = self.guided_within(predict, x, t, y, guidance, interval)
            drift, g2 = self.sde.rates(t[:, None, None, None])
            return drift * x + 0.5 * g2 / self.at(t)[1] * eps

        return f

    # ---- along the noise levels

    @property
    def prior_std(self) -> float:
        """The deviation of noise at t = 1."""
        return self.sde.level(1.0).sigma

    def level(self, t: float) -> Level:
        return self.sde.level(t)

    def levels(self, steps: int, *, strength: float = 1.0, even_logsnr: bool = False) -> list[Level]:
        return self.path(steps, "logsnr" if even_logsnr else "karras", strength)

    def path(self, steps: int, spacing: Spacing, strength: float = 1.0) -> list[Level]:
        """The path of `steps` steps from the time `strength` to the clean image."""
        return [*self.sde.spaced(steps, spacing, strength), clean(0.0)]

    def flow(
        self, f: Velocity, x: Tensor, *, steps: int, backwards: bool = False, progress: Progress = no_progress
    ) -> Tensor:
        """The noise of data x, or `backwards` the data of noise x, by `steps` Runge–Kutta steps of f, of four
        network calls each."""
        times = [level.t for level in self.sde.spaced(steps + 1)]
        return solve(f, x, times if backwards else times[::-1], "rk4", progress)
