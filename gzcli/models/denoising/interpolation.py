"""Ways between images through the noises that a model makes of them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gzcli.models.nn import as_ways, at_least, pairs_of, slerp, ways
from gzcli.types import Applied


def through_noise(
    x: Tensor, frames: int, to_noise: Callable[[Tensor], Tensor], to_images: Callable[[Tensor], Tensor]
) -> Applied:
    """The way from image 0 to 1, 2 to 3, … of x [n, C, H, W], ends included, along great circles between
    their noises, which keep the norm of noise.

    Raises UsageError for fewer than two images, or frames.

    frames: images of a way.
    to_noise, to_images: between images and noises, both [n, C, H, W].
    """
    at_least(2, frames=frames)
    x = pairs_of(x)
    z = ways(to_noise(x).flatten(1), frames, slerp).unflatten(1, x.shape[1:])
    return as_ways(to_images(z), frames)
