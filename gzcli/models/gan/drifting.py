"""Drifting — Deng, Li, Li, Du & He 2026, "Generative Modeling via Drifting", arXiv:2602.04770.

During training, a generator's images x drift along a field V towards real images y and away from each other,
in features φ of several scales. The one-step generator learns where they drift:

    loss = Σ_φ ‖φ(x) − sg(φ(x) + V(x))‖²,   V(x) = Σ_y Σ_x' A(x, y) A(x, x') (φ(y) − φ(x'))

A is the geometric mean of two softmaxes of −‖φ(a) − φ(b)‖ / τ, one over b and one over a. V is antisymmetric
in the two distributions, and so 0 if they are equal. The paper's φ is a masked autoencoder that is trained
beforehand; here it is trained along with the generator.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.core import ranks
from gzcli.core.types import Batch, DataInfo, Noise
from gzcli.models.base import Phase
from gzcli.models.gan.base import ConvGenerator, GeneratorOptions
from gzcli.models.gan.implicit import ImplicitModel
from gzcli.models.gan.r3gan import ResidualGenerator, ResidualOptions
from gzcli.models.nn import pyramid, to_fp32
from gzcli.models.nn.adversarial import widths

GRID_SQUARES = 7  # squares along a side; the autoencoder sees some of them
MASKED_LOGIT = -1e9  # of pairs that do not act on each other, where the softmax is 0


@dataclass(frozen=True)
class DriftOptions:
    """The field, and the autoencoder of its features.

    temperatures: values of τ in units of the mean distance. Their fields, each of unit mean square, are
      summed.
    feature_width: channels of the autoencoder's finest scale, doubled at each coarser one, at most 8-fold.
    feature_latent: dimensions of the autoencoder's code.
    hidden: fraction of an image's patches that the autoencoder must complete.
    """

    temperatures: tuple[float, ...] = (0.02, 0.05, 0.2)
    feature_width: int = 16
    feature_latent: int = 64
    hidden: float = 0.4


class MaskedAutoencoder(nn.Module):
    """Strided convolutions to a code, and back."""

    def __init__(self, shape: tuple[int, ...], options: DriftOptions):
        super().__init__()
        *sizes, last = pyramid(shape)
        channels = (shape[0], *widths(options.feature_width, len(sizes)))
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in pairwise(channels))
        self.code = nn.Linear(channels[-1] * last[0] * last[1], options.feature_latent)
        decoder = GeneratorOptions(options.feature_latent, options.feature_width, norm="none")
        self.decoder = ConvGenerator(shape, decoder)
        self.hidden = options.hidden

    def features(self, x: Tensor) -> list[Tensor]:
        """The images [B, C, H, W], the map of each scale, finest first, and the code, each as [B, D]."""
        features = [x]
        for conv in self.convs:
            features.append(F.silu(conv(features[-1])))
        return [f.flatten(1) for f in (*features, self.code(features[-1].flatten(1)))]

    def maps(self, x: Tensor) -> Tensor:
        """The map of the coarsest scale, [B, C', h, w]."""
        for conv in self.convs:
            x = F.silu(conv(x))
        return x

    def forward(self, x: Tensor, noise: Noise) -> Tensor:
        """The mean squared error of images that are completed from some of their patches."""
        seen = (noise.rand(len(x), 1, GRID_SQUARES, GRID_SQUARES) >= self.hidden).to(x)
        code = self.code(self.maps(x * F.interpolate(seen, x.shape[2:])).flatten(1))
        return (self.decoder(code) - x).square().mean()


def field(x: Tensor, y: Tensor, apart: Tensor, temperatures: tuple[float, ...]) -> Tensor:
    """V [N, D] at the features x [N, D] of generated images, given the features y [M, D] of real ones
    (algorithm 2). `apart` [N, M + N] marks the y and x that do not act on an x."""
    distance = torch.cdist(x, torch.cat([y, x])) / x.shape[1] ** 0.5
    total = torch.zeros_like(x)
    for tau in temperatures:
        near = (-distance / tau).masked_fill(apart, MASKED_LOGIT)
        attraction, repulsion = (near.softmax(1) * near.softmax(0)).sqrt().split([len(y), len(x)], 1)
        towards = attraction * repulsion.sum(1, keepdim=True)
        away = repulsion * attraction.sum(1, keepdim=True)
        v = towards @ y - away @ x
        total += v / v.square().mean().sqrt().clamp(min=1e-12)
    return total


class Drifting(ImplicitModel):
    """A residual generator trained by a field of feature distances.

    conditional: whether the generator is conditioned on labels. If so, only images of the same label
      interact.
    """

    paper = "Deng 2026, arXiv:2602.04770"
    normalised = ("generator",)

    def __init__(
        self,
        data: DataInfo,
        *,
        net: ResidualOptions = ResidualOptions(),
        drift: DriftOptions = DriftOptions(),
        conditional: bool = False,
    ):
        super().__init__(data, net.latent, conditional)
        self.generator = ResidualGenerator(data.shape, net, len(data.classes) if conditional else 0)
        self.autoencoder, self.drift = MaskedAutoencoder(data.shape, drift), drift

    @property
    def comparer(self) -> MaskedAutoencoder:
        return self.autoencoder

    def phases(self) -> list[Phase]:
        return [
            Phase("features", list(self.autoencoder.parameters())),
            Phase("generator", list(self.generator.parameters())),
        ]

    def loss(self, batch: Batch, phase: str = "features") -> dict[str, Tensor]:
        if phase == "features":
            return {"loss": self.autoencoder(batch.x, batch.noise)}
        y = batch.y if self.conditional else None
        x = self.generator(batch.noise.randn(len(batch), self.latent), y)
        apart = self.apart(len(batch), y)
        with torch.no_grad():
            real = self.autoencoder.features(batch.x)
        pairs = zip(self.autoencoder.features(x), real, strict=True)
        losses = [self.drift_loss(to_fp32(f), to_fp32(r), apart) for f, r in pairs]
        return {"loss": torch.stack(losses).sum()}

    def drift_loss(self, f: Tensor, real: Tensor, apart: Tensor) -> Tensor:
        """‖φ(x) − sg(φ(x) + V)‖² / D, the mean over images, for features [B, D] of generated and real ones.
        The images of all ranks act on each other, except for those that are `apart`."""
        x, y = ranks.rows(f.detach(), self), ranks.rows(real, self)
        # features are scaled so that their mean distance is √D (appendix A.6)
        scale = x.shape[1] ** 0.5 / torch.cdist(x, torch.cat([y, x])).mean().clamp(min=1e-12)
        v = field(scale * x, scale * y, apart, self.drift.temperatures)
        f = scale * f
        return F.mse_loss(f, f.detach() + ranks.own_rows(v, self))

    def apart(self, n: int, y: Tensor | None) -> Tensor:
        """A mask [N, 2 N] of the real and generated images of all ranks that do not act on a generated one:
        itself, and those with another label. This rank has n of the N, with labels y."""
        itself = torch.eye(n * ranks.sharing(self), device=self.autoencoder.code.weight.device).bool()
        unlike = torch.zeros_like(itself)
        if y is not None:
            labels = ranks.rows(y, self)
            unlike = (labels[:, None] != labels).view(*itself.shape, -1).any(2)
        return torch.cat([unlike, unlike | itself], 1)
