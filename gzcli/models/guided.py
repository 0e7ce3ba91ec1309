"""Models that are a network net(x, t, y, drop) of a noised image, its time and its label, with
classifier-free guidance.

y: labels, or None = unknown; drop [B]: rows whose label is unknown (Ho & Salimans 2022, arXiv:2207.12598).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from gzcli.errors import UsageError
from gzcli.models.base import Model
from gzcli.models.nn import at_least, spread_labels, to_fp32
from gzcli.types import Applied, Batch, DataInfo, Noise, Progress, no_progress


class Guided(Model):
    """label_dropout: share of labels hidden in training, which guidance and scores without labels need.

    Raises UsageError for a conditional model of data without labels.
    """

    latents = True

    def __init__(self, data: DataInfo, net: nn.Module, *, conditional: bool, label_dropout: float):
        super().__init__(data)
        if conditional and not data.classes:
            raise UsageError(
                "a conditional model of data without labels", hint="set `model.conditional` to `false`"
            )
        self.net, self.conditional, self.label_dropout = net, conditional, label_dropout

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def training_labels(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """The labels of a batch, and the rows [B] that are to do without."""
        if not self.conditional:
            return None, None
        return batch.y, batch.noise.rand(len(batch)).to(batch.x.device) < self.label_dropout

    def asked_labels(self, labels: Tensor | None, n: int) -> Tensor | None:
        """The labels to sample by: as asked or spread over the classes; None for an unconditional model."""
        return spread_labels(labels, n, self.data, self.device) if self.conditional else None

    def known_labels(self, labels: Tensor | None) -> Tensor | None:
        """The labels of given images, None = unknown. Raises UsageError if the model never saw an unknown
        label."""
        if self.conditional and labels is None and not self.label_dropout:
            raise UsageError(
                "a model trained without label dropout needs labels", hint="set `model.label_dropout`"
            )
        return labels if self.conditional else None

    def to_complete(
        self, x: Tensor, mask: Tensor | None, labels: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The mask of images to be completed, of their middle if None, and their labels: as asked, else
        unknown."""
        mask = middle_hidden(x) if mask is None else mask.to(x)
        return mask, self.asked_labels(labels, len(x)) if labels is not None else self.known_labels(None)

    def check_guidance(self, guidance: float, y: Tensor | None) -> None:
        """Raises UsageError for guidance that there can be none of."""
        if guidance != 1 and not (self.conditional and self.label_dropout):
            raise UsageError(
                f"`guidance` {guidance:g} needs a conditional model trained with label dropout",
                hint="set `model.conditional` to `true` and train, or `guidance` to 1",
            )
        if guidance != 1 and y is None:
            raise UsageError("guidance needs labels to go towards", hint="name them with `--label`")

    def guided(self, x: Tensor, t: Tensor, y: Tensor | None, scale: float) -> Tensor:
        """The network's output u + scale · (c − u), c given the labels, u without (eq. 6, where w is scale −
        1), in fp32.

        One pass of a doubled batch; of the batch itself at scales 1 and 0.
        """
        if scale in (0, 1):
            return to_fp32(self.net(x, t, y if scale else None))
        n = len(x)
        hidden = torch.arange(2 * n, device=x.device) >= n
        both = to_fp32(self.net(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, y]), hidden))
        return torch.lerp(both[n:], both[:n], scale)

    def guided_within(
        self,
        predict: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        y: Tensor | None,
        scale: float,
        interval: Sequence[float],
    ) -> Tensor:
        """predict(x, t, y, scale) of the rows whose time t [B] lies in the `interval`, and at scale 1 of the
        others: only rows that are guided take two passes (Kynkäänniemi 2024, arXiv:2404.07724)."""
        low, high = interval
        inside = (low <= t) & (t <= high)
        if scale == 1 or bool(inside.all()):
            return predict(x, t, y, scale)
        if not bool(inside.any()):
            return predict(x, t, y, 1.0)
        out = torch.empty_like(x)  # images may be at different times, as in the adaptive solver
        for rows, strength in ((inside, scale), (~inside, 1.0)):
            out[rows] = predict(x[rows], t[rows], y[rows], strength)
        return out

    def into_range(self, x: Tensor) -> Tensor:
        """Images into [-1, 1]; latents stay."""
        return x if self.data.levels is None else x.clamp(-1, 1)


