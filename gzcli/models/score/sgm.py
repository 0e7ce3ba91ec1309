"""Score-based generative modelling through SDEs — Song et al. 2021, arXiv:2011.13456."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from gzcli.models.denoising.guided import LabelOptions
from gzcli.models.nn.ode import (
    Solver,
    Velocity,
    density_norm,
    dequantised,
    grey_levels,
    log_density,
    solve_by,
)
from gzcli.models.nn.unet import UNet, UNetOptions
from gzcli.models.score.applications import ScoreApplications
from gzcli.models.score.options import SamplingOptions, ScoreOptions
from gzcli.models.score.sampling import drawn
from gzcli.models.score.sde import SDES, SDEOptions
from gzcli.types import DataInfo, Noise, Progress, no_progress


@dataclass(frozen=True)
class SGMSampling(SamplingOptions):
    """The same, with the samplers of `sgm`."""

    sampler: Literal["dpmpp", "heun", "em", "pc", "ode"] = "dpmpp"


class SGM(ScoreApplications):
    """A U-Net that predicts the score, as in score.py."""

    paper = "Song et al. 2021, arXiv:2011.13456"
    likelihood = "ode"

    def __init__(
        self,
        data: DataInfo,
        *,
        unet: UNetOptions = UNetOptions(),
        sde: SDEOptions = SDEOptions(),
        score: ScoreOptions = ScoreOptions(),
        labels: LabelOptions = LabelOptions(),
    ):
        net = UNet.of(data, unet, conditional=labels.conditional)
        super().__init__(data, net, SDES[sde.sde](sde), score, labels, rescale=True)

    def sample(
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        options: SGMSampling = SGMSampling(),
    ) -> Tensor:
        """n images [n, C, H, W] in [-1, 1] from noise."""
        return drawn(self, n, labels, noise, progress, options)

    def log_prob(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        *,
        noise: Noise,
        solver: Solver = "rk4",
        steps: int = 24,
        tolerance: float = 1e-4,
        probes: int = 1,
    ) -> Tensor:
        """[B] nats of the discrete image by the ODE from data to noise, see nn/ode.py. Raises UsageError for
        latents.

        solver: of the ODE: with steps of one network call and gradient (euler), two (midpoint, heun) or four
          (rk4), or with steps of six that fit the image (adaptive).
        steps: of the solvers with fixed steps, uniform in log σ/α.
        tolerance: largest error of an adaptive step, of x and of the nats a dimension.
        probes: Rademacher vectors that estimate the divergence.
        """
        levels = grey_levels(self.data.levels)
        path = self.sde.rising(dequantised(levels), steps)
        times, alpha = [level.t for level in path], path[0].alpha

        def carry(g: Velocity, state: Tensor) -> Tensor:
            return solve_by(solver, g, state, times, tolerance=tolerance, norm=density_norm)

        f, std = self.velocity(self.known_labels(labels)), self.prior_std
        return log_density(f, carry, x, levels=levels, alpha=alpha, noise=noise, probes=probes, std=std)
