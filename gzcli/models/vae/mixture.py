"""Mixtures of discretised logistics over whole pixels, as the distribution p(x | z) of a decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from gzcli.core.errors import UsageError
from gzcli.models.nn.common import at_least
from gzcli.models.nn.logistic import LogisticMixture
from gzcli.models.vae.pixels import Kind, PixelDistribution, Pixels


class MixturePixels:
    """The distribution p(x | z), whose parameters are a decoder's output [B, size, H, W].

    Raises UsageError for latents, which have no grey levels.

    channels: channels C of an image.
    levels: number of grey levels.
    components: logistics of a pixel's mixture.
    """

    def __init__(self, channels: int, levels: int | None, components: int):
        if levels is None:
            raise UsageError(
                "`model.pixels: mixture` needs grey levels, latents have none", hint="use `gaussian`"
            )
        self.mixture = LogisticMixture(channels, levels, components)
        self.size, self.uniforms = self.mixture.size, self.mixture.uniforms
        self.start: Callable[[Tensor], None] | None = self.mixture.start

    def log_prob(self, x: Tensor, out: Tensor) -> Tensor:
        """log p(x | out) in nats, summed over pixels: x [B, C, H, W] → [B], fp32."""
        return self.mixture.log_prob(out.movedim(1, -1), x.movedim(1, -1)).flatten(1).sum(1)

    def draw(self, out: Tensor, u: Tensor, temperature: float = 1.0) -> Tensor:
        """Pixels [B, C, H, W] drawn by inversion at u, uniform [B, C + 1, H, W]."""
        return self.mixture.draw(out.movedim(1, -1), u.movedim(1, -1), temperature).movedim(-1, 1)

    def mean(self, out: Tensor) -> Tensor:
        """The location of each pixel's heaviest component [B, C, H, W]: a draw at temperature 0."""
        shape = len(out), self.mixture.uniforms, *out.shape[2:]
        return self.draw(out, out.new_full(shape, 0.5, dtype=torch.float32), temperature=1e-4)


def distribution(
    kind: Kind | Literal["auto", "mixture"], channels: int, levels: int | None, components: int
) -> PixelDistribution:
    """The distribution of a model's option `pixels`: of whole pixels for `mixture`, else of each channel.

    channels: channels of an image.
    levels: number of grey levels; None for latents.
    components: logistics of a pixel's mixture.
    """
    at_least(1, **{"model.mixture": components})
    return (
        MixturePixels(channels, levels, components) if kind == "mixture" else Pixels(kind, levels, channels)
    )
