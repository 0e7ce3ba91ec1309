"""Score-based generative modelling through SDEs — Song et al. 2021, arXiv:2011.13456: a network learns
∇ log p_t of data under an SDE.

    x_t = α(t) x_0 + σ(t) ε,   score(x_t, t) = −ε̂(x_t, t) / σ(t)
    E λ(t) ‖score(x_t, t) + ε/σ(t)‖²                                                        (eq. 7)

Times run from data at t = 0 to noise at t = 1; the reverse SDE (eq. 6) generates images, and so does the ODE
with the same marginals, dx/dt = f x − ½ g² score (eq. 13).
"""

from __future__ import annotations

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
from gzcli.models.denoising.denoiser import QUANTILES, LikelihoodByODE, ObjectiveOptions, WalkOptions
from gzcli.models.denoising.process import PATHS, Process, SDEOptions, Shift, shift_of
from gzcli.models.denoising.samplers import SOLVERS, Sampler, Solver, solve
from gzcli.models.labelled import ClusterOptions
from gzcli.models.nn.nets import NetOptions

Spacing = Literal["uniform", "karras", "logsnr"]


@dataclass(frozen=True, kw_only=True)
class PathOptions(SDEOptions):
    """The path from data to noise.

    process: stochastic differential equation: variance preserving (vp), sub-VP (subvp) or variance exploding
      (ve); or that with the marginals of the cosine schedule (cosine) or of straight lines (straight).
    shift: factor of the noise-to-signal ratio √(1 − α²)/α, except for ve. auto: side / 64, at least 1
      (Hoogeboom 2023, arXiv:2301.11093).
    """

    process: Annotated[str, PATHS] = "vp"
    shift: Shift = 1.0


@dataclass(frozen=True)
class SamplingOptions(WalkOptions):
    """The sampler, its steps and guidance.

    sampler: a solver of the ODE or of the SDE. ODE: dpmpp (Lu 2022b), unipc (Zhao 2023), heun (2 · steps − 1
      calls; Karras 2022), or ode (a general `solver`, which never clamps). SDE: dpmpp_sde or,
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


SAMPLERS: dict[str, Callable[[SamplingOptions, Process], Sampler]] = {
    **SOLVERS,
    "em": lambda _, sde: partial(samplers.euler_maruyama, sde=sde),
    "pc": lambda options, _: partial(
        samplers.predictor_corrector, corrector=options.corrector, snr=options.snr
    ),
}


class ScoreModel(NoiseApplications):
    """A network on an SDE."""

    reverse_sampler = staticmethod(samplers.dpmpp)
    ode_solver = ("rk4", 10)
    rescale = True
    quantiles: Tensor

    def __init__(
        self, data: DataInfo, net: nn.Module, sde: Process, score: ObjectiveOptions, labels: ClusterOptions
    ):
        super().__init__(data, net, sde, labels)
        self.train_by(score)
        if score.time_sampling in ("uniform", "stratified"):
            self.time_sampling = "stratified"
            t = sde.clean + np.linspace(0, 1, QUANTILES) * (sde.noisy - sde.clean)
            self.quantiles = torch.from_numpy(t).float()

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
        """Draws n images [n, C, H, W] in [-1, 1] from noise."""
        if options.sampler == "ode":
            x, y = self.initial_noise(n, labels, noise, options.size)
            f = self.velocity(y, self.guidance_scale(options.guidance), options.interval)
            times = [level.t for level in self.process.path(options.steps, options.spacing)[:-1]]
            x = solve(f, x, times, options.solver, tolerance=options.tolerance, progress=progress)
            return self.into_range(x)
        sampler = SAMPLERS[options.sampler](options, self.process)
        return self.draw(n, labels, noise, progress, options, sampler)


class SGM(LikelihoodByODE, ScoreModel):
    """A network that predicts the score, or a quantity that determines it."""

    paper = "Song et al. 2021, arXiv:2011.13456"

    def __init__(
        self,
        data: DataInfo,
        *,
        net: NetOptions = NetOptions(),
        sde: PathOptions = PathOptions(),
        score: ObjectiveOptions = ObjectiveOptions(time_sampling="cosine"),
        labels: ClusterOptions = ClusterOptions(),
    ):
        network = net.build(data, classes=labels.kinds(data))
        shift = 1.0 if sde.process == "ve" else shift_of(sde.shift, data.shape)
        process = PATHS[sde.process](sde, shift)
        super().__init__(data, network, process, score, labels)
