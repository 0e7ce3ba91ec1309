"""What a trained diffusion is good for beside sampling: out-of-distribution scores, inpainting, upscaling,
editing."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from gzcli.errors import UsageError
from gzcli.models.diffusion import samplers
from gzcli.models.diffusion.posterior import given
from gzcli.models.diffusion.process import Diffusion, at
from gzcli.models.diffusion.schedule import Level
from gzcli.models.guided import check_strength
from gzcli.models.nn import as_ways, at_least, pairs_of, to_fp32
from gzcli.types import Applied, Noise, Progress, no_progress


class Applications(Diffusion):
    """Scores and applications of a `Diffusion`, by its `denoiser` alone."""

    # --------------------------------------------------------------------------------------------------------
    # scores

    @torch.no_grad()
    def score_denoise(self, x: Tensor, *, noise: Noise, times: int = 10) -> Tensor:
        """[B]: mean squared error of the network's ε over `times` evenly spaced noise levels."""
        return self.errors(x, self.known_labels(None), noise, times)

    def errors(self, x: Tensor, y: Tensor | None, noise: Noise, times: int) -> Tensor:
        """The same given labels y."""
        error = 0
        for k in range(times):
            t = torch.full((len(x),), int((k + 0.5) * self.timesteps / times), device=x.device)
            eps = noise.randn(*x.shape).to(x.device)
            alpha, sigma = at(self.alpha, t), at(self.sigma, t)
            x_t = alpha * x + sigma * eps
            _, guess = self.split(to_fp32(self.net(self.beside(x_t), t, y)), x_t, alpha, sigma)
            error = error + (eps - guess).square().flatten(1).mean(1)
        return error / times

    # --------------------------------------------------------------------------------------------------
    # applications

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
        """x noised to the fraction `strength` of T, and that denoised by at most `steps` DDIM steps."""
        path = self.start_from(strength, steps)
        x_t = path[0].alpha * x + path[0].sigma * noise.randn(*x.shape).to(x.device)
        denoise = self.denoiser(self.known_labels(y), guidance=guidance)
        return x_t, self.into_range(samplers.ddim(denoise, x_t, path, progress=progress))

    def start_from(self, strength: float, steps: int) -> list[Level]:
        """The path from the fraction `strength` of T in at most `steps` steps. Raises UsageError outside 0 …
        1."""
        check_strength(strength)
        return self.schedule.spaced(min(steps, max(1, round(strength * self.timesteps))), start=strength)

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
        """The way from image 0 to 1, 2 to 3, …, ends included: noised, mixed there and denoised (Ho 2020,
        figure 8).

        The noises are mixed on the sphere, so that theirs keeps its variance. Raises UsageError for fewer
        than two images, or frames.
        """
        at_least(2, frames=frames)
        at_least(1, steps=steps)
        x = pairs_of(x)
        path, eps = self.start_from(strength, steps), noise.first(len(x)).randn(*x.shape).to(x.device)
        w = torch.linspace(0, 1, frames, device=x.device)[:, None, None, None]
        angle = w * (torch.pi / 2)
        mixed = torch.lerp(x[0::2, None], x[1::2, None], w)  # [pairs, frames, C, H, W]
        eps = angle.cos() * eps[0::2, None] + angle.sin() * eps[1::2, None]
        x_t = (path[0].alpha * mixed + path[0].sigma * eps).flatten(0, 1)
        found = samplers.ddim(self.denoiser(self.known_labels(None)), x_t, path, progress=progress)
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
        steps: int = 50,
        resample: int = 5,
        jump: int = 5,
        method: Literal["repaint", "moments"] = "repaint",
        iterations: int = 4,
        guidance: float = 1.0,
    ) -> Applied:
        """RePaint (Lugmayr 2022): images [B, C, H, W] completed where mask [B, 1, H, W] is 0; at most steps ×
        resample calls.

        RePaint puts noised known pixels in place of its own, which is not quite the law of the rest given
        them: of a Gaussian whose pixels are correlated its mean is off by .14 of a deviation of .37 at the
        default, by .10 with 1,000 calls, and its variance by a sixth. `method` moments
        (diffusion/posterior.py) is off by .01 in 25 steps, each a call of the network and iterations + 1 of
        its gradient; it has no `resample`, `jump`. Without a mask the middle is hidden, half as high and wide
        as the image.
        """
        at_least(1, steps=steps, resample=resample, jump=jump, iterations=iterations)
        mask, y = self.to_complete(x, mask, labels)
        start = noise.randn(*x.shape).to(x.device)
        if method == "moments":
            loose = self.denoiser(y, guidance=guidance, clip=False)
            denoise = given(
                loose, self.schedule.level, x, mask, iterations=iterations, into_range=self.into_range
            )
            found = samplers.dpmpp(
                denoise, start, self.schedule.spaced(min(steps, self.timesteps), "logsnr"), progress=progress
            )
            return self.completed(x, found, mask, y)
        found = samplers.repaint(
            self.denoiser(y, guidance=guidance),
            start,
            self.schedule.spaced(min(steps, self.timesteps)),
            known=x,
            mask=mask,
            randn=self.fresh(noise, x),
            resample=resample,
            jump=jump,
            progress=progress,
        )
        return self.completed(x, found, mask, y)

    def completed(self, x: Tensor, found: Tensor, mask: Tensor, y: Tensor | None) -> Applied:
        """The known pixels of x, and the others as they were found."""
        done = mask * x + (1 - mask) * self.into_range(found)
        return Applied(done, rows=("inpainted",), known=mask, how="masked", labels=y)

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
        """Images [B, C, H, W] whose block means are the small images x, by DDNM (Wang 2022,
        arXiv:2212.00490), which takes no training for it: 50 steps with eta .85. A model with a `factor` of
        its own is told x as well: 4 steps with eta 0, since few stay near the mean of what x may have been.

        x [B, C, h, w], with h a part of H; or of full size, which is first reduced by `factor` (2, or the
        model's own). Raises UsageError for sizes that do not fit.
        """
        at_least(1, factor=factor, steps=steps)
        full = self.data.shape[1:]
        if x.shape[2:] == full:
            by = factor or self.factor or 2
            if any(side % by for side in full):
                raise UsageError(f"`factor` {by} does not divide images of {full[0]}×{full[1]}")
            x = F.avg_pool2d(x, by)
        by = full[0] // x.shape[2]
        if tuple(s * by for s in x.shape[2:]) != tuple(full):
            raise UsageError(f"images of {tuple(x.shape[2:])} pixels are no whole part of {tuple(full)}")
        if self.factor and by != self.factor:
            raise UsageError(f"the model was trained to enlarge {self.factor} times, not {by}")
        steps = min(steps or (4 if self.factor else 50), self.timesteps)
        eta = (0.0 if self.factor else 0.85) if eta is None else eta
        inner = self.denoiser(self.known_labels(None), small=x if self.factor else None)

        def denoise(x_t: Tensor, t: float) -> tuple[Tensor, Tensor]:
            x0, _ = inner(x_t, t)
            gap = x - F.avg_pool2d(x0, by)
            x0 = x0 + F.interpolate(gap, scale_factor=by, mode="nearest")  # A⁺ y + (1 − A⁺ A) x_0 (eq. 13)
            _, alpha, sigma = self.schedule.level(t)
            return x0, (x_t - alpha * x0) / sigma

        x_T = noise.randn(len(x), *self.data.shape).to(x)
        path = self.schedule.spaced(steps)
        found = samplers.ddim(denoise, x_T, path, eta=eta, randn=self.fresh(noise, x_T), progress=progress)
        return Applied(self.into_range(found), rows=("upscaled",), given=x, how=f"small, 1/{by}")
