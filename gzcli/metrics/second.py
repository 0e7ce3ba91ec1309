"""The second judge, the feature space of the metric `fd_second`: a different network from the first, trained
differently. No recipe may be chosen by it, so that it can contradict the first."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from gzcli.core.types import Say, silent
from gzcli.core.units import Size, sides
from gzcli.data.packs.pack import Pack
from gzcli.metrics.classifier import FEATURES, Classifier, NetFeatures, Training, once
from gzcli.metrics.networks import RECIPES

FIRST_CHANNELS = 24  # channels of the first block; the second has FEATURES
STEM_SIDE = 16  # from this side, the stem halves images
SECOND_BATCH = 64  # half that of the LeNet, because a step takes twice as long
LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4
MAX_SHIFT, ERASED_SHARE = 0.08, 0.35  # shares of the sides: the largest shift, and the square that is erased
ERASED = 0.5  # share of the images with an erased square


def convolution(channels: int, filters: int, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(channels, filters, 3, stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(filters))


class Residual(nn.Module):
    """x + f(x), with f of two convolutions (He et al. 2016, arXiv:1512.03385). If x is larger or has fewer
    channels, its shortcut is pooled and convolved."""

    def __init__(self, channels: int, filters: int, stride: int):
        super().__init__()
        first = convolution(channels, filters, stride)
        self.branch = nn.Sequential(first, nn.SiLU(), convolution(filters, filters))
        pool = nn.AvgPool2d(stride, ceil_mode=True)
        narrow = nn.Sequential(pool, nn.Conv2d(channels, filters, 1, bias=False))
        self.shortcut = nn.Identity() if channels == filters else narrow

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.branch(x)


class ResNet(Classifier):
    """A stem that halves the image down to a side of at most 16, two residual blocks, and the mean of each
    map as a feature."""

    def __init__(self, channels: int, size: Size, outputs: int):
        super().__init__(size)
        side, stem = min(sides(size)), []
        strides = [2 if side >= STEM_SIDE else 1]
        while (side := side // strides[-1]) > STEM_SIDE:
            strides.append(2)
        for stride in strides:
            stem += [convolution(channels, FIRST_CHANNELS, stride), nn.SiLU()]
            channels = FIRST_CHANNELS
        blocks = [
            Residual(FIRST_CHANNELS, FIRST_CHANNELS, 1),
            nn.SiLU(),
            Residual(FIRST_CHANNELS, FEATURES, 2),
            nn.SiLU(),
        ]
        self.body = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(FEATURES, outputs)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def logits(self, features: Tensor) -> Tensor:
        return self.head(features)


def erased(x: Tensor) -> Tensor:
    """Images [B, C, H, W], each shifted by whole pixels, and half of them with a square of random uniform
    brightness (Zhong et al. 2020, arXiv:1708.04896). The border is repeated."""
    b, axes, holes = len(x), [], []
    for side in x.shape[2:]:
        most = max(1, round(MAX_SHIFT * side))
        axes.append((torch.arange(side) + torch.randint(-most, most + 1, (b, 1))).clamp(0, side - 1))
        holes.append((torch.arange(side) - side * torch.rand(b, 1)).abs() < ERASED_SHARE * side / 2)
    (rows, columns), image = axes, torch.arange(b)[:, None, None]
    x = x.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
    hole = holes[0][:, :, None] & holes[1][:, None] & (torch.rand(b, 1, 1) < ERASED)
    return torch.where(hole[:, None], torch.rand(b, 1, 1, 1), x)


SGD = partial(torch.optim.SGD, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)
SECOND_TRAINING = Training(RECIPES["second"], ResNet, SGD, erased, smoothing=0.1, batch=SECOND_BATCH, seed=1)


def second(pack: Pack, *, device: torch.device | str = "cpu", say: Say = silent) -> NetFeatures:
    """The second judge of a data set, from `once`."""
    return once(pack, SECOND_TRAINING, device=device, say=say)
