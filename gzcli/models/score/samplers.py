"""Stochastic samplers of a learned score as pure functions; the deterministic ones are those of
denoising/samplers.py.

`denoise(x, t)` returns estimates (x_0, ε), one network call; the score is −ε/σ. `randn()` draws noise of x's
shape. Paths end at the clean level; the last step is Tweedie's formula, the estimate of x_0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from gzcli.core.types import Progress, no_progress
from gzcli.models.denoising.samplers import Denoise, Randn, transition
from gzcli.models.denoising.schedule import Level
from gzcli.models.score.sde import SDE


def euler_maruyama(
    denoise: Denoise,
    x: Tensor,
    path: Sequence[Level],
    *,
    sde: SDE,
    randn: Randn,
    progress: Progress = no_progress,
) -> Tensor:
    """The reverse-time SDE dx = (f x − g² score) dt + g dw (Song 2021, eq. 6)."""
    for i, (s, u) in enumerate(pairwise(path)):
        x0, eps = denoise(x, s.t)
        if u.sigma > 0:
            f, g2 = (float(rate) for rate in sde.rates(torch.tensor(s.t, dtype=torch.float64)))
            h = s.t - u.t
            x = x - h * (f * x + (g2 / s.sigma) * eps) + math.sqrt(g2 * h) * randn()
        else:
            x = x0
        progress(i + 1, len(path) - 1, x)
    return x


def predictor_corrector(
    denoise: Denoise,
    x: Tensor,
    path: Sequence[Level],
    *,
    corrector: int,
    snr: float,
    randn: Randn,
    progress: Progress = no_progress,
) -> Tensor:
    """Song 2021, algorithm 1: the reverse diffusion predictor (eq. 46), then `corrector` Langevin steps at
    the new level.

    Their length is that of algorithms 4 and 5 with ‖z‖/‖score‖ = σ, the value for pure noise. With the norms
    of the actual draws an image would depend on its batch; with norms of each image, images with a long score
    would get short steps.
    """
    for i, (s, u) in enumerate(pairwise(path)):
        x0, eps = denoise(x, s.t)
        if u.sigma > 0:
            scale, beta = transition(s, u)
            x = (2 - scale) * x - (beta / s.sigma) * eps + math.sqrt(beta) * randn()
            step = 2 * (scale * snr * u.sigma) ** 2
            for _ in range(corrector):
                x = x - (step / u.sigma) * denoise(x, u.t)[1] + math.sqrt(2 * step) * randn()
        else:
            x = x0
        progress(i + 1, len(path) - 1, x)
    return x


def annealed_langevin(
    denoise: Denoise,
    x: Tensor,
    path: Sequence[Level],
    *,
    repeats: int,
    step: float,
    randn: Randn,
    progress: Progress = no_progress,
) -> Tensor:
    """Song & Ermon 2020, algorithm 1: at every level σ but the clean one `repeats` Langevin steps of length
    step · σ², then one that denoises: repeats · levels + 1 network calls."""
    levels = path[:-1]
    for i, level in enumerate(levels):
        for _ in range(repeats):
            _, eps = denoise(x, level.t)
            x = x - step * level.sigma * eps + math.sqrt(2 * step) * level.sigma * randn()
        progress(i + 1, len(levels), x)
    return denoise(x, levels[-1].t)[0]
