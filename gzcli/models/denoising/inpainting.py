"""Inpainting by a denoiser that was not trained for it: by RePaint, or by the first two moments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gzcli.core.types import Applied, Noise, Progress, no_progress
from gzcli.models.denoising.guided import Guided
from gzcli.models.denoising.posterior import Known, conditioned, pixels
from gzcli.models.denoising.round_trip import RoundTrip, check_strength
from gzcli.models.denoising.samplers import Denoise, Sampler, dpmpp, draws_like, repaint
from gzcli.models.denoising.schedule import Level
from gzcli.models.nn import at_least


class Inpainting(RoundTrip):
    """Round trips and inpainting by the `denoiser` of a model with discrete levels of noise.

    walk_back: the sampler of round trips.
    """

    walk_back: ClassVar[Sampler]

    @property
    def prior_std(self) -> float:
        """The deviation of noise at the first level."""
        return 1.0

    def denoiser(self, y: Tensor | None, *, guidance: float = 1.0, clip: bool = True) -> Denoise:
        """The function of samplers that estimates (x_0, ε).

        y: labels that the estimates are conditioned on.
        guidance: strength of the labels.
        clip: whether x_0 is clamped to [-1, 1].
        """
        raise NotImplementedError

    def level(self, t: float) -> Level:
        """α and σ at time t."""
        raise NotImplementedError

    def levels(self, steps: int, *, strength: float = 1.0, even_logsnr: bool = False) -> list[Level]:
        """A sampler's path to the clean image, of at most `steps` steps.

        strength: the first noise level, as a share of the way to pure noise.
        even_logsnr: whether steps are equal in log σ/α, in place of the family's own spacing.
        """
        raise NotImplementedError

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
        check_strength(strength)
        path = self.levels(steps, strength=strength)
        x_t = path[0].alpha * x + path[0].sigma * noise.randn(*x.shape)
        denoise = self.denoiser(self.known_labels(y), guidance=guidance)
        back = self.walk_back(denoise, x_t, path, randn=draws_like(noise, x), progress=progress)
        return x_t, self.into_range(back)

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
        """Images [B, C, H, W] completed where mask [B, 1, H, W] is 0. Without a mask the middle is hidden,
        half as high and wide as the image.

        RePaint (Lugmayr 2022, arXiv:2201.09865; for scores Song 2021, appendix I.2) replaces the known pixels
        at each level by noised ones, which is not exactly the distribution of the hidden pixels given the
        known ones. For a Gaussian with correlated pixels of deviation .37 its mean is off by .14 at the
        default, by .10 with 1,000 calls, and its variance by a sixth. The method `moments` (posterior.py) is
        off by .01 in 25 steps.

        steps: levels of noise.
        resample: times that RePaint walks each stretch; it takes at most steps × resample network calls.
        jump: levels of a stretch of RePaint.
        method: repaint; moments: condition on the known pixels by the first two moments of images.
        iterations: of conjugate gradients in each step of moments, which takes one network call and
          iterations + 1 of its gradient.
        guidance: strength of the labels; 1: as trained, 0: without them, more: sharper.
        """
        at_least(1, steps=steps, resample=resample, jump=jump, iterations=iterations)
        mask, y = to_complete(self, x, mask, labels)
        start = self.prior_std * noise.randn(*x.shape)
        if method == "moments":
            loose = self.denoiser(y, guidance=guidance, clip=False)
            path = self.levels(steps, even_logsnr=True)
            known = pixels(mask)
            found = by_moments(self, loose, self.level, start, path, mask * x, known, iterations, progress)
        else:
            found = repaint(
                self.denoiser(y, guidance=guidance),
                start,
                self.levels(steps),
                known=x,
                mask=mask,
                randn=draws_like(noise, x),
                resample=resample,
                jump=jump,
                progress=progress,
            )
        return completed(self, x, found, mask, y)


def to_complete(
    model: Guided, x: Tensor, mask: Tensor | None, labels: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The mask [B, 1, H, W] of images x to be completed, and their labels; None where they are unknown."""
    mask = middle_hidden(x) if mask is None else mask.to(x)
    return mask, model.asked_labels(labels, len(x)) if labels is not None else model.known_labels(None)


def by_moments(
    model: Guided,
    denoise: Denoise,
    level: Callable[[float], Level],
    start: Tensor,
    path: Sequence[Level],
    y: Tensor,
    known: Known,
    iterations: int,
    progress: Progress,
) -> Tensor:
    """`start` denoised along `path` given what is known of the images, y, by `posterior.conditioned`.

    denoise: the denoiser without clipping.
    """
    given_y = conditioned(denoise, level, y, known, iterations=iterations, into_range=model.into_range)
    return dpmpp(given_y, start, path, progress=progress)


def completed(model: Guided, x: Tensor, found: Tensor, mask: Tensor, y: Tensor | None) -> Applied:
    """The known pixels of x, and the hidden ones of `found`."""
    done = torch.lerp(model.into_range(found), x, mask)
    return Applied(done, rows=("inpainted",), known=mask, how="masked", labels=y)


def middle_hidden(x: Tensor) -> Tensor:
    """The mask [B, 1, H, W] that hides the middle quarter of x: 0 in the middle, 1 elsewhere."""
    n, _, h, w = x.shape
    mask = x.new_ones(n, 1, h, w)
    mask[:, :, h // 4 : h - h // 4, w // 4 : w - w // 4] = 0
    return mask
