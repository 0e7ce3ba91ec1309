"""NCSNv2 — Song & Ermon 2020, "Improved Techniques for Training Score-Based Generative Models",
arXiv:2006.09011.

    score(x, σ) = −net(x) / σ,   E ½ ‖net(x + σ ε) − ε‖² over a ladder σ_1 > … > σ_L                (eq. 1
    with λ = σ²)

The network is told no noise level: it is in the image (technique 3). Sampling is Langevin dynamics down the
ladder, or, as the ladder is that of the VE SDE at t = 0, 1/(L − 1), …, 1, any sampler of score.py in a few
steps.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from scipy.special import ndtr
from torch import Tensor

from gzcli.errors import UsageError
from gzcli.models.score.applications import Applications
from gzcli.models.score.refinenet import RefineNet
from gzcli.models.score.samplers import annealed_langevin
from gzcli.models.score.score import CLEAN, Solver
from gzcli.models.score.sde import VE, Spacing
from gzcli.types import Batch, DataInfo, Noise, Progress, no_progress


class NCSNv2(Applications):
    """A RefineNet that tells the score, see refinenet.py for `width`, `mult` and `dilation`.

    sigma_max, sigma_min: the ends of the ladder, for images in [-1, 1], that is twice those of the paper,
    whose images are in [0, 1]; the first should reach the largest distance between two images (technique 1),
    which the start of a training checks. levels: L, None = as many as let neighbours overlap (technique 2).
    """

    paper = "Song & Ermon 2020, arXiv:2006.09011"

    def __init__(
        self,
        data: DataInfo,
        *,
        width: int = 32,
        mult: tuple[int, ...] = (1, 2, 2),
        dilation: tuple[int, ...] = (1, 1, 2),
        sigma_max: float = 50.0,
        sigma_min: float = 0.02,
        levels: int | None = None,
        conditional: bool = False,
        label_dropout: float = 0.1,
    ):
        net = RefineNet(
            data.shape[0],
            width=width,
            mult=mult,
            dilation=dilation,
            classes=len(data.classes) if conditional else 0,
        )
        super().__init__(
            data,
            net,
            VE(1e-3, sigma_min, sigma_max),
            prediction="eps",
            weighting="score",
            time_sampling="uniform",
            rescale=False,
            conditional=conditional,
            label_dropout=label_dropout,
        )
        if levels is not None and levels < 2:
            raise UsageError(
                "a ladder of fewer than two noise levels", hint="set `model.levels` to 2 or more, or to null"
            )
        self.levels = levels or 1 + math.ceil(
            self.sde.log_ratio / math.log(overlapping(math.prod(data.shape)))
        )

    def on_start(self, batch: Batch) -> None:
        widest = float(torch.cdist(batch.x.flatten(1).float(), batch.x.flatten(1).float()).max())
        if widest > self.prior_std:
            self.warnings = (
                f"images are up to {widest:.3g} apart, more than `model.sigma_max`: modes may be missed",
            )

    def draw_times(self, noise: Noise, n: int) -> Tensor:
        """[B]: rungs of the ladder."""
        return noise.randint(self.levels, n) / (self.levels - 1)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        sampler: Literal["langevin", "dpmpp", "heun", "em", "pc", "ode"] = "em",
        steps: int = 50,
        spacing: Spacing = "logsnr",
        repeats: int = 5,
        step: float | None = None,
        corrector: int = 1,
        snr: float = 0.16,
        solver: Solver = "adaptive",
        tolerance: float = 1e-4,
        guidance: float = 1.0,
        interval: tuple[float, float] = (0.0, 1.0),
        clip: bool = True,
    ) -> Tensor:
        """n images [n, C, H, W] in [-1, 1] from noise.

        langevin, the paper's: `repeats` steps of length `step` · σ² at each of the model's levels and one
        that denoises, repeats · levels + 1 network calls; None: the length that keeps the spread of samples
        at that of their level (technique 4). For the others and their options see score.py. A network that is
        told no noise level takes what noise is left for that of the level, which the solvers of the ODE never
        make good: em renews it, and needs few steps.
        """
        if sampler != "langevin":
            return super().sample(
                n,
                labels=labels,
                noise=noise,
                progress=progress,
                sampler=sampler,
                steps=steps,
                spacing=spacing,
                corrector=corrector,
                snr=snr,
                solver=solver,
                tolerance=tolerance,
                guidance=guidance,
                interval=interval,
                clip=clip,
            )
        if repeats < 1:
            raise UsageError("`repeats` must be 1 or more")
        x = self.prior_std * noise.randn(n, *self.data.shape).to(self.device)
        denoise = self.denoiser(self.asked_labels(labels, n), guidance=guidance, interval=interval, clip=clip)
        path = [*(self.sde.level(t) for t in np.linspace(1, 0, self.levels).tolist()), CLEAN]
        step = step or steady_step(path[0].sigma / path[1].sigma, repeats)
        randn = self.fresh(noise, x)
        return self.into_range(
            annealed_langevin(denoise, x, path, repeats=repeats, step=step, randn=randn, progress=progress)
        )


def overlapping(size: int, overlap: float = 0.5) -> float:
    """The ratio γ of neighbouring σ at which of images of `size` numbers noised by one, of radius N(√D σ,
    σ²/2), the share
    `overlap` is within three deviations of the other's (technique 2), by bisection."""
    root, low, high = math.sqrt(2 * size), 1.0, 1e3

    def shared(gamma: float) -> float:
        return float(ndtr(root * (gamma - 1) + 3 * gamma) - ndtr(root * (gamma - 1) - 3 * gamma))

    for _ in range(60):
        gamma = 0.5 * (low + high)
        low, high = (gamma, high) if shared(gamma) > overlap else (low, gamma)
    return low


def steady_step(gamma: float, repeats: int) -> float:
    """The step ε/σ² after `repeats` of which samples of the level γ σ have the variance of the level σ (eq.
    7, technique 4), or come closest to it."""
    eta = np.geomspace(1e-4, 1, 100_000)[:-1]
    rest = 2 * eta / (1 - (1 - eta) ** 2)  # what it tends to, in units of σ²
    ratio = (1 - eta) ** (2 * repeats) * (gamma**2 - rest) + rest
    return float(eta[np.abs(ratio - 1).argmin()])
