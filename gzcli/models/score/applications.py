"""Interpolation, enlarging, classes and an out-of-distribution score by a learned score."""

from __future__ import annotations

import torch
from torch import Tensor

from gzcli.core.types import Applied, Noise, Progress, no_progress
from gzcli.models.denoising.by_class import ByClass
from gzcli.models.denoising.interpolation import through_noise
from gzcli.models.denoising.schedule import Level
from gzcli.models.denoising.upscaling import enlarged, reduced
from gzcli.models.nn import at_least
from gzcli.models.score.score import ScoreModel

FINE = 200  # steps in log σ/α to which the noise level of an error is rounded


class ScoreApplications(ByClass, ScoreModel):
    """Applications and scores of a `ScoreModel`, by its `denoiser` and `velocity` alone."""

    @torch.no_grad()
    def interpolate(
        self, x: Tensor, *, noise: Noise, progress: Progress = no_progress, frames: int = 8, steps: int = 10
    ) -> Applied:
        """Interpolations from image 0 to 1, 2 to 3, … through the noises that the ODE maps them to.

        Raises UsageError for fewer than two images, or frames.

        frames: images of an interpolation, both ends included.
        steps: Runge–Kutta steps from image to noise, and from noise to image, each of four network calls.
        """
        at_least(1, steps=steps)
        f = self.velocity(self.known_labels(None))
        return through_noise(
            x,
            frames,
            to_noise=lambda x: self.flow(f, x, steps=steps, progress=progress),
            to_images=lambda z: self.into_range(
                self.flow(f, z, steps=steps, backwards=True, progress=progress)
            ),
        )

    @torch.no_grad()
    def upscale(
        self,
        x: Tensor,
        *,
        noise: Noise,
        progress: Progress = no_progress,
        factor: int = 2,
        steps: int = 25,
        iterations: int = 4,
    ) -> Applied:
        """Images [B, C, H, W] with the block means x: the ODE given them, by the first two moments of images
        given x_t, as in `inpaint` by `moments`.

        Raises UsageError for sizes that do not fit.

        x: small images [B, C, h, w], where h divides H; or images of full size, which are first reduced.
        factor: by how much images of full size are first reduced.
        steps: even in log σ/α, each of a network call and iterations + 1 of its gradient.
        iterations: of conjugate gradients in each step.
        """
        at_least(1, factor=factor, steps=steps, iterations=iterations)
        small, by = reduced(self, x, factor)
        denoise = self.denoiser(self.known_labels(None), clip=False)
        start = self.prior_std * noise.randn(len(x), *self.data.shape)
        path = self.levels(steps, even_logsnr=True)
        return enlarged(self, small, by, denoise, self.level, start, path, iterations, progress)

    # ---- what labels are for

    def error_at(self, x: Tensor, eps: Tensor, share: float, y: Tensor | None) -> Tensor:
        _, alpha, sigma = level = self.level_at(share)
        guess = self.split(alpha * x + sigma * eps, x.new_full((len(x),), level.t), y)[1]
        return (eps - guess).square().flatten(1).mean(1)

    def level_at(self, share: float) -> Level:
        """The level at a share of the way from the least noise to the most, in log σ/α."""
        levels = self.sde.spaced(FINE + 1, "logsnr")
        return levels[FINE - round(share * FINE)]

    def to_noise(self, x: Tensor, y: Tensor | None, steps: int, progress: Progress) -> Tensor:
        return self.flow(self.velocity(y), x, steps=steps, progress=progress)

    def to_data(self, z: Tensor, y: Tensor | None, steps: int, guidance: float, progress: Progress) -> Tensor:
        f = self.velocity(y, guidance)
        return self.flow(f, z, steps=steps, backwards=True, progress=progress)

    # ---- an out-of-distribution score

    @torch.no_grad()
    def score_denoise(self, x: Tensor, *, noise: Noise, times: int = 10) -> Tensor:
        """[B]: mean squared error of the estimate of ε.

        times: noise levels, even in log σ/α, that the error is averaged over.
        """
        y, error = self.known_labels(None), x.new_zeros(len(x))
        for level in self.sde.spaced(times + 2, "logsnr")[1:-1]:
            eps = noise.randn(*x.shape)
            guess = self.split(level.alpha * x + level.sigma * eps, x.new_full((len(x),), level.t), y)[1]
            error = error + (eps - guess).square().flatten(1).mean(1)
        return error / times
