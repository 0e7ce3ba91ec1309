"""Networks net(x, t, y, drop) of a noised image, its time and its label, with classifier-free guidance (Ho &
Salimans 2022, arXiv:2207.12598).

x [B, C, H, W]; t [B]; y: labels [B] or [B, K], or None where they are unknown; drop [B]: rows whose label is
hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gzcli.core.errors import UsageError
from gzcli.core.types import DataInfo, Noise
from gzcli.core.units import Size, sides
from gzcli.models.labelled import ClusterOptions, Labelled
from gzcli.models.nn import to_fp32


class Guided(Labelled):
    """A model of a network that may be conditioned on labels."""

    latents = True
    net: nn.Module

    def __init__(self, data: DataInfo, net: nn.Module, labels: ClusterOptions):
        super().__init__(data, labels)
        self.net = net

    def drawn_shape(self, size: Size | None) -> tuple[int, ...]:
        """The shape (C, H, W) of images that are drawn.

        size: in pixels; None: that of the training images.

        Raises UsageError for another size where the network is made for one, or where latents are drawn.
        """
        if size is None or sides(size) == self.data.shape[1:]:
            return self.data.shape
        if self.data.levels is None or not getattr(self.net, "any_size", False):
            why = "latents" if self.data.levels is None else "one size of images"
            height, width = self.data.shape[1:]
            raise UsageError(
                f"`size` {size}: the network of `{type(self).__name__}` is made for {why}",
                hint=f"leave `size` out: it draws {width}×{height}; the U-Nets of ddpm, fm and sgm draw any",
            )
        return self.data.shape[0], *sides(size)

    def guided(self, x: Tensor, t: Tensor, y: Tensor | None, scale: float) -> Tensor:
        """The guided output u + scale · (c − u) in fp32, of the outputs c with labels and u without (eq. 6,
        where w = scale − 1).

        It takes one pass of a doubled batch; at scales 1 and 0 one pass of the batch.
        """
        if y is None or scale in (0, 1):
            return to_fp32(self.net(x, t, y if scale else None))
        n = x.shape[0]
        hidden = torch.arange(2 * n, device=x.device) >= n
        both = to_fp32(self.net(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, y]), hidden))
        return torch.lerp(both[n:], both[:n], scale)

    def guided_within(
        self,
        predict: Callable[[Tensor, Tensor, Tensor | None, float], Tensor],
        x: Tensor,
        t: Tensor,
        y: Tensor | None,
        scale: float,
        interval: Sequence[float],
    ) -> Tensor:
        """Guidance within an interval of times (Kynkäänniemi 2024, arXiv:2404.07724): predict(x, t, y, scale)
        for rows whose time t [B] is in the interval, and predict(x, t, y, 1), which takes half the passes of
        the network, outside.

        Rows may be at different times of [0, 1], as in the adaptive solver.
        """
        low, high = interval
        if scale == 1 or (low <= 0 and high >= 1):
            return predict(x, t, y, scale)
        inside = (low <= t) & (t <= high)
        if bool(inside.all()):
            return predict(x, t, y, scale)
        if not bool(inside.any()):
            return predict(x, t, y, 1.0)
        out = torch.empty_like(x)
        for rows, strength in ((inside, scale), (~inside, 1.0)):
            out[rows] = predict(x[rows], t[rows], None if y is None else y[rows], strength)
        return out

    def into_range(self, x: Tensor) -> Tensor:
        """Images clamped to [-1, 1]; latents unchanged."""
        return x if self.data.levels is None else x.clamp(-1, 1)


def stratified(u: Tensor, noise: Noise) -> Tensor:
    """Uniform draws u [B], moved so that each of the equal shares of [0, 1) has one (Kingma 2021,
    arXiv:2107.00630, appendix I.1).

    There are as many shares as the global batch has rows; a `noise` without a global batch leaves u
    unchanged.
    """
    total, start = getattr(noise, "total", None), getattr(noise, "start", 0)
    if not total:
        return u
    return (u + (start + torch.arange(len(u), device=u.device))) / total


def logit_normal(u: Tensor) -> Tensor:
    """Uniform draws u as draws of (0, 1) whose logits are standard normal (Esser 2024, arXiv:2403.03206,
    section 3.1)."""
    return torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)).sigmoid()
