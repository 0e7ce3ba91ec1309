"""Hierarchical VAE — Vahdat & Kautz 2020, "NVAE: A Deep Hierarchical Variational Autoencoder",
arXiv:2007.03898.

A ladder of latents (`LadderVAE`, eq. 1) whose posterior is relative to the prior (`NormalGroup`, eq. 2), in
two towers of residual cells (figures 2 and 3). Unlike the paper, norms are group norms, and the posterior has
no normalizing flow.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.core.types import Batch, DataInfo
from gzcli.models.labelled import LabelOptions
from gzcli.models.nn import to_fp32
from gzcli.models.nn.layers import group_norm
from gzcli.models.vae.ladder import (
    BoundOptions,
    Cell,
    Code,
    Group,
    LadderOptions,
    LadderVAE,
    TopDown,
    draw_latents,
    shrink_init,
    soft_clamp,
)


class SqueezeExcite(nn.Module):
    """Scales each channel by a function of the means of all channels (Hu 2018, arXiv:1709.01507)."""

    def __init__(self, width: int):
        super().__init__()
        hidden = max(width // 16, 4)
        self.gate = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.Sigmoid())

    def forward(self, h: Tensor) -> Tensor:
        return h * self.gate(h.mean((2, 3)))[:, :, None, None]


def encoder_cell(width: int) -> Cell:
    """Two 3×3 convolutions (figure 3b)."""
    last, first = shrink_init(nn.Conv2d(width, width, 3, padding=1)), nn.Conv2d(width, width, 3, padding=1)
    layers = group_norm(width), nn.SiLU(), first, group_norm(width), nn.SiLU(), last
    return Cell(*layers, SqueezeExcite(width))


def decoder_cell(width: int, expand: int) -> Cell:
    """A depthwise 5×5 convolution on `expand` times the channels (figure 3a)."""
    wide = expand * width
    depthwise = nn.Conv2d(wide, wide, 5, padding=2, groups=wide)
    first, last = nn.Conv2d(width, wide, 1), shrink_init(nn.Conv2d(wide, width, 1))
    return Cell(group_norm(width), first, nn.SiLU(), depthwise, nn.SiLU(), last, SqueezeExcite(width))


class SpectralNorms(nn.Module):
    """Σ s_l, where s_l is the largest singular value of the weight of convolution l as a matrix [out, other].

    A call in training mode makes one step of the power method, from left singular vectors that are
    buffers."""

    def __init__(self, net: nn.Module):
        super().__init__()
        by_shape: dict[torch.Size, list[nn.Conv2d | nn.ConvTranspose2d]] = {}
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                by_shape.setdefault(layer.weight.shape, []).append(layer)
        self.layers = list(by_shape.values())  # plain lists, because the parameters belong to the network
        for i, (shape, layers) in enumerate(by_shape.items()):
            self.register_buffer(f"u{i}", F.normalize(torch.randn(len(layers), shape[0], 1), dim=1))

    def forward(self) -> Tensor:
        return torch.cat(self.norms()).sum()

    def norms(self) -> list[Tensor]:
        norms = []
        for i, layers in enumerate(self.layers):
            u = self.get_buffer(f"u{i}")  # [layers, out, 1]
            w = torch.stack([to_fp32(layer.weight).flatten(1) for layer in layers])
            with torch.autocast(w.device.type, enabled=False):
                with torch.no_grad():
                    v = F.normalize(w.mT @ u, dim=1)
                    left = F.normalize(w @ v, dim=1)
                    if self.training:
                        u.copy_(left)
                norms.append((left * (w @ v)).sum((1, 2)))
        return norms


@dataclass(frozen=True)
class CellOptions(LadderOptions):
    """`LadderOptions`, and the towers' cells.

    cells: residual cells before each group, in both towers. A resolution without groups has this many in all.
    expand: channels of the decoder's depthwise convolutions, as a multiple of `channels`.
    """

    cells: tuple[int, ...] = (0, 1, 1, 1)
    expand: int = 3


class BottomUp(nn.Module):
    """Images [B, C, H, W] → the features of each group, top first."""

    def __init__(self, shape: tuple[int, ...], ladder: CellOptions):
        super().__init__()
        channels, self.groups = ladder.channels, ladder.groups
        self.stem = nn.Conv2d(shape[0], channels[0], 3, padding=1)
        self.downs = nn.ModuleList(nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in pairwise(channels))
        # for each resolution, the cells before each of its groups; for one without groups, its cells alone
        self.scales = nn.ModuleList(
            nn.ModuleList(nn.Sequential(*(encoder_cell(w) for _ in range(c))) for _ in range(max(g, 1)))
            for w, g, c in zip(channels, self.groups, ladder.cells, strict=True)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        h, features = self.stem(x).contiguous(memory_format=torch.channels_last), []
        for i, scale in enumerate(self.scales):
            if i:
                h = self.downs[i - 1](F.silu(h))
            for part in scale.children():
                h = part(h)
                if self.groups[i]:
                    features.append(h)
        return features[::-1]


class NormalGroup(Group):
    """One group of latents z = mu + sigma·t, in terms of t: the prior is t ~ N(0, I).

    The residual normal posterior (eq. 2), z ~ N(mu + Δmu, (sigma·Δsigma)²), is t ~ N(Δmu / sigma, Δsigma²),
    so that KL = ½ (Δmu² / sigma² + Δsigma² − log Δsigma² − 1) is a KL to N(0, I).
    """

    def __init__(self, width: int, latent: int, cells: int, expand: int):
        super().__init__()
        self.cells = nn.Sequential(*(decoder_cell(width, expand) for _ in range(cells)))
        self.prior = nn.Conv2d(width, 2 * latent, 1)
        self.combine = nn.Conv2d(width, width, 1)
        self.residual = nn.Conv2d(width, 2 * latent, 3, padding=1)
        self.join = nn.Conv2d(latent, width, 1)

    def forward(self, h: Tensor, eps: Tensor, feature: Tensor | None) -> tuple[Tensor, Code | None]:
        """The state [B, width, h, w] after this group, and the posterior's draw, given its feature."""
        h = self.cells(h)
        mu, log_sigma = soft_clamp(self.prior(F.silu(h))).chunk(2, dim=1)
        posterior = None
        if feature is not None:
            delta, log_ratio = soft_clamp(self.residual(F.silu(feature + self.combine(h)))).chunk(2, dim=1)
            posterior = delta * torch.exp(-log_sigma), log_ratio
        z, code = draw_latents(eps, mu, log_sigma, posterior)
        return h + self.join(z), code


