"""Interpolation and an out-of-distribution score by a learned score."""

from __future__ import annotations

import torch
from torch import Tensor

from gzcli.models.denoising.interpolation import through_noise
from gzcli.models.nn import at_least
from gzcli.models.score.score import ScoreModel
from gzcli.types import Applied, Noise, Progress, no_progress


class ScoreApplications(ScoreModel):
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
