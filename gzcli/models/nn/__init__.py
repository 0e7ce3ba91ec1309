"""Blocks that three models or more share."""

from gzcli.models.nn.common import (
    ClassEmbedding,
    all_mean,
    all_rows,
    best_labels,
    fresh_statistics,
    from_levels,
    full,
    full_fp32,
    spread_labels,
    stacked,
    to_levels,
    zero_init,
)
from gzcli.models.nn.latent import slerp, traversal, ways
from gzcli.models.nn.lpips import LPIPS
from gzcli.models.nn.patchgan import PatchGAN
from gzcli.models.nn.unet import UNet

__all__ = [
    "LPIPS",
    "ClassEmbedding",
    "PatchGAN",
    "UNet",
    "all_mean",
    "all_rows",
    "best_labels",
    "fresh_statistics",
    "from_levels",
    "full",
    "full_fp32",
    "slerp",
    "spread_labels",
    "stacked",
    "to_levels",
    "traversal",
    "ways",
    "zero_init",
]
