"""Blocks that three models or more share."""

from gzcli.models.nn.common import ClassEmbedding, all_mean, from_levels, full, spread_labels, to_levels, zero_init
from gzcli.models.nn.lpips import LPIPS
from gzcli.models.nn.patchgan import PatchGAN
from gzcli.models.nn.unet import UNet

__all__ = [
    "LPIPS",
    "ClassEmbedding",
    "PatchGAN",
    "UNet",
    "all_mean",
    "from_levels",
    "full",
    "spread_labels",
    "to_levels",
    "zero_init",
]
