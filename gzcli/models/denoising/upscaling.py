"""Enlarging images by a model that was not trained for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional as F

from gzcli.core.errors import UsageError
from gzcli.core.types import Applied, Progress
from gzcli.models.denoising.guided import Guided
from gzcli.models.denoising.inpainting import by_moments
from gzcli.models.denoising.posterior import means
from gzcli.models.denoising.samplers import Denoise
from gzcli.models.denoising.schedule import Level


def reduced(model: Guided, x: Tensor, factor: int) -> tuple[Tensor, int]:
    """The small images, and how many times smaller than the model's they are.

    Raises UsageError for sizes that do not fit.

    x: small images [B, C, h, w], where h divides H; or images of full size, which are first reduced.
    factor: by how much images of full size are reduced.
    """
    full = model.data.shape[1:]
    if x.shape[2:] == full:
        if any(side % factor for side in full):
            raise UsageError(f"`factor` {factor} does not divide images of {full[0]}×{full[1]}")
        x = F.avg_pool2d(x, factor)
    by = full[0] // x.shape[2]
    if tuple(s * by for s in x.shape[2:]) != tuple(full):
        raise UsageError(f"images of {tuple(x.shape[2:])} pixels are no whole part of {tuple(full)}")
    return x, by


def enlarged(
    model: Guided,
    small: Tensor,
    by: int,
    denoise: Denoise,
    level: Callable[[float], Level],
    start: Tensor,
    path: Sequence[Level],
    iterations: int,
    progress: Progress,
) -> Applied:
    """Images with the block means `small`, `start` denoised along `path` by the first two moments of images
    (posterior.py; Rozet 2024, arXiv:2405.13712).

    small: [B, C, H / by, W / by].
    denoise: the denoiser without clipping.
    """
    known = means(by)
    found = model.into_range(
        by_moments(model, denoise, level, start, path, small, known, iterations, progress)
    )
    return Applied(found, rows=("upscaled",), given=small, how=f"small, 1/{by}")
