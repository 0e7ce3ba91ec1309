"""Score-based generative modelling through SDEs — Song et al. 2021, arXiv:2011.13456: a network learns
∇ log p_t of data under an SDE.

    x_t = α(t) x_0 + σ(t) ε,   score(x_t, t) = −ε̂(x_t, t) / σ(t)
    E λ(t) ‖score(x_t, t) + ε/σ(t)‖²                                                        (eq. 7)

Times run from data at t = 0 to noise at t = 1; images are made by the reverse SDE (eq. 6), or by the ODE of
the same marginals, dx/dt = f x − ½ g² score (eq. 13).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor, nn

from gzcli.core.types import DataInfo, Noise, Progress, no_progress
from gzcli.models.denoising import samplers
from gzcli.models.denoising.applications import NoiseApplications
from gzcli.models.denoising.denoiser import EstimateOptions, LikelihoodByODE, WalkOptions
from gzcli.models.denoising.process import SDE, VE, VP, Level, Shift, SubVP, shift_of, stratified
from gzcli.models.denoising.samplers import Sampler, Solver, solve
from gzcli.models.labelled import ClusterOptions
from gzcli.models.nn.unet import UNet, UNetOptions

Spacing = Literal["uniform", "karras", "logsnr"]


@dataclass(frozen=True)
class SDEOptions:
    """The stochastic differential equation.

    sde: stochastic differential equation: variance preserving (vp), sub-VP (subvp) or variance exploding
      (ve).
    beta_min: β at t = 0, for vp and subvp.
    shift: factor of the noise-to-signal ratio √(1 − α²)/α, for vp and subvp. auto: side / 64, at least 1
      (Hoogeboom 2023, arXiv:2301.11093).
    sigma_min: σ at t = 0, for ve and images in [-1, 1].
    sigma_max: σ at t = 1.
    t_min: smallest time of training and likelihoods, 0 … 1. Its noise limits the likelihood of a constant
      pixel: with 256 levels, σ = .01 costs 1.2 nats and .002 costs .2.
    """

    sde: Annotated[str, SDES] = "vp"
    beta_min: float = 0.1
    shift: Shift = 1.0
    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 1e-5


SDES: dict[str, Callable[[SDEOptions, float], SDE]] = {
    "vp": lambda options, shift: VP(options.t_min, options.beta_min, shift),
    "subvp": lambda options, shift: SubVP(options.t_min, options.beta_min, shift),
    "ve": lambda options, _: VE(options.t_min, options.sigma_min, options.sigma_max),
}


@dataclass(frozen=True)
class ScoreOptions(EstimateOptions):
    """The training loss.

    prediction: prediction target: the noise (eps), or v = (α ε − σ x_0) / √(α² + σ²).
    weighting: loss weight λ(t): σ², the unweighted error of ε (score); g², a bound of the likelihood
      (likelihood; Song 2021b, arXiv:2101.09258); or the unweighted error of the prediction (even).
    time_sampling: distribution of training times, one from each of B equal intervals: uniform in t (uniform),
      or in the angle of (α, σ) as in the cosine schedule (cosine).
    """

    prediction: Literal["v", "eps"] = "v"
    weighting: Literal["even", "score", "likelihood"] = "even"
    time_sampling: Literal["uniform", "cosine"] = "cosine"


@dataclass(frozen=True)
class SamplingOptions(WalkOptions):
    """The sampler, its steps and guidance.

    sampler: a solver of the ODE or of the SDE. ODE: dpmpp (Lu 2022b), heun (2 · steps − 1 calls; Karras
      2022), or ode (a general `solver`, which never clamps). SDE: dpmpp_sde or,
      with hundreds of uniform steps, em (Euler–Maruyama) or pc (predictor–corrector; steps + corrector ·
      (steps − 1) calls).
    steps: number of noise levels.
    spacing: spacing of the noise levels: uniform in t (uniform), in the 7th root of σ/α (karras; Karras 2022,
      eq. 5), or in log σ/α (logsnr).
    corrector: Langevin steps of pc at each level.
    snr: signal-to-noise ratio of the Langevin steps.
    churn: S_churn of heun (Karras 2022, algorithm 2). 0: no new noise.
    solver: solver of `ode`: adaptive to `tolerance`, or steps − 1 steps of one network call (euler, adams),
      two (midpoint, heun) or four (rk4).
    tolerance: largest error of an adaptive step, for images in [-1, 1].
    """

    sampler: Annotated[str, SAMPLERS, "ode"] = "dpmpp"
    steps: int = 25
    spacing: Spacing = "karras"
    corrector: int = 1
    snr: float = 0.16
    churn: float = 0.0
    solver: Solver = "adaptive"
    tolerance: float = 1e-4


SAMPLERS: dict[str, Callable[[SamplingOptions, SDE], Sampler]] = {
    "dpmpp": lambda *_: samplers.dpmpp,
    "dpmpp_sde": lambda *_: partial(samplers.dpmpp, noisy=True),
    "heun": lambda options, sde: partial(samplers.heun, churn=options.churn, level=sde.ratio_level),
    "em": lambda _, sde: partial(samplers.euler_maruyama, sde=sde),
    "pc": lambda options, _: partial(
        samplers.predictor_corrector, corrector=options.corrector, snr=options.snr
    ),
}


class ScoreModel(NoiseApplications):
    """A network on an SDE that predicts ε or v, which for VP is that of Salimans 2022."""

    reverse_sampler = staticmethod(samplers.dpmpp)
    ode_solver = ("rk4", 10)
    rescale = True
    process: SDE
    quantiles: Tensor  # of the distribution of times, [4097]

    def __init__(self, data: DataInfo, net: nn.Module, sde: SDE, score: ScoreOptions, labels: ClusterOptions):
        super().__init__(data, net, sde, labels)
        self.prediction = score.prediction
        self.weighting, self.bounded = score.weighting, score.bounded
        u = np.linspace(0, 1, 4097)
        if score.time_sampling == "uniform":
            t = sde.clean + u * (1 - sde.clean)
        else:
            ends = sde.level(sde.clean), sde.level(1.0)
            low, high = (math.atan2(level.sigma, level.alpha) for level in ends)
            t = sde.times_at(np.log(np.tan(low + u * (high - low))))
        self.register_buffer("quantiles", torch.from_numpy(t).float(), persistent=False)

    # ---- training

    def draw_times(self, noise: Noise, n: int) -> Tensor:
        u = stratified(noise.rand(n), noise).to(self.quantiles.dtype)
        place = u * (len(self.quantiles) - 1)
        k = place.long().clamp_(max=len(self.quantiles) - 2)
        return torch.lerp(self.quantiles[k], self.quantiles[k + 1], place - k)

    def objective(self, out: Tensor, target: Tensor, level: Level) -> dict[str, Tensor]:
        error = (out - target).square().flatten(1).mean(1)  # [B]
        weight = error.new_ones(())
        if self.weighting != "even" and self.prediction == "v":
            # the error of ε is α/r times that of v
            weight = (level.alpha / self.process.norm(level)).view(-1) ** 2
        if self.weighting == "likelihood":
            weight = weight * self.process.rates(level.t)[1] / level.sigma.view(-1) ** 2
        return {"loss": (weight * error).mean()}

    # ---- sampling

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        options: SamplingOptions = SamplingOptions(),
    ) -> Tensor:
        """n images [n, C, H, W] in [-1, 1] from noise."""
        if options.sampler == "ode":
            x, y = self.initial_noise(n, labels, noise, options.size)
            f = self.velocity(y, self.guidance_scale(options.guidance), options.interval)
            times = [level.t for level in self.process.path(options.steps, options.spacing)[:-1]]
            x = solve(f, x, times, options.solver, tolerance=options.tolerance, progress=progress)
            return self.into_range(x)
        sampler = SAMPLERS[options.sampler](options, self.process)
        return self.draw(n, labels, noise, progress, options, sampler)


class SGM(LikelihoodByODE, ScoreModel):
    """A U-Net that predicts the score."""

    paper = "Song et al. 2021, arXiv:2011.13456"

    def __init__(
        self,
        data: DataInfo,
        *,
        unet: UNetOptions = UNetOptions(),
        sde: SDEOptions = SDEOptions(),
        score: ScoreOptions = ScoreOptions(),
        labels: ClusterOptions = ClusterOptions(),
    ):
        net = UNet.of(data, unet, classes=labels.kinds(data))
        process = SDES[sde.sde](sde, shift_of(sde.shift, data.shape))
        super().__init__(data, net, process, score, labels)
