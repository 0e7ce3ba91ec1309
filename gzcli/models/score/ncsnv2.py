"""NCSNv2 — Song & Ermon 2020, "Improved Techniques for Training Score-Based Generative Models",
arXiv:2006.09011.

    score(x, σ) = −net(x) / σ,   E ½ ‖net(x + σ ε) − ε‖² over a ladder σ_1 > … > σ_L   (eq. 1 with λ = σ²)

The network is not conditioned on the noise level, which the image shows (technique 3). The ladder is that of
the VE SDE at t = 0, 1/(L − 1), …, 1. So sampling is by Langevin dynamics down the ladder, or in a few steps
by any sampler of score models.

The network may predict v in place of ε, from x / √(1 + σ²). Its error of x_0 then stays bounded as σ grows,
where that of a predicted ε is σ times as large; scores need σ outside the network only (Karras 2022, eq. 7,
with deviation 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.special import ndtr
from torch import Tensor

from gzcli.core.errors import UsageError
from gzcli.core.types import Batch, DataInfo, Noise, Progress, no_progress
from gzcli.models.denoising.process import VE, Level
from gzcli.models.denoising.samplers import Denoise, Randn, annealed_langevin
from gzcli.models.labelled import ClusterOptions
from gzcli.models.nn import at_least
from gzcli.models.score.refinenet import RefineNet, RefineNetOptions
from gzcli.models.score.sgm import SamplingOptions, ScoreModel, ScoreOptions, Spacing

WIDEST = 1.7  # the largest distance between two images of a set in units of √D


@dataclass(frozen=True)
class NCSNSampling(SamplingOptions):
    """The same, with the paper's Langevin dynamics.

    A network without the noise level denoises by the noise that it sees. Where that differs from the level's,
    solvers of the ODE never correct it; em renews the noise, and needs few steps.

    sampler: langevin, the paper's, with repeats · levels + 1 network calls; em or pc, solvers of the SDE;
      dpmpp, heun or ode, solvers of the ODE.
    repeats: Langevin steps at each of the model's levels.
    step: length of a Langevin step in units of σ²; null: the length that keeps the variance of samples at
      that of their level (technique 4).
    """

    sampler: Literal["langevin", "dpmpp", "heun", "em", "pc", "ode"] = "em"  # type: ignore[assignment]
    steps: int = 50
    spacing: Spacing = "logsnr"
    repeats: int = 5
    step: float | None = None


class NCSNv2(ScoreModel):
    """A RefineNet that predicts the score.

    sigma_max: largest σ of the ladder, for images in [-1, 1]; twice that of the paper, where images are in
      [0, 1]. It should be at least the largest distance between two images (technique 1), which the start of
      training checks; null: 1.7 √(C H W), about what the paper found for its sets.
    sigma_min: smallest σ of the ladder; above 0.
    levels: L, the number of noise levels; null: as many as let neighbours overlap (technique 2).
    """

    paper = "Song & Ermon 2020, arXiv:2006.09011"

    def __init__(
        self,
        data: DataInfo,
        *,
        refinenet: RefineNetOptions = RefineNetOptions(),
        sigma_max: float | None = None,
        sigma_min: float = 0.02,
        levels: int | None = None,
        score: ScoreOptions = ScoreOptions(prediction="eps", weighting="score", time_sampling="uniform"),
        labels: ClusterOptions = ClusterOptions(),
    ):
        net = RefineNet(data.shape[0], refinenet, classes=labels.count(data))
        size = math.prod(data.shape)
        ladder = VE(1e-5, sigma_min, WIDEST * math.sqrt(size) if sigma_max is None else sigma_max)
        super().__init__(data, net, ladder, score, labels, rescale=score.prediction == "v")
        if levels is not None and levels < 2:
            raise UsageError(
                "a ladder of fewer than two noise levels", hint="set `model.levels` to 2 or more, or to null"
            )
        self.rungs = levels or 1 + math.ceil(ladder.log_ratio / math.log(overlapping(size)))

    def on_start(self, batch: Batch) -> None:
        widest = float(torch.cdist(batch.x.flatten(1).float(), batch.x.flatten(1).float()).max())
        if widest > self.process.prior_std:
            self.warnings = (
                f"images are up to {widest:.3g} apart, more than `model.sigma_max`: modes may be missed",
            )

    def draw_times(self, noise: Noise, n: int) -> Tensor:
        """The times of a batch, [B], of levels of the ladder: one in each of `rungs` equal shares of time."""
        share = (self.rungs * super().draw_times(noise, n)).floor()
        return (share / (self.rungs - 1)).clamp(max=1.0)

    @torch.no_grad()
    def sample(  # type: ignore[override]
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        options: NCSNSampling = NCSNSampling(),
    ) -> Tensor:
        """n images [n, C, H, W] in [-1, 1] from noise."""
        if options.sampler != "langevin":
            return super().sample(n, labels=labels, noise=noise, progress=progress, options=options)
        at_least(1, repeats=options.repeats)
        levels = [*map(self.process.level, np.linspace(1, 0, self.rungs).tolist())]
        step = options.step or steady_step(levels[0].sigma / levels[1].sigma, options.repeats)

        def langevin(
            denoise: Denoise,
            x: Tensor,
            path: Sequence[Level],
            *,
            randn: Randn,
            progress: Progress = no_progress,
        ) -> Tensor:
            return annealed_langevin(
                denoise, x, levels, repeats=options.repeats, step=step, randn=randn, progress=progress
            )

        return self.draw(n, labels, noise, progress, options, langevin)


def overlapping(size: int, overlap: float = 0.5) -> float:
    """The ratio γ of neighbouring σ (technique 2), by bisection: a share `overlap` of one level's images lies
    within three deviations of the other level's mean radius.

    size: D, the elements of an image, whose radius is distributed as N(√D σ, σ²/2).
    """
    root, low, high = math.sqrt(2 * size), 1.0, 1e3

    def shared(gamma: float) -> float:
        return float(ndtr(root * (gamma - 1) + 3 * gamma) - ndtr(root * (gamma - 1) - 3 * gamma))

    for _ in range(60):
        gamma = 0.5 * (low + high)
        low, high = (gamma, high) if shared(gamma) > overlap else (low, gamma)
    return low


def steady_step(gamma: float, repeats: int) -> float:
    """The step ε/σ² for which `repeats` steps bring the variance of samples closest from that of the level γ
    σ to that of the level σ (eq. 7, technique 4)."""
    eta = np.geomspace(1e-4, 1, 100_000)[:-1]
    rest = 2 * eta / (1 - (1 - eta) ** 2)  # the variance after many steps, in units of σ²
    ratio = (1 - eta) ** (2 * repeats) * (gamma**2 - rest) + rest
    return float(eta[np.abs(ratio - 1).argmin()])
