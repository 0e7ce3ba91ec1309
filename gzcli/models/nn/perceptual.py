"""LPIPS, a distance of images that agrees with the eye — Zhang et al. 2018, "The Unreasonable Effectiveness
of Deep Features", arXiv:1801.03924, version 0.1 on VGG16.

The network is torchvision's and the linear layers are those that the package `lpips` brings. The package's
own class builds all of VGG16 at random first, and computes in half precision under autocast.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from gzcli.core.errors import MissingError, UsageError
from gzcli.models.nn import to_fp32, valueless
from gzcli.store.hub import VGG
from gzcli.store.paths import cache_dir

WIDTHS = (64, 128, 256, 512, 512)  # channels of the features that LPIPS compares


class LPIPS(nn.Module):
    """The distance [B] of images x, y [B, 1 or 3, H, W] in [-1, 1], of sides of 16 pixels or more (eq. 1)."""

    shift: Tensor  # mean of ImageNet's colours, [3, 1, 1]
    scale: Tensor  # their standard deviation, [3, 1, 1]

    def __init__(self) -> None:
        from torchvision.models.vgg import cfgs, make_layers

        super().__init__()
        self.layers: nn.Sequential = make_layers(cfgs["D"])
        self.linear = nn.ParameterList(torch.ones(width) for width in WIDTHS)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])

    @classmethod
    def from_files(cls) -> LPIPS:
        """With VGG16's weights of the user's cache; without values where new tensors have none. Raises
        MissingError that names what is absent, UsageError for files with other weights."""
        if valueless():
            return cls()
        files = vgg_file(), linear_file()
        states = [torch.load(file, map_location="cpu", weights_only=True) for file in files]
        model = cls()
        model.load(*states)
        return model

    @torch.no_grad()
    def load(self, vgg: dict[str, Tensor], linear: dict[str, Tensor]) -> None:
        """Weights by the names that torchvision and the authors gave them."""
        prefix = "features."
        try:
            self.layers.load_state_dict({k.removeprefix(prefix): v for k, v in vgg.items() if prefix in k})
            for i, p in enumerate(self.linear):
                p.copy_(linear[f"lin{i}.model.1.weight"].flatten())
        except (KeyError, RuntimeError) as e:
            raise UsageError(f"the weights of LPIPS are not those of `{VGG}` and `lpips`: {e}") from e

    def features(self, x: Tensor) -> list[Tensor]:
        """The activations before each pooling [B, c, h, w], divided by their norm over the channels."""
        h, features = (x - self.shift) / self.scale, []
        for layer in self.layers:
            if isinstance(layer, nn.MaxPool2d):
                f = to_fp32(h)
                features.append(f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10))
            if len(features) < len(WIDTHS):  # the last pooling would shrink a pixel
                h = layer(h)
        return features

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(self.linear, self.features(x), self.features(y), strict=True)
        return sum((w[:, None, None] * (a - b).square()).sum(1).mean((1, 2)) for w, a, b in pairs)


def vgg_file() -> Path:
    """The file of VGG16's weights in the user's cache. Raises MissingError that says where to put it."""
    place = cache_dir("weights", VGG)
    if not place.is_file():
        hint = f"put `{VGG}` of torchvision's models into `{place.parent}`; where there is a network, "
        hint += "`gz bench --metrics lpips` and `--set model.perceptual=lpips` fetch it"
        message = f"perceptual distances (LPIPS) need the weights `{VGG}`, and `{place}` is not there"
        raise MissingError(message, hint=hint)
    return place


def linear_file() -> Path:
    """The file of the authors' linear layers, which is a part of their package. Raises MissingError."""
    package = find_spec("lpips")
    if package is None or not package.submodule_search_locations:
        raise MissingError("perceptual distances (LPIPS) need the package `lpips`", hint="pip install lpips")
    return Path(package.submodule_search_locations[0], "weights", "v0.1", "vgg.pth")