class UpConvolution(nn.ConvTranspose2d):
    """Twice the size, by a transposed convolution."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 4, stride=2, padding=1)

    def forward(self, h: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(F.silu(h))


class CellTopDown(TopDown):
    """`TopDown` with cells before each group."""

    def make_up(self, inputs: int, outputs: int, size: tuple[int, int]) -> nn.Module:
        return UpConvolution(inputs, outputs)

    def make_scale(self, ladder: CellOptions, i: int, size: tuple[int, int]) -> list[nn.Module]:
        width, cells, expand = ladder.channels[i], ladder.cells[i], ladder.expand
        groups: list[nn.Module] = [
            NormalGroup(width, ladder.latent, cells, expand) for _ in range(ladder.groups[i])
        ]
        return groups or [decoder_cell(width, expand) for _ in range(cells)]


class HVAE(LadderVAE):
    """A hierarchy of Gaussian latents, after NVAE.

    spectral: weight λ of the sum of the largest singular values of all convolutions.
    """

    paper = "Vahdat & Kautz 2020, arXiv:2007.03898"
    bottom_up, top_down = BottomUp, CellTopDown

    def __init__(
        self,
        data: DataInfo,
        *,
        ladder: CellOptions = CellOptions(),
        bound: BoundOptions = BoundOptions(),
        spectral: float = 0.01,
        labels: LabelOptions = LabelOptions(),
    ):
        super().__init__(data, ladder, bound, labels)
        self.spectral = spectral
        self.norms = SpectralNorms(self) if spectral else None

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        parts = super().loss(batch, phase)
        if self.training and self.norms is not None:
            spectral = self.norms()
            parts |= {"loss": parts["loss"] + self.spectral * spectral, "spectral": spectral.detach()}
        return parts
