"""Score-based generative modelling through SDEs — Song et al. 2021, arXiv:2011.13456."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from gzcli.core.types import DataInfo, Noise, Progress, no_progress
from gzcli.models.denoising.schedule import shift_of
from gzcli.models.labelled import ClusterOptions
from gzcli.models.nn.ode import LikelihoodOptions, dequantised, grey_levels, log_density
from gzcli.models.nn.unet import UNet
from gzcli.models.nn.unet_sizes import UNetOptions
from gzcli.models.score.applications import ScoreApplications
from gzcli.models.score.options import SamplingOptions, ScoreOptions
from gzcli.models.score.sampling import drawn
from gzcli.models.score.sde import SDES, SDEOptions


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
        labels: ClusterOptions = ClusterOptions(),
    ):
        net = UNet.of(data, unet, classes=labels.count(data))
        process = SDES[sde.sde](sde, shift_of(sde.shift, data.shape))
        super().__init__(data, net, process, score, labels, rescale=True)

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
        ode: LikelihoodOptions = LikelihoodOptions(),
    ) -> Tensor:
        """[B] nats of the discrete image by the ODE from data to noise, see nn/ode.py. Raises UsageError for
        latents."""
        levels = grey_levels(self.data.levels)
        path = self.sde.rising(dequantised(levels), ode.steps)
        times, alpha = [level.t for level in path], path[0].alpha
        f, std = self.velocity(self.known_labels(labels)), self.prior_std
        return log_density(f, x, times, ode, levels=levels, alpha=alpha, noise=noise, std=std)
