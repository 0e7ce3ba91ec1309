"""The first judge, the feature space of the metric `fd`: a LeNet of the data set itself. The features are the
64 penultimate activations before the ReLU, which would lower their rank."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from gzcli.core.types import Say, silent
from gzcli.core.units import Size, sides
from gzcli.data.packs.pack import Pack
from gzcli.metrics.classifier import FEATURES, Classifier, NetFeatures, Training, at_hand, once
from gzcli.metrics.networks import RECIPES

FEATURE_WIDTHS = (16, 32, 64, 64)
LR, WEIGHT_DECAY = 3e-3, 1e-2
# Largest changes of an image: a 6 stays a 6, and the rotations can be told apart.
MAX_ANGLE, MAX_SCALE, MAX_SHIFT = math.radians(10), 0.1, 0.08  # a shift is a share of the side
CONTRAST, BRIGHTNESS = 0.2, 0.1  # of colour images


class LeNet(Classifier):
    """5×5 convolutions and pooling down to a side of at most 7, then 64 features and a linear head."""

    def __init__(self, channels: int, size: Size, outputs: int):
        super().__init__(size)
        height, width = sides(size)
        layers: list[nn.Module] = []
        for filters in FEATURE_WIDTHS:
            layers += [nn.Conv2d(channels, filters, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
            channels, height, width = filters, height // 2, width // 2
            if min(height, width) <= 7:
                break
        pooled = min(height, 7), min(width, 7)
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(pooled), nn.Flatten())
        self.neck = nn.Linear(channels * pooled[0] * pooled[1], FEATURES)
        self.head = nn.Linear(FEATURES, outputs)

    def features(self, x: Tensor) -> Tensor:
        return self.neck(self.body(x))

    def logits(self, features: Tensor) -> Tensor:
        return self.head(features.relu())


def moved_images(x: Tensor) -> Tensor:
    """Images [B, C, H, W] in [0, 1], each slightly rotated, scaled and shifted. Colour images also change in
    brightness and contrast. The border is repeated."""
    b, channels, height, width = x.shape
    angle, scale, *shift = (2 * torch.rand(4, b) - 1) * torch.tensor(
        [MAX_ANGLE, MAX_SCALE, MAX_SHIFT, MAX_SHIFT]
    )[:, None]
    cos, sin = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
    # coordinates are −1 … 1 on both axes, whatever the sides
    rows = [cos, -sin * height / width, 2 * shift[0], sin * width / height, cos, 2 * shift[1]]
    grid = nn.functional.affine_grid(torch.stack(rows, 1).view(b, 2, 3), list(x.shape), align_corners=False)
    x = nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
    if channels == 1:
        return x
    contrast, brightness = (2 * torch.rand(2, b, 1, 1, 1) - 1) * torch.tensor([CONTRAST, BRIGHTNESS]).view(
        2, 1, 1, 1, 1
    )
    return ((x - 0.5) * (1 + contrast) + 0.5 + brightness).clamp(0, 1)


LENET = Training(
    RECIPES["lenet"], LeNet, partial(torch.optim.AdamW, lr=LR, weight_decay=WEIGHT_DECAY), moved_images
)


class LeNetFeatures(NetFeatures):
    """The first judge. Its features also define a perceptual distance."""

    @torch.no_grad()
    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean squared difference [B] between the features of images x and y [B, C, H, W] in [-1, 1]."""
        a, b = (self.net.features((images + 1) / 2) for images in (x, y))
        return (a - b).square().mean(1)


def lenet(pack: Pack, *, device: torch.device | str = "cpu", say: Say = silent) -> LeNetFeatures:
    """The first judge of a data set, from `once`."""
    return LeNetFeatures(**vars(once(pack, LENET, device=device, say=say)))


def has_lenet(pack: Pack) -> bool:
    """Whether the first judge of a data set is trained already."""
    return at_hand(pack, LENET)
