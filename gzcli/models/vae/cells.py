"""NVAE's residual cells and spectral regularisation (Vahdat & Kautz 2020, arXiv:2007.03898, sections 3.1.1
and 3.2).

Group norm takes the place of the paper's batch norm, so that the result for an image does not depend on its
batch. The last convolution of a cell starts small, so that a deep network starts near the identity.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.models.nn.common import group_norm, to_fp32


class SqueezeExcite(nn.Module):
    """Scales each channel by a function of the means of all channels (Hu 2018, arXiv:1709.01507)."""

    def __init__(self, width: int):
        super().__init__()
        hidden = max(width // 16, 4)
        self.gate = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.Sigmoid())

    def forward(self, h: Tensor) -> Tensor:
        return h * self.gate(h.mean((2, 3)))[:, :, None, None]


class EncoderCell(nn.Module):
    """Two 3×3 convolutions (figure 3b)."""

    def __init__(self, width: int):
        super().__init__()
        last = small(nn.Conv2d(width, width, 3, padding=1))
        first = nn.Conv2d(width, width, 3, padding=1)
        self.net = nn.Sequential(
            group_norm(width), nn.SiLU(), first, group_norm(width), nn.SiLU(), last, SqueezeExcite(width)
        )

    def forward(self, h: Tensor) -> Tensor:
        return h + self.net(h)


class DecoderCell(nn.Module):
    """A depthwise 5×5 convolution on `expand` times the channels, for a large receptive field with few
    parameters (figure 3a)."""

    def __init__(self, width: int, expand: int):
        super().__init__()
        wide = expand * width
        depthwise = nn.Conv2d(wide, wide, 5, padding=2, groups=wide)
        first, last = nn.Conv2d(width, wide, 1), small(nn.Conv2d(wide, width, 1))
        self.net = nn.Sequential(
            group_norm(width), first, nn.SiLU(), depthwise, nn.SiLU(), last, SqueezeExcite(width)
        )

    def forward(self, h: Tensor) -> Tensor:
        return h + self.net(h)


def small(conv: nn.Conv2d) -> nn.Conv2d:
    """The convolution with a tenth of its initial weights."""
    with torch.no_grad():
        conv.weight.mul_(0.1)
    return conv


class SpectralNorms(nn.Module):
    """Σ s_l, where s_l is the largest singular value of the weight of convolution l as a matrix [out, other].

    A call in training mode makes one step of the power method. Weights of equal shape are multiplied in one
    batch. The left singular vectors u are buffers, so that a resumed run continues with them.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        by_shape: dict[torch.Size, list[nn.Conv2d | nn.ConvTranspose2d]] = {}
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                by_shape.setdefault(layer.weight.shape, []).append(layer)
        self.layers = list(by_shape.values())  # plain lists, as the parameters belong to the network
        for i, layers in enumerate(self.layers):
            self.register_buffer(
                f"u{i}", F.normalize(torch.randn(len(layers), layers[0].weight.shape[0], 1), dim=1)
            )

    def forward(self) -> Tensor:
        return torch.cat(self.norms()).sum()

    def norms(self) -> list[Tensor]:
        """The estimates of s_l, [layers] for each shape of weight."""
        found = []
        for i, layers in enumerate(self.layers):
            u = self.get_buffer(f"u{i}")  # [layers, out, 1]
            w = torch.stack([to_fp32(layer.weight).flatten(1) for layer in layers])
            with torch.autocast(w.device.type, enabled=False):
                with torch.no_grad():
                    v = F.normalize(w.mT @ u, dim=1)
                    left = F.normalize(w @ v, dim=1)
                    if self.training:
                        u.copy_(left)
                found.append((left * (w @ v)).sum((1, 2)))
        return found
