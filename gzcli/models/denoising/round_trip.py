"""Applications and a score that noise images in part and denoise them again, as SDEdit does (Meng 2022,
arXiv:2108.01073)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gzcli.core.errors import UsageError
from gzcli.core.types import Applied, Batch, DataInfo, Noise, Progress, no_progress
from gzcli.models.denoising.guided import Guided
from gzcli.models.labelled import ClusterOptions
from gzcli.models.nn import at_least


class RoundTrip(Guided):
    """The score `recon`, reconstructions and edits, by the `round_trip` that a family defines."""

    perceptual_scores = ("recon",)
    recon_mean: Tensor | None  # of each error of an image, set by `fit_recon`
    recon_std: Tensor | None

    def __init__(self, data: DataInfo, net: nn.Module, labels: ClusterOptions):
        super().__init__(data, net, labels)
        self.register_buffer("recon_mean", None, persistent=False)
        self.register_buffer("recon_std", None, persistent=False)

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
        """The noised images, and these denoised, both [B, C, H, W].

        Raises UsageError for a strength outside 0 … 1.

        x: images [B, C, H, W].
        strength: noise level as a share of the way to pure noise, 0 … 1.
        steps: denoising steps, at most.
        y: labels [B] or [B, K] for denoising; None: unknown.
        guidance: strength of the labels.
        """
        raise NotImplementedError

    @torch.no_grad()
    def score_recon(
        self, x: Tensor, *, noise: Noise, starts: int = 4, steps: int = 10, pixels: bool = False
    ) -> Tensor:
        """[B]: the mean error of images rebuilt from several noise levels (Graham 2023, arXiv:2211.07740).

        After `fit_recon` it is the mean of the errors' z-scores. Raises UsageError where the fit had another
        number of errors.

        starts: noise levels from which images are rebuilt.
        steps: denoising steps from each noise level, at most.
        pixels: leave out the perceptual distance, and take the error of pixels alone.
        """
        errors = self.recon_errors(x, noise, starts, steps, pixels)
        if self.recon_mean is None or self.recon_std is None:
            return errors.mean(1)
        if len(self.recon_mean) != errors.shape[1]:
            raise UsageError(
                f"`recon` was fitted with {len(self.recon_mean)} errors an image, not {errors.shape[1]}"
            )
        return ((errors - self.recon_mean) / self.recon_std).mean(1)

    @torch.no_grad()
    def fit_recon(
        self, batches: Iterable[Batch], *, starts: int = 4, steps: int = 10, pixels: bool = False
    ) -> None:
        """Mean and deviation of each error over held-out in-distribution batches; options as in
        `score_recon`."""
        errors = torch.cat([self.recon_errors(b.x, b.noise, starts, steps, pixels) for b in batches])
        self.recon_mean, self.recon_std = errors.mean(0), errors.std(0).clamp(min=1e-8)

    def recon_errors(self, x: Tensor, noise: Noise, starts: int, steps: int, pixels: bool) -> Tensor:
        """[B, starts or 2 · starts]: mean squared errors of round trips of strength k / (starts + 1), then
        their perceptual distances."""
        back = [self.round_trip(x, noise, (k + 1) / (starts + 1), steps)[1] for k in range(starts)]
        errors = [(x - b).square().flatten(1).mean(1) for b in back]
        if self.perceptual is not None and not pixels:
            errors += [self.perceptual(x, b) for b in back]
        return torch.stack(errors, 1)

    @torch.no_grad()
    def map_recon(self, x: Tensor, *, noise: Noise, starts: int = 4, steps: int = 10) -> Tensor:
        """|x − x̂| at each pixel, the mean over channels and noise levels: [B, H, W]; options as in
        `score_recon`."""
        back = [self.round_trip(x, noise, (k + 1) / (starts + 1), steps)[1] for k in range(starts)]
        return torch.stack([(x - b).abs().mean(1) for b in back]).mean(0)

    @torch.no_grad()
    def reconstruct(
        self,
        x: Tensor,
        *,
        noise: Noise,
        progress: Progress = no_progress,
        strength: float = 0.4,
        steps: int = 20,
    ) -> Applied:
        """Images [B, C, H, W] noised and denoised, as the score `recon` compares them with x.

        strength: noise level as a share of the way to pure noise, 0 … 1.
        steps: denoising steps, at most.
        """
        at_least(1, steps=steps)
        x_t, back = self.round_trip(x, noise, strength, steps, progress=progress)
        return Applied(back, rows=("denoised",), given=x_t, how="noised")

    @torch.no_grad()
    def edit(
        self,
        x: Tensor,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        strength: float = 0.6,
        steps: int = 50,
        guidance: float = 1.0,
    ) -> Applied:
        """SDEdit: images [B, C, H, W] noised, and denoised given `labels` if the model is conditional.

        strength: noise level as a share of the way to pure noise, 0 … 1; more changes more.
        steps: denoising steps, at most.
        guidance: strength of the labels; 1: as trained, 0: without them, more: sharper.
        """
        at_least(1, steps=steps)
        y = self.asked_labels(labels, len(x))
        x_t, back = self.round_trip(x, noise, strength, steps, y=y, guidance=guidance, progress=progress)
        return Applied(back, rows=("edited",), given=x_t, how="noised", labels=y)


def check_strength(strength: float) -> None:
    """Raises UsageError outside 0 … 1."""
    if not 0 < strength <= 1:
        raise UsageError(f"`strength` is a share of the way to pure noise, 0 … 1, not {strength:g}")
