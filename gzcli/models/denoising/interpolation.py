"""Interpolation of images between the noises that a deterministic model maps them to."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gzcli.core.types import Applied
from gzcli.models.nn import as_interpolations, at_least, interpolated, pairs_of, slerp


def through_noise(
    x: Tensor, frames: int, to_noise: Callable[[Tensor], Tensor], to_images: Callable[[Tensor], Tensor]
) -> Applied:
    """Interpolations from image 0 to 1, 2 to 3, … of x [n, C, H, W], along great circles between their
    noises, which keep the norm of noise.

    Raises UsageError for fewer than two images, or frames.

    frames: images of an interpolation, both ends included.
    to_noise: the noises of images, both [n, C, H, W].
    to_images: the images of noises.
    """
    at_least(2, frames=frames)
    x = pairs_of(x)
    z = interpolated(to_noise(x).flatten(1), frames, slerp).unflatten(1, x.shape[1:])
    return as_interpolations(to_images(z), frames)
