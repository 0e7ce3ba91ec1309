"""The PatchGAN discriminator, which classifies every patch of an image by itself (Isola et al. 2016,
arXiv:1611.07004, section 3.2.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.core.errors import UsageError
from gzcli.models.nn.common import group_norm, to_fp32

PatchNorm = Literal["none", "group", "instance"]

# There is no batch norm: no layer may depend on other images of the batch.
NORMS: dict[PatchNorm, Callable[[int], nn.Module]] = {
    "none": lambda width: nn.Identity(),
    "group": group_norm,
    "instance": lambda width: nn.GroupNorm(width, width, affine=False),  # each channel is a group of its own
}


class PatchGAN(nn.Module):
    """Images [B, C, H, W] → a map of logits [B, 1, h', w'], fp32. A patch of 3 layers has 70×70 pixels.

    Raises UsageError for images that are too small.

    shape: of an image, (C, H, W).
    width: channels of the first layer, doubled by each further one, at most 8-fold.
    layers: number of convolutions of stride 2.
    norm: `group` has learned scales, `instance` has none.
    """

    def __init__(self, shape: tuple[int, ...], width: int = 64, layers: int = 3, norm: PatchNorm = "group"):
        super().__init__()
        side = min(shape[1:]) // 2**layers
        if side < 3:  # two convolutions of stride 1 take a pixel each
            raise UsageError(
                f"images of {shape[1]}×{shape[2]} are too small for a discriminator of {layers} halvings",
                hint="set fewer `layers` of the discriminator",
            )
        widths = [shape[0], *(width * min(2**i, 8) for i in range(layers + 1))]
        strides = [2] * layers + [1]
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 4, stride=s, padding=1, bias=k == 0 or norm == "none")
            for k, (i, o, s) in enumerate(zip(widths[:-1], widths[1:], strides, strict=True))
        )
        self.norms = nn.ModuleList(
            nn.Identity() if k == 0 else NORMS[norm](o) for k, o in enumerate(widths[1:])
        )
        self.head = nn.Conv2d(widths[-1], 1, 4, padding=1)
        for conv in (*self.convs, self.head):
            nn.init.normal_(conv.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.2)
        return to_fp32(self.head(x))
