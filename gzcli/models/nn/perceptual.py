"""Perceptual distances of images: LPIPS and MS-SSIM.

LPIPS — Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features", arXiv:1801.03924, version 0.1 on
VGG16. The network is torchvision's; the linear layers come from the package `lpips`. The package's own class
is not used: it first builds all of VGG16 at random, and computes in half precision under autocast.

SSIM at one scale and at several: Wang et al. 2003, "Multi-scale structural similarity for image quality
assessment".
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.core.errors import MissingError, UsageError, install_line
from gzcli.core.types import moved_to
from gzcli.models.nn import is_shape_only, to_fp32
from gzcli.store.files import reading
from gzcli.store.hub import VGG
from gzcli.store.paths import cache_dir

FEATURE_WIDTHS = (64, 128, 256, 512, 512)  # channels of the features that LPIPS compares


class LPIPS(nn.Module):
    """The distance [B] of images x and y [B, 1 or 3, H, W] in [-1, 1] (eq. 1). Their sides must be at least
    16 pixels."""

    shift: Tensor  # mean of ImageNet's colours, [3, 1, 1]
    scale: Tensor  # their standard deviation, [3, 1, 1]

    def __init__(self) -> None:
        from torchvision.models.vgg import cfgs, make_layers

        super().__init__()
        self.layers: nn.Sequential = make_layers(cfgs["D"])
        self.linear = nn.ParameterList(torch.ones(width) for width in FEATURE_WIDTHS)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])

    @classmethod
    def from_files(cls) -> LPIPS:
        """The network with VGG16's weights from the user's cache, or without values under `is_shape_only`.
        Raises MissingError for absent files, UsageError for files with other weights."""
        if is_shape_only():
            return cls()
        states = []
        for file in (vgg_file(), linear_file()):
            with reading(file, f"remove `{file}`, then get a new copy"):
                states.append(torch.load(file, map_location="cpu", weights_only=True))
        model = cls()
        model.load(*states)
        return model

    @torch.no_grad()
    def load(self, vgg: dict[str, Tensor], linear: dict[str, Tensor]) -> None:
        """Loads weights under the names of torchvision and of the authors."""
        prefix = "features."
        try:
            self.layers.load_state_dict({k.removeprefix(prefix): v for k, v in vgg.items() if prefix in k})
            for i, p in enumerate(self.linear):
                p.copy_(linear[f"lin{i}.model.1.weight"].flatten())
        except (AttributeError, KeyError, RuntimeError, TypeError) as e:
            raise UsageError(f"the weights of LPIPS are not those of `{VGG}` and `lpips`: {e}") from e

    def features(self, x: Tensor) -> list[Tensor]:
        """The activations before each pooling [B, c, h, w], divided by their norm over the channels."""
        h, features = (x - self.shift) / self.scale, []
        for layer in self.layers:
            if isinstance(layer, nn.MaxPool2d):
                f = to_fp32(h)
                features.append(f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10))
            if len(features) < len(FEATURE_WIDTHS):  # the last pooling would shrink a single pixel
                h = layer(h)
        return features

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(self.linear, self.features(x), self.features(y), strict=True)
        return sum((w[:, None, None] * (a - b).square()).sum(1).mean((1, 2)) for w, a, b in pairs)


def vgg_file() -> Path:
    """The file of VGG16's weights in the user's cache. Raises MissingError that states where to put it."""
    place = cache_dir("weights", VGG)
    if not place.is_file():
        hint = f"copy torchvision's `{VGG}` into `{place.parent}`, or download it with "
        hint += "`gz bench --metrics lpips` or `--set model.perceptual=lpips`"
        message = f"perceptual distances (LPIPS) need the weights `{VGG}`, but `{place}` does not exist"
        raise MissingError(message, hint=hint)
    return place


def linear_file() -> Path:
    """The file of the authors' linear layers, which is part of their package. Raises MissingError."""
    package = find_spec("lpips")
    if package is None or not package.submodule_search_locations:
        message = "perceptual distances (LPIPS) need the package `lpips`"
        raise MissingError(message, hint=install_line("lpips"))
    return Path(package.submodule_search_locations[0], "weights", "v0.1", "vgg.pth")


# ---- structural similarity

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # exponents of the scales, finest first
C1, C2 = 0.01**2, 0.03**2  # the constants that keep the quotients finite, for images in [0, 1]


def gaussian_window(size: int, sigma: float) -> Tensor:
    """The weights of a Gaussian filter, [size], which sum to 1."""
    t = torch.arange(size) - (size - 1) / 2
    w = torch.exp(-(t**2) / (2 * sigma**2))
    return w / w.sum()


def blur(x: Tensor, window: Tensor) -> Tensor:
    """Each channel of x [B, C, H, W] filtered along both sides, without padding."""
    c, k = x.shape[1], window.numel()
    w = window.to(x).expand(c, 1, k)
    return F.conv2d(F.conv2d(x, w.unsqueeze(2), groups=c), w.unsqueeze(3), groups=c)


def ssim_parts(x: Tensor, y: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """Means over pixels [B, C] of SSIM and of its contrast·structure, for images in [0, 1]."""
    mu_x, mu_y = blur(x, window), blur(y, window)
    var_x, var_y = blur(x * x, window) - mu_x**2, blur(y * y, window) - mu_y**2
    cov = blur(x * y, window) - mu_x * mu_y
    cs = (2 * cov + C2) / (var_x + var_y + C2)
    luminance = (2 * mu_x * mu_y + C1) / (mu_x**2 + mu_y**2 + C1)
    return (luminance * cs).mean((2, 3)), cs.mean((2, 3))


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """MS-SSIM [B] of images x and y [B, C, H, W] in [-1, 1], computed in fp32; at most 1.

    The window is a Gaussian of 11 pixels and deviation 1.5. Images below 64 pixels have one of at most 7
    pixels. Only scales that are at least as large as the window count, with exponents renormalised to their
    sum. A negative contrast term, which has no fractional power, is clamped to 1e-4.
    """
    with torch.autocast(x.device.type, enabled=False):
        x, y = (to_fp32(x) + 1) / 2, (to_fp32(y) + 1) / 2
        side = min(x.shape[2:])
        size = min(11 if side >= 64 else 7, side)
        window = moved_to(gaussian_window(size, 1.5 * size / 11), x.device)
        scales = 1
        while scales < len(SCALE_WEIGHTS) and side // 2**scales >= size:
            scales += 1
        weights = moved_to(torch.tensor(SCALE_WEIGHTS[:scales]), x.device)
        weights = weights / weights.sum()
        value = x.new_ones(x.shape[0], x.shape[1])
        for i in range(scales):
            ssim, cs = ssim_parts(x, y, window)
            value = value * (ssim if i == scales - 1 else cs).clamp_min(1e-4) ** weights[i]
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        return value.mean(1)
