"""Applications of a trained flow: round trips, interpolation and inpainting, and an out-of-distribution
score."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from gzcli.core.errors import UsageError
from gzcli.core.types import Applied, Batch, DataInfo, Noise, Progress, no_progress
from gzcli.models.denoising.by_class import ByClass
from gzcli.models.denoising.flow import SCALE, FlowMatching, FlowOptions, shifted
from gzcli.models.denoising.inpainting import by_moments, completed, to_complete
from gzcli.models.denoising.interpolation import through_noise
from gzcli.models.denoising.posterior import pixels
from gzcli.models.denoising.round_trip import check_strength
from gzcli.models.denoising.schedule import Level, clean
from gzcli.models.denoising.upscaling import enlarged, reduced
from gzcli.models.labelled import ClusterOptions
from gzcli.models.nn import at_least, to_fp32

FIRST, LEAST = (
    80.0,
    0.02,
)  # σ/α at the start and the end of inpainting: nearly pure noise, and invisible noise


class FlowApplications(ByClass, FlowMatching):
    """Applications and scores of a `FlowMatching`, by its `velocity` alone."""

    def __init__(
        self,
        data: DataInfo,
        net: nn.Module,
        flow: FlowOptions,
        labels: ClusterOptions,
        *,
        sigma_min: float = 0.0,
    ):
        super().__init__(data, net, flow, labels, sigma_min=sigma_min)
        self.path_mean: Tensor | None = None  # [3], set by `fit_path`; float64 on the CPU
        self.path_precision: Tensor | None = None  # [3, 3]

    def round_trip(
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
        """x mixed with noise at t = 1 − strength before the shift, and the solution at t = 1 by `steps`
        midpoint steps."""
        check_strength(strength)
        start = shifted(1 - strength, self.shift)
        x_t = self.between(noise.randn(*x.shape), x, start)
        f = self.velocity(self.known_labels(y), guidance)
        back = self.flow(f, x_t, start, 1.0, solver="midpoint", steps=steps, progress=progress)
        return x_t, self.into_range(back)

    @torch.no_grad()
    def interpolate(
        self, x: Tensor, *, noise: Noise, progress: Progress = no_progress, frames: int = 8, steps: int = 20
    ) -> Applied:
        """Interpolations from image 0 to 1, 2 to 3, … through the noises that the flow maps them to.

        Raises UsageError for fewer than two images, or frames.

        frames: images of an interpolation, both ends included.
        steps: midpoint steps from image to noise, and from noise to image, each of two network calls.
        """
        at_least(1, steps=steps)
        f = self.velocity(self.known_labels(None))

        def carried(x: Tensor, start: float, end: float) -> Tensor:
            return self.flow(f, x, start, end, solver="midpoint", steps=steps, progress=progress)

        return through_noise(
            x,
            frames,
            to_noise=lambda x: carried(x, 1.0, 0.0),
            to_images=lambda z: self.into_range(carried(z, 0.0, 1.0)),
        )

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
        first two moments of images given x_t (posterior.py); exact for Gaussian data. Without a mask the
        middle is hidden, half as high and wide as the image.

        steps: even in log σ/α, each of a network call and iterations + 1 of its gradient.
        iterations: of conjugate gradients in each step.
        guidance: strength of the labels; 1: as trained, 0: without them, more: sharper.
        """
        at_least(1, steps=steps, iterations=iterations)
        mask, y = to_complete(self, x, mask, labels)
        denoise, start, path = self.denoiser(y, guidance=guidance), noise.randn(*x.shape), self.logsnr(steps)
        known = pixels(mask)
        found = by_moments(self, denoise, self.level, start, path, mask * x, known, iterations, progress)
        return completed(self, x, found, mask, y)

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
        given x_t, as in `inpaint`.

        Raises UsageError for sizes that do not fit.

        x: small images [B, C, h, w], where h divides H; or images of full size, which are first reduced.
        factor: by how much images of full size are first reduced.
        steps: even in log σ/α, each of a network call and iterations + 1 of its gradient.
        iterations: of conjugate gradients in each step.
        """
        at_least(1, factor=factor, steps=steps, iterations=iterations)
        small, by = reduced(self, x, factor)
        denoise, start = self.denoiser(self.known_labels(None)), noise.randn(len(x), *self.data.shape)
        path = self.logsnr(steps)
        return enlarged(self, small, by, denoise, self.level, start, path, iterations, progress)

    def logsnr(self, steps: int) -> list[Level]:
        """A path of `steps` steps, even in log σ/α, from nearly pure noise to the clean image."""
        ratios = np.geomspace(FIRST, max(LEAST, self.sigma_min), steps)
        return [*map(self.level, (1 / (ratios + 1 - self.sigma_min)).tolist()), clean(1.0)]

    # ---- what labels are for

    def error_at(self, x: Tensor, eps: Tensor, share: float, y: Tensor | None) -> Tensor:
        x_t, target = self.between(eps, x, share), x - (1 - self.sigma_min) * eps
        v = to_fp32(self.net(x_t, SCALE * x.new_full((len(x),), share), y))
        return (v - target).square().flatten(1).mean(1)

    def to_noise(self, x: Tensor, y: Tensor | None, steps: int, progress: Progress) -> Tensor:
        f = self.velocity(y)
        return self.flow(f, x, 1.0, 0.0, solver="midpoint", steps=steps, progress=progress)

    def to_data(self, z: Tensor, y: Tensor | None, steps: int, guidance: float, progress: Progress) -> Tensor:
        f = self.velocity(y, guidance)
        return self.flow(f, z, 0.0, 1.0, solver="midpoint", steps=steps, progress=progress)

    # ---- out-of-distribution scores

    def path_statistics(self, x: Tensor, steps: int) -> Tensor:
        """Statistics [B, 3] of an image's path to noise: the logarithms of the mean squares of its velocity,
        of the change of its velocity, and of its end."""
        f, before = self.velocity(self.known_labels(None)), None
        speed, turns = x.new_zeros(len(x)), x.new_zeros(len(x))
        for i in range(steps):
            v = f(x, x.new_full((len(x),), 1 - i / steps))
            speed = speed + v.square().flatten(1).mean(1) / steps
            if before is not None:
                turns = turns + (v - before).square().flatten(1).mean(1) * steps
            x, before = x - v / steps, v
        return torch.stack([speed, turns, x.square().flatten(1).mean(1)], 1).clamp(min=1e-12).log()

    @torch.no_grad()
    def fit_path(self, batches: Iterable[Batch], *, steps: int = 10) -> None:
        """Mean and precision of the statistics over held-out in-distribution batches."""
        seen = torch.cat([self.path_statistics(batch.x, steps) for batch in batches]).cpu().double()
        covariance = torch.cov(seen.T) + 1e-6 * torch.eye(3, dtype=torch.float64)
        self.path_mean, self.path_precision = seen.mean(0), torch.linalg.inv(covariance)

    @torch.no_grad()
    def score_path(self, x: Tensor, *, noise: Noise, steps: int = 10) -> Tensor:
        """[B]: the squared Mahalanobis distance of the statistics of an image's path to noise (after
        DiffPath, Heng 2024, arXiv:2405.15342). Raises UsageError before `fit_path`.

        steps: Euler steps of the path.
        """
        if self.path_mean is None or self.path_precision is None:
            raise UsageError("the `path` score needs in-distribution statistics", hint="fit it first")
        gap = self.path_statistics(x, steps).cpu().double() - self.path_mean
        return ((gap @ self.path_precision) * gap).sum(1).to(x)
