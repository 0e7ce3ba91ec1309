"""The PatchGAN discriminator — Isola et al. 2016, arXiv:1611.07004, section 3.2.2: every patch is judged by
itself."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.errors import UsageError
from gzcli.models.nn.common import to_fp32


class PatchGAN(nn.Module):
    """Images [B, C, H, W] → a map of logits [B, 1, h', w'], fp32; with 3 layers and kernels of 4 a patch has
    70 pixels.

    layers: halvings; width: channels of the first, doubled by each, at most 8-fold. norm: `instance` without,
    `group` with scales; no layer looks at other images of the batch. Raises UsageError for images too small.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        width: int = 64,
        layers: int = 3,
        norm: Literal["none", "group", "instance"] = "group",
    ):
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
            nn.Identity() if k == 0 else make_norm(norm, o) for k, o in enumerate(widths[1:])
        )
        self.head = nn.Conv2d(widths[-1], 1, 4, padding=1)
        for conv in (*self.convs, self.head):
            nn.init.normal_(conv.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.2)
        return to_fp32(self.head(x))


def make_norm(norm: str, width: int) -> nn.Module:
    if norm == "none":
        return nn.Identity()
    if norm == "instance":
        return nn.GroupNorm(width, width, affine=False)  # each channel its own group: instance norm
    return nn.GroupNorm(next(g for g in (8, 4, 2, 1) if width % g == 0), width)
