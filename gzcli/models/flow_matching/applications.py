"""What a trained flow is good for beside sampling: ways between images, completing and editing them, telling
strange ones."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from gzcli.errors import UsageError
from gzcli.models.diffusion.posterior import given
from gzcli.models.diffusion.samplers import dpmpp
from gzcli.models.diffusion.schedule import Level
from gzcli.models.flow_matching.flow import FlowMatching
from gzcli.models.guided import check_strength
from gzcli.models.nn import as_ways, at_least, pairs_of, slerp, ways
from gzcli.types import Applied, Batch, Noise, Progress, no_progress

FIRST, LEAST = 80.0, 0.02  # σ/α between which inpainting denoises: pure noise, and less than images show


class Applications(FlowMatching):
    """Applications and scores of a `FlowMatching`, by its `velocity` alone."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.path_mean: Tensor | None = None  # [3], by fit_path; float64, so they stay on the host
        self.path_precision: Tensor | None = None  # [3, 3]

    def there_and_back(
        self,
        x: Tensor,
        noise: Noise,
        strength: float,
        steps: int,
        *,
        y: Tensor | None = None,
        guidance: float = 1.0,
        progress: Progress = no_progress,
    ) -> tuple[Tensor, Tensor]:
        """x mixed with noise at t = 1 − strength, and that carried from there to t = 1 by `steps` midpoint
        steps."""
        check_strength(strength)
        x_t = self.between(noise.randn(*x.shape).to(x), x, 1 - strength)
        f = self.velocity(self.known_labels(y), guidance)
        return x_t, self.into_range(
            self.flow(f, x_t, 1 - strength, 1.0, solver="midpoint", steps=steps, progress=progress)
        )

    @torch.no_grad()
    def interpolate(
        self, x: Tensor, *, noise: Noise, progress: Progress = no_progress, frames: int = 8, steps: int = 20
    ) -> Applied:
        """The way from image 0 to 1, 2 to 3, … through the noises that the flow makes of them, ends included.

        Raises UsageError for fewer than two images, or frames.
        """
        at_least(2, frames=frames)
        at_least(1, steps=steps)
        x = pairs_of(x)
        f = self.velocity(self.known_labels(None))
        z = self.flow(f, x, 1.0, 0.0, solver="midpoint", steps=steps, progress=progress)
        z = ways(z.flatten(1), frames, slerp).unflatten(1, self.data.shape)
        found = self.flow(f, z, 0.0, 1.0, solver="midpoint", steps=steps, progress=progress)
        return as_ways(self.into_range(found), frames)

    @torch.no_grad()
    def inpaint(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        steps: int = 25,
        iterations: int = 4,
        guidance: float = 1.0,
    ) -> Applied:
        """Images [B, C, H, W] completed where mask [B, 1, H, W] is 0: the ODE given the known pixels, by the
        first two moments of images given x_t, see diffusion/posterior.py; exact for Gaussian data.

        Each of the `steps`, even in log σ/α, takes a network call and iterations + 1 of its gradient. Without
        a mask the middle is hidden, half as high and wide as the image.
        """
        at_least(1, steps=steps, iterations=iterations)
        mask, y = self.to_complete(x, mask, labels)
        denoise = given(
            self.denoiser(y, guidance=guidance),
            self.level,
            x,
            mask,
            iterations=iterations,
            into_range=self.into_range,
        )
        ratios = np.geomspace(FIRST, max(LEAST, self.sigma_min), steps)
        path = [*(self.level(t) for t in (1 / (ratios + 1 - self.sigma_min)).tolist()), Level(1.0, 1.0, 0.0)]
        found = dpmpp(denoise, noise.randn(*x.shape).to(x), path, progress=progress)
        done = torch.lerp(self.into_range(found), x, mask)
        return Applied(done, rows=("inpainted",), known=mask, how="masked", labels=y)

    # ---- out-of-distribution scores

    def path_statistics(self, x: Tensor, steps: int) -> Tensor:
        """Of the way from an image to noise: log mean square of its speed, of its turns, and of where it
        ends, [B, 3]."""
        f, speed, turns, before = self.velocity(self.known_labels(None)), 0.0, 0.0, None
        for i in range(steps):
            v = f(x, x.new_full((len(x),), 1 - i / steps))
            speed = speed + v.square().flatten(1).mean(1) / steps
            if before is not None:
                turns = turns + (v - before).square().flatten(1).mean(1) * steps
            x, before = x - v / steps, v
        return torch.stack([speed, turns, x.square().flatten(1).mean(1)], 1).clamp(min=1e-12).log()

    @torch.no_grad()
    def fit_path(self, batches: Iterable[Batch], *, steps: int = 10) -> None:
        """Mean and covariance of the statistics over held-out in-distribution batches."""
        seen = torch.cat([self.path_statistics(batch.x, steps) for batch in batches]).cpu().double()
        covariance = torch.cov(seen.T) + 1e-6 * torch.eye(3, dtype=torch.float64)
        self.path_mean, self.path_precision = seen.mean(0), torch.linalg.inv(covariance)

    @torch.no_grad()
    def score_path(self, x: Tensor, *, noise: Noise, steps: int = 10) -> Tensor:
        """How unusual the way to noise is: the squared Mahalanobis distance of its statistics (after
        DiffPath, Heng 2024, arXiv:2405.15342). Raises UsageError before `fit_path`."""
        if self.path_mean is None:
            raise UsageError("the `path` score needs in-distribution statistics", hint="fit it first")
        gap = self.path_statistics(x, steps).cpu().double() - self.path_mean
        return ((gap @ self.path_precision) * gap).sum(1).to(x)
