"""Consistency models — Song et al. 2023, arXiv:2303.01469: a function f of x = x_0 + σ ε that maps every
point of a path of the ODE to its image, as published weights contain it.

    f(x, σ) = c_skip x + c_out F(c_in x, 250 ln σ),   f(x, ε) = x                            (eq. 5)
    c_skip = σ_d² / ((σ − ε)² + σ_d²),  c_out = (σ − ε) σ_d / √(σ² + σ_d²),  c_in = 1 / √(σ² + σ_d²)

The loss is that of `denoising.consistency`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from gzcli.core.types import DataInfo, Noise, Progress, no_progress
from gzcli.core.units import Size
from gzcli.models.denoising import samplers
from gzcli.models.denoising.consistency import ConsistencyFunction, ConsistencyOptions
from gzcli.models.denoising.denoiser import WalkOptions
from gzcli.models.denoising.process import VE, Level
from gzcli.models.denoising.samplers import Estimate
from gzcli.models.labelled import ClusterOptions, LabelOptions
from gzcli.models.nn.nets import NetOptions
from gzcli.models.score.sgm import Spacing

SAMPLERS = {"renoise": samplers.renoise}


@dataclass(frozen=True)
class NoiseOptions:
    """The noise, and the preconditioning by it.

    sigma_data: σ_d, the standard deviation of images in [-1, 1].
    sigma_min: ε, the σ at which f(x, σ) = x.
    sigma_max: σ at which sampling starts.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0


@dataclass(frozen=True)
class SamplingOptions:
    """The sampler and its steps.

    sampler: f of noise, then f of the images with new noise (renoise; Song 2023, algorithm 1).
    steps: number of noise levels. The last of several is `sigma_min`, which changes nothing.
    spacing: spacing of the noise levels: uniform in t (uniform), in the 7th root of σ (karras; Karras 2022,
      eq. 5), or in log σ (logsnr).
    size: image size in pixels, if the network supports other sizes. Default: the size of the training images.
    """

    sampler: Annotated[str, SAMPLERS] = "renoise"
    steps: int = 1
    spacing: Spacing = "logsnr"
    size: Size | None = None


class Consistency(ConsistencyFunction):
    """A consistency function of published weights, with EDM's noise."""

    paper = "Song et al. 2023, arXiv:2303.01469"

    def __init__(
        self,
        data: DataInfo,
        *,
        net: NetOptions = NetOptions(),
        levels: NoiseOptions = NoiseOptions(),
        tuning: ConsistencyOptions = ConsistencyOptions(),
        labels: LabelOptions = LabelOptions(label_dropout=0.0),
    ):
        conditions = ClusterOptions(labels.conditional, labels.label_dropout)
        network = net.build(data, classes=conditions.kinds(data))
        process = VE(1e-5, levels.sigma_min, levels.sigma_max)
        super().__init__(data, network, process, conditions, tuning, levels.sigma_min)
        self.sigma_data = levels.sigma_data

    # ---- the function

    def time_input(self, t: Tensor) -> Tensor:
        return 250 * self.process.marginal(t)[1].log()

    def inputs(self, x: Tensor, level: Level, guide: Tensor | None = None) -> Tensor:
        return x / (level.sigma**2 + self.sigma_data**2) ** 0.5

    def to_estimate(self, out: Tensor, x: Tensor, level: Level) -> Estimate:
        above, variance = level.sigma - self.least, self.sigma_data**2
        c_out = above * self.sigma_data / (level.sigma**2 + variance) ** 0.5
        x0 = variance / (above**2 + variance) * x + c_out * out
        return Estimate(x0, (x - x0) / level.sigma)

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
        path = self.process.path(options.steps, options.spacing)
        walk = WalkOptions(guidance=1.0, size=options.size)
        return self.draw(n, labels, noise, progress, walk, SAMPLERS[options.sampler], path)
