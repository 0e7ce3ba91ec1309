"""An out-of-distribution score and applications of a trained diffusion: interpolation and upscaling."""

from __future__ import annotations

import torch
from torch import Tensor

from gzcli.core.errors import UsageError
from gzcli.core.types import Applied, Noise, Progress, no_progress
from gzcli.models.denoising import samplers
from gzcli.models.denoising.by_class import ByClass
from gzcli.models.denoising.posterior import means
from gzcli.models.denoising.round_trip import check_strength
from gzcli.models.denoising.upscaling import reduced
from gzcli.models.diffusion.process import Diffusion, at
from gzcli.models.nn import as_interpolations, at_least, pairs_of, to_fp32


class DiffusionApplications(ByClass, Diffusion):
    """Scores and applications of a `Diffusion`, by its `denoiser` alone."""

    @torch.no_grad()
    def score_denoise(self, x: Tensor, *, noise: Noise, times: int = 10) -> Tensor:
        """[B]: mean squared error of the network's estimate of ε.

        times: evenly spaced noise levels that the error is averaged over.
        """
        return self.errors(x, self.known_labels(None), noise, times)

    def errors(self, x: Tensor, y: Tensor | None, noise: Noise, times: int) -> Tensor:
        """[B]: the mean squared error of ε over `times` evenly spaced noise levels, given labels y."""
        errors = [self.error_at(x, noise.randn(*x.shape), (k + 0.5) / times, y) for k in range(times)]
        return torch.stack(errors).mean(0)

    # ---- what labels are for

    def error_at(self, x: Tensor, eps: Tensor, share: float, y: Tensor | None) -> Tensor:
        t = torch.full((len(x),), int(share * self.timesteps), device=x.device)
        alpha, sigma = at(self.alpha, t), at(self.sigma, t)
        x_t = alpha * x + sigma * eps
        _, guess = self.split(to_fp32(self.net(self.beside(x_t), t, y)), x_t, alpha, sigma)
        return (eps - guess).square().flatten(1).mean(1)

    def to_noise(self, x: Tensor, y: Tensor | None, steps: int, progress: Progress) -> Tensor:
        return samplers.ddim_inverse(self.denoiser(y, clip=False), x, self.levels(steps), progress=progress)

    def to_data(self, z: Tensor, y: Tensor | None, steps: int, guidance: float, progress: Progress) -> Tensor:
        denoise = self.denoiser(y, guidance=guidance, clip=False)
        return samplers.ddim(denoise, z, self.levels(steps), progress=progress)

    # ---- applications

    @torch.no_grad()
    def interpolate(
        self,
        x: Tensor,
        *,
        noise: Noise,
        progress: Progress = no_progress,
        frames: int = 8,
        strength: float = 0.5,
        steps: int = 20,
    ) -> Applied:
        """Interpolations from image 0 to 1, 2 to 3, …, ends included: noised, mixed there and denoised (Ho
        2020, figure 8).

        The noises are mixed on the sphere, which keeps their variance. Raises UsageError for fewer than two
        images, or frames.

        frames: images of an interpolation, both ends included.
        strength: noise level at which images are mixed, as a share of the way to pure noise, 0 … 1.
        steps: denoising steps, at most.
        """
        at_least(2, frames=frames)
        at_least(1, steps=steps)
        x = pairs_of(x)
        check_strength(strength)
        path, eps = self.levels(steps, strength=strength), noise.first(len(x)).randn(*x.shape)
        w = torch.linspace(0, 1, frames, device=x.device)[:, None, None, None]
        angle = w * (torch.pi / 2)
        mixed = torch.lerp(x[0::2, None], x[1::2, None], w)  # [pairs, frames, C, H, W]
        eps = angle.cos() * eps[0::2, None] + angle.sin() * eps[1::2, None]
        x_t = (path[0].alpha * mixed + path[0].sigma * eps).flatten(0, 1)
        found = samplers.ddim(self.denoiser(self.known_labels(None)), x_t, path, progress=progress)
        return as_interpolations(self.into_range(found), frames)

    @torch.no_grad()
    def upscale(
        self,
        x: Tensor,
        *,
        noise: Noise,
        progress: Progress = no_progress,
        factor: int | None = None,
        steps: int | None = None,
        eta: float | None = None,
    ) -> Applied:
        """Images [B, C, H, W] with the block means x, by DDNM (Wang 2022, arXiv:2212.00490), which needs no
        training. A model trained with a `factor` is also conditioned on x.

        Raises UsageError for sizes that do not fit.

        x: small images [B, C, h, w], where h divides H; or images of full size, which are first reduced.
        factor: by how much images of full size are first reduced; null: the model's own, else 2.
        steps: of DDIM; null: 50, or 4 if the model is conditioned on x, since few steps stay near the mean.
        eta: noise of DDIM as a share of that of the ancestral sampler, 0 … 1; null: .85, or 0 if the model is
          conditioned on x.
        """
        at_least(1, factor=factor, steps=steps)
        x, by = reduced(self, x, factor or self.factor or 2)
        known = means(by)
        if self.factor and by != self.factor:
            raise UsageError(f"the model was trained to enlarge {self.factor} times, not {by}")
        steps = min(steps or (4 if self.factor else 50), self.timesteps)
        eta = (0.0 if self.factor else 0.85) if eta is None else eta
        inner = self.denoiser(self.known_labels(None), small=x if self.factor else None)

        def denoise(x_t: Tensor, t: float) -> tuple[Tensor, Tensor]:
            x0, _ = inner(x_t, t)
            x0 = x0 + known.fill(x - known.of(x0))  # A⁺ y + (1 − A⁺ A) x_0 (eq. 13)
            _, alpha, sigma = self.schedule.level(t)
            return x0, (x_t - alpha * x0) / sigma

        x_T = noise.randn(len(x), *self.data.shape)
        path = self.schedule.spaced(steps)
        randn = samplers.draws_like(noise, x_T)
        found = samplers.ddim(denoise, x_T, path, eta=eta, randn=randn, progress=progress)
        return Applied(self.into_range(found), rows=("upscaled",), given=x, how=f"small, 1/{by}")
