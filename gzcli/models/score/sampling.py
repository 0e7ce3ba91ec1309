"""Sampling from a score model, and the table of its samplers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gzcli.core.types import Noise, Progress
from gzcli.models.denoising.samplers import Randn, Sampler, dpmpp, draws_like, heun
from gzcli.models.nn.ode import solve_by
from gzcli.models.score.options import SamplingOptions
from gzcli.models.score.samplers import euler_maruyama, predictor_corrector
from gzcli.models.score.score import ScoreModel

# (model, noise x at t = 1, labels, options, randn, progress) → images or latents
Drawing = Callable[[ScoreModel, Tensor, "Tensor | None", SamplingOptions, Randn, Progress], Tensor]


def by_denoiser(sampler: Callable[[ScoreModel, SamplingOptions], Sampler]) -> Drawing:
    """Sampling by a sampler of discrete noise levels."""

    def draw(
        model: ScoreModel,
        x: Tensor,
        y: Tensor | None,
        options: SamplingOptions,
        randn: Randn,
        progress: Progress,
    ) -> Tensor:
        guide, interval = model.strength(options.guidance), options.interval
        denoise = model.denoiser(y, guidance=guide, interval=interval, clip=options.clip)
        path = model.path(options.steps, options.spacing)
        return sampler(model, options)(denoise, x, path, randn=randn, progress=progress)

    return draw


def by_ode(
    model: ScoreModel, x: Tensor, y: Tensor | None, options: SamplingOptions, randn: Randn, progress: Progress
) -> Tensor:
    """Sampling by a general solver of the probability-flow ODE."""
    f = model.velocity(y, model.strength(options.guidance), options.interval)
    times = [level.t for level in model.sde.spaced(options.steps, options.spacing)]
    return solve_by(options.solver, f, x, times, tolerance=options.tolerance, progress=progress)


SAMPLERS: dict[str, Drawing] = {
    "dpmpp": by_denoiser(lambda *_: dpmpp),
    "heun": by_denoiser(lambda *_: heun),
    "em": by_denoiser(lambda model, _: partial(euler_maruyama, sde=model.sde)),
    "pc": by_denoiser(
        lambda _, options: partial(predictor_corrector, corrector=options.corrector, snr=options.snr)
    ),
    "ode": by_ode,
}


@torch.no_grad()
def drawn(
    model: ScoreModel,
    n: int,
    labels: Tensor | None,
    noise: Noise,
    progress: Progress,
    options: SamplingOptions,
    samplers: dict[str, Drawing] = SAMPLERS,
) -> Tensor:
    """n images [n, C, H, W] in [-1, 1] from noise."""
    x = model.prior_std * noise.randn(n, *model.drawn_shape(options.size))
    y = model.sampled_labels(labels, n, noise)
    x = samplers[options.sampler](model, x, y, options, draws_like(noise, x), progress)
    return model.into_range(x)