class Returning(Guided):
    """What all of them can do by noising images part of the way and denoising them, for which they define
    `there_and_back`."""

    perceptual_scores = ("recon",)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("recon_mean", None, persistent=False)  # [errors of an image], by fit_recon
        self.register_buffer("recon_std", None, persistent=False)

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
        """x noised to the share `strength` of the way to pure noise, and that denoised in at most `steps`
        steps."""
        raise NotImplementedError

    @torch.no_grad()
    def score_recon(
        self, x: Tensor, *, noise: Noise, starts: int = 4, steps: int = 10, pixels: bool = False
    ) -> Tensor:
        """[B]: error of images rebuilt from `starts` noise levels in `steps` steps each (Graham 2023,
        arXiv:2211.07740).

        Errors, of pixels and, unless only `pixels` are asked for, of the `perceptual` distance, are z-scored
        level by level by
        `fit_recon`, and averaged; without it they are averaged as they are. Raises UsageError where it was
        fitted otherwise.
        """
        errors = self.recon_errors(x, noise, starts, steps, pixels)
        if self.recon_mean is None:
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
        """Mean and deviation of each level's errors over held-out in-distribution batches."""
        errors = torch.cat([self.recon_errors(b.x, b.noise, starts, steps, pixels) for b in batches])
        self.recon_mean, self.recon_std = errors.mean(0), errors.std(0).clamp(min=1e-8)

    def recon_errors(self, x: Tensor, noise: Noise, starts: int, steps: int, pixels: bool) -> Tensor:
        """[B, starts or 2 · starts]: mean squared errors after noising to the share k/(starts + 1) of the way
        and back, then the perceptual distances."""
        back = [self.there_and_back(x, noise, (k + 1) / (starts + 1), steps)[1] for k in range(starts)]
        errors = [(x - b).square().flatten(1).mean(1) for b in back]
        if self.perceptual is not None and not pixels:
            errors += [self.perceptual(x, b) for b in back]
        return torch.stack(errors, 1)

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
        """Images [B, C, H, W] noised part of the way and denoised: what the score `recon` compares with x."""
        at_least(1, steps=steps)
        x_t, back = self.there_and_back(x, noise, strength, steps, progress=progress)
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
        """SDEdit (Meng 2022, arXiv:2108.01073): guides [B, C, H, W] noised part of the way and denoised, to
        `labels` if conditional."""
        at_least(1, steps=steps)
        y = self.asked_labels(labels, len(x))
        x_t, back = self.there_and_back(x, noise, strength, steps, y=y, guidance=guidance, progress=progress)
        return Applied(back, rows=("edited",), given=x_t, how="noised", labels=y)


def check_strength(strength: float) -> None:
    """Raises UsageError outside 0 … 1."""
    if not 0 < strength <= 1:
        raise UsageError(f"`strength` is a share of the way to pure noise, 0 … 1, not {strength:g}")


def middle_hidden(x: Tensor) -> Tensor:
    """The mask [B, 1, H, W] that hides the middle quarter of x: 0 there, 1 elsewhere."""
    n, _, h, w = x.shape
    mask = x.new_ones(n, 1, h, w)
    mask[:, :, h // 4 : h - h // 4, w // 4 : w - w // 4] = 0
    return mask


def stratified(u: Tensor, noise: Noise) -> Tensor:
    """Uniform times u [B], one from each of the batch's equal shares of [0, 1) (as Kingma 2021,
    arXiv:2107.00630, appendix I.1), where the noise of a batch knows how large it is."""
    if not (total := getattr(noise, "total", None)):
        return u
    return (u + torch.arange(noise.start, noise.start + len(u), device=u.device)) / total
