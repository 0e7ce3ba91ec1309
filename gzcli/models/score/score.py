"""Score-based generative modelling — Song et al. 2021, arXiv:2011.13456: a network learns ∇ log p_t of data
under an SDE.

    x_t = α(t) x_0 + σ(t) ε,   score(x_t, t) = −ε̂(x_t, t) / σ(t)
    E λ(t) ‖score(x_t, t) + ε/σ(t)‖²                                                                     (eq.
    7)

Times run from data at t = 0 to noise at t = 1; images are made by the reverse SDE (eq. 6), or by the ODE of
the same marginals, dx/dt = f x − ½ g² score (eq. 13).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from gzcli.models.diffusion.samplers import Denoise, Randn, dpmpp, heun
from gzcli.models.diffusion.schedule import Level
from gzcli.models.guided import Returning, stratified
from gzcli.models.nn import to_fp32
from gzcli.models.nn.ode import Velocity, solve, solve_adaptive
from gzcli.models.score.samplers import euler_maruyama, predictor_corrector
from gzcli.models.score.sde import SDE, Spacing
from gzcli.types import Batch, DataInfo, Noise, Progress, no_progress

Prediction = Literal["v", "eps"]
Weighting = Literal["even", "score", "likelihood"]
Times = Literal["uniform", "cosine"]
Sampler = Literal["dpmpp", "heun", "em", "pc", "ode"]
Solver = Literal["adaptive", "euler", "midpoint", "heun", "rk4"]

SCALE = 1000.0  # the networks were designed for times 0 … 1000
CLEAN = Level(0.0, 1.0, 0.0)


class ScoreModel(Returning):
    """A network that tells the noise ε in x_t (eps) or, with r² = α² + σ², v = (α ε − σ x_0) / r: between the
    two, of the same size at every time, and for VP that of Salimans 2022.

    weighting: λ(t) = σ² (score: the error of ε), g² (likelihood: a bound of it, Song 2021b,
    arXiv:2101.09258), or even: the plain error of what is predicted. time_sampling: uniform, or cosine:
    uniform in the angle of (α, σ), whichever the SDE, as in the cosine schedule; stratified over the batch.
    rescale: the network sees x / r.
    """

    best = "loss"

    def __init__(
        self,
        data: DataInfo,
        net: nn.Module,
        sde: SDE,
        *,
        prediction: Prediction,
        weighting: Weighting,
        time_sampling: Times,
        rescale: bool,
        conditional: bool,
        label_dropout: float,
    ):
        super().__init__(data, net, conditional=conditional, label_dropout=label_dropout)
        self.sde, self.prediction, self.weighting, self.rescale = sde, prediction, weighting, rescale
        low, high = (math.atan2(e.sigma, e.alpha) for e in (sde.level(sde.start), sde.level(1.0)))
        u = np.linspace(0, 1, 4097)
        t = (
            sde.start + u * (1 - sde.start)
            if time_sampling == "uniform"
            else sde.times(np.log(np.tan(low + u * (high - low))))
        )
        self.register_buffer("quantiles", torch.from_numpy(t).float(), persistent=False)  # of the times

    # ---- training

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The weighted error at one time an image (eq. 7)."""
        x, noise = batch.x, batch.noise
        t = self.draw_times(noise, len(batch)).to(x)
        alpha, sigma, r = self.at(t)
        eps = noise.randn(*x.shape).to(x)
        y, drop = self.training_labels(batch)
        x_t = alpha * x + sigma * eps
        target = eps if self.prediction == "eps" else (alpha * eps - sigma * x) / r
        out = to_fp32(self.net(self.inputs(x_t, r), SCALE * t, y, drop))
        error = (out - target).square().flatten(1).mean(1)  # [B]
        weight = 1.0
        if self.weighting != "even" and self.prediction == "v":
            weight = (alpha / r).view(-1) ** 2  # the error of ε is α/r times that of v
        if self.weighting == "likelihood":
            weight = weight * self.sde.rates(t)[1] / sigma.view(-1) ** 2
        return {"loss": (weight * error).mean()}

    def draw_times(self, noise: Noise, n: int) -> Tensor:
        """[B] in [t_min, 1]."""
        place = stratified(noise.rand(n), noise).to(self.quantiles) * (len(self.quantiles) - 1)
        k = place.long().clamp_(max=len(self.quantiles) - 2)
        return torch.lerp(self.quantiles[k], self.quantiles[k + 1], place - k)

    # ---- the network

    def at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """α, σ and r = √(α² + σ²) at t [B], each [B, 1, 1, 1]."""
        alpha, sigma = self.sde.marginal(t[:, None, None, None])
        return alpha, sigma, (alpha**2 + sigma**2).sqrt()

    def inputs(self, x: Tensor, r: Tensor) -> Tensor:
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
        """The `denoise(x, t)` that samplers call; options as in `sample`."""
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
        """The right-hand side of the probability-flow ODE (eq. 13), guided within the `interval` of t."""
        self.check_guidance(guidance, y)

        def predict(x: Tensor, t: Tensor, y: Tensor | None, scale: float) -> Tensor:
            return self.split(x, t, y, scale)[1]

        whole = guidance == 1 or (interval[0] <= 0 and interval[1] >= 1)

        def f(x: Tensor, t: Tensor) -> Tensor:
            eps = (
                predict(x, t, y, guidance)
                if whole
                else self.guided_within(predict, x, t, y, guidance, interval)
            )
            drift, g2 = self.sde.rates(t[:, None, None, None])
            return drift * x + 0.5 * g2 / self.at(t)[1] * eps

        return f

    # ---- sampling

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        sampler: Sampler = "dpmpp",
        steps: int = 25,
        spacing: Spacing = "karras",
        corrector: int = 1,
        snr: float = 0.16,
        solver: Solver = "adaptive",
        tolerance: float = 1e-4,
        guidance: float = 1.0,
        interval: tuple[float, float] = (0.0, 1.0),
        clip: bool = True,
    ) -> Tensor:
        """n images [n, C, H, W] in [-1, 1] from noise.

        Of the ODE: dpmpp, `steps` network calls (Lu 2022b), heun, 2 steps − 1 (Karras 2022), ode, by a
        general `solver`: adaptive to `tolerance`, or `steps` − 1 steps of one call (euler), two (midpoint,
        heun) or four (rk4). Of the SDE, which wants hundreds of uniform steps: em, Euler–Maruyama, `steps`
        calls, and pc, with `corrector` Langevin steps of signal-to-noise ratio `snr` between two, steps +
        corrector · (steps − 1) calls.
        guidance: 1 = the labels as trained, 0 = without them, more = sharper (Ho 2022), within the `interval`
        of t.
        clip: estimates of x_0 into [-1, 1], but in `ode`.
        """
        x = self.prior_std * noise.randn(n, *self.data.shape).to(self.device)
        y = self.asked_labels(labels, n)
        if sampler == "ode":
            f = self.velocity(y, guidance, interval)
            if solver == "adaptive":
                x = solve_adaptive(
                    f, x, 1.0, self.sde.stop, rtol=tolerance, atol=tolerance, progress=progress
                )
            else:
                x = solve(f, x, [level.t for level in self.sde.spaced(steps, spacing)], solver, progress)
            return self.into_range(x)
        denoise = self.denoiser(y, guidance=guidance, interval=interval, clip=clip)
        path = [*self.sde.spaced(steps, spacing), CLEAN]
        randn = self.fresh(noise, x)
        if sampler == "dpmpp":
            x = dpmpp(denoise, x, path, progress=progress)
        elif sampler == "heun":
            x = heun(denoise, x, path, progress=progress)
        elif sampler == "em":
            x = euler_maruyama(denoise, x, path, self.sde, randn=randn, progress=progress)
        else:
            x = predictor_corrector(
                denoise, x, path, corrector=corrector, snr=snr, randn=randn, progress=progress
            )
        return self.into_range(x)

    @property
    def prior_std(self) -> float:
        """Of the noise at t = 1."""
        return self.sde.level(1.0).sigma

    @staticmethod
    def fresh(noise: Noise, like: Tensor) -> Randn:
        return lambda: noise.randn(*like.shape).to(like)

    def flow(
        self, f: Velocity, x: Tensor, *, steps: int, backwards: bool = False, progress: Progress = no_progress
    ) -> Tensor:
        """x carried from data to noise by `steps` Runge–Kutta steps of f, four network calls each; or
        `backwards`."""
        times = [level.t for level in self.sde.spaced(steps + 1)]
        return solve(f, x, times if backwards else times[::-1], "rk4", progress)
