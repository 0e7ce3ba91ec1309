"""Mixtures of discretised logistics over whole pixels, with the face of `Pixels`."""

from __future__ import annotations

import torch
from torch import Tensor

from gzcli.errors import UsageError
from gzcli.models.nn.logistic import LogisticMixture


class MixturePixels(LogisticMixture):
    """The distribution p(x | z) of pixels that a decoder's output [B, size, H, W] parametrises.

    Raises UsageError where there are no grey levels.
    """

    def __init__(self, channels: int, levels: int | None, components: int):
        if levels is None:
            raise UsageError(
                "`model.pixels: mixture` needs grey levels, latents have none", hint="use `gaussian`"
            )
        super().__init__(channels, levels, components)

    def log_prob(self, x: Tensor, out: Tensor) -> Tensor:
        """log p(x | out) in nats, summed over pixels: x [B, C, H, W] → [B], fp32."""
        return super().log_prob(out.movedim(1, -1), x.movedim(1, -1)).flatten(1).sum(1)

    def draw(self, out: Tensor, u: Tensor, temperature: float = 1.0) -> Tensor:
        """A picture drawn pixel by pixel, by inversion at u, uniform [B, C + 1, H, W]."""
        return super().draw(out.movedim(1, -1), u.movedim(1, -1), temperature).movedim(-1, 1)

    def mean(self, out: Tensor) -> Tensor:
        """The picture to show: the location of each pixel's heaviest component, as a draw at temperature 0
        is."""
        middle = out.new_full((len(out), self.uniforms, *out.shape[2:]), 0.5, dtype=torch.float32)
        return self.draw(out, middle, temperature=1e-4)
