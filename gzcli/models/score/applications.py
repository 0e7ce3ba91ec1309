"""What a learned score is good for beside sampling: ways between images, completing and editing them, telling
strange ones."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gzcli.models.diffusion.posterior import given
from gzcli.models.diffusion.samplers import dpmpp, repaint
from gzcli.models.guided import check_strength
from gzcli.models.nn import as_ways, at_least, pairs_of, slerp, ways
from gzcli.models.score.score import CLEAN, ScoreModel
from gzcli.types import Applied, Noise, Progress, no_progress


class Applications(ScoreModel):
    """Applications and scores of a `ScoreModel`, by its `denoiser` and `velocity` alone."""

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
        """x noised to t = `strength`, and that denoised by `steps` steps of DPM-Solver++."""
        check_strength(strength)
        path = [*self.sde.spaced(steps, strength=strength), CLEAN]
        x_t = path[0].alpha * x + path[0].sigma * noise.randn(*x.shape).to(x)
        denoise = self.denoiser(self.known_labels(y), guidance=guidance)
        return x_t, self.into_range(dpmpp(denoise, x_t, path, progress=progress))

    @torch.no_grad()
    def interpolate(
        self, x: Tensor, *, noise: Noise, progress: Progress = no_progress, frames: int = 8, steps: int = 10
    ) -> Applied:
        """The way from image 0 to 1, 2 to 3, … through the noises that the ODE makes of them, ends included.

        Raises UsageError for fewer than two images, or frames.
        """
        at_least(2, frames=frames)
        at_least(1, steps=steps)
        x = pairs_of(x)
        f = self.velocity(self.known_labels(None))
        z = self.flow(f, x, steps=steps, progress=progress)
        z = ways(z.flatten(1), frames, slerp).unflatten(1, self.data.shape)
        return as_ways(
            self.into_range(self.flow(f, z, steps=steps, backwards=True, progress=progress)), frames
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
        steps: int = 50,
        resample: int = 5,
        jump: int = 5,
        method: Literal["repaint", "moments"] = "repaint",
        iterations: int = 4,
        guidance: float = 1.0,
    ) -> Applied:
        """Images [B, C, H, W] completed where mask [B, 1, H, W] is 0, by the score of the whole given the
        noised known part (Song 2021, appendix I.2), gone over as in RePaint (Lugmayr 2022); steps × resample
        network calls.

        RePaint puts noised known pixels in place of its own, which is not quite the law of the rest given
        them: of a Gaussian whose pixels are correlated its mean is off by .14 of a deviation of .37 at the
        default, by .10 with 1,000 calls, and its variance by a sixth. `method` moments
        (diffusion/posterior.py) is off by .01 in 25 steps, each a call of the network and iterations + 1 of
        its gradient; it has no `resample`, `jump`. Without a mask the middle is hidden, half as high and wide
        as the image.
        """
        at_least(1, steps=steps, resample=resample, jump=jump, iterations=iterations)
        mask, y = self.to_complete(x, mask, labels)
        start = self.prior_std * noise.randn(*x.shape).to(x)
        if method == "moments":
            loose = self.denoiser(y, guidance=guidance, clip=False)
            denoise = given(loose, self.sde.level, x, mask, iterations=iterations, into_range=self.into_range)
            found = dpmpp(denoise, start, [*self.sde.spaced(steps, "logsnr"), CLEAN], progress=progress)
            return self.completed(x, found, mask, y)
        found = repaint(
            self.denoiser(y, guidance=guidance),
            start,
            [*self.sde.spaced(steps), CLEAN],
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
        done = torch.lerp(self.into_range(found), x, mask)
        return Applied(done, rows=("inpainted",), known=mask, how="masked", labels=y)

    @torch.no_grad()
    def score_denoise(self, x: Tensor, *, noise: Noise, times: int = 10) -> Tensor:
        """[B]: mean squared error of the estimate of ε over `times` levels, evenly spaced in log σ/α."""
        y, error = self.known_labels(None), 0.0
        for level in self.sde.spaced(times + 2, "logsnr")[1:-1]:
            eps = noise.randn(*x.shape).to(x)
            guess = self.split(level.alpha * x + level.sigma * eps, x.new_full((len(x),), level.t), y)[1]
            error = error + (eps - guess).square().flatten(1).mean(1)
        return error / times
