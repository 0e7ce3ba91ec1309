"""Blocks that three models or more share."""

from gzcli.models.nn.adversarial import PatchGAN
from gzcli.models.nn.common import (
    ClassEmbedding,
    at_least,
    best_labels,
    double,
    fresh_statistics,
    from_levels,
    full_fp32,
    halvings,
    spread_labels,
    stacked,
    to_fp32,
    to_levels,
    valueless,
    zero_init,
)
from gzcli.models.nn.latent import as_interpolations, interpolated, pairs_of, slerp, traversal
from gzcli.models.nn.lpips import LPIPS
from gzcli.models.nn.unet import UNet

__all__ = [
    "LPIPS",
    "ClassEmbedding",
    "PatchGAN",
    "UNet",
    "as_interpolations",
    "at_least",
    "best_labels",
    "double",
    "fresh_statistics",
    "from_levels",
    "full_fp32",
    "halvings",
    "interpolated",
    "pairs_of",
    "slerp",
    "spread_labels",
    "stacked",
    "to_fp32",
    "to_levels",
    "traversal",
    "valueless",
    "zero_init",
]
