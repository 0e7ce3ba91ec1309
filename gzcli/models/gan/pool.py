"""The image pool — Shrivastava et al. 2016, arXiv:1612.07828, section 2.3: earlier fakes are shown to the
discriminator again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gzcli.core import ranks
from gzcli.core.types import Noise


class ImagePool(nn.Module):
    """Up to `size` earlier fakes.

    Until the pool is full, every image is stored and shown. From then on an image is either shown, or it
    replaces a stored image, which is shown. While it trains, all ranks have the same pool, which
    stores the images of all in their order. It is no buffer, as its size is known by its first image alone.

    size: number of images; 0: every image is shown, and none stored.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size, self.count = size, 0
        self.images: Tensor | None = None  # [size, C, H, W]

    @torch.compiler.disable  # which would compile anew for every count
    @torch.no_grad()
    def forward(self, images: Tensor, noise: Noise) -> Tensor:
        """The images that are shown in place of images [B, C, H, W]. The host never waits for the device."""
        if not self.size:
            return images
        n = len(images)
        old, slot = ranks.rows(noise.rand(n), self) < 0.5, ranks.rows(noise.randint(self.size, n), self)
        images = ranks.rows(images, self)
        kept = images.new_zeros(self.size, *images.shape[1:]) if self.images is None else self.images
        self.images = kept.to(images)
        shown = images.clone()
        for i in range(len(images)):
            if self.count < self.size:
                self.images[self.count] = images[i]
                self.count += 1
                continue
            stored = self.images.index_select(0, slot[i : i + 1])
            shown[i] = torch.where(old[i], stored[0], images[i])
            self.images.index_copy_(0, slot[i : i + 1], torch.where(old[i], images[i : i + 1], stored))
        return ranks.own_rows(shown, self)

    def get_extra_state(self) -> dict[str, Any]:
        return {"count": self.count, "images": None if self.images is None else self.images.cpu()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.count, self.images = state["count"], state["images"]
