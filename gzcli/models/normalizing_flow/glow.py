"""Glow: Generative Flow with Invertible 1×1 Convolutions (Kingma & Dhariwal 2018, arXiv:1807.03039).

x → dequantise → [squeeze → depth × (ActNorm → 1×1 convolution → coupling) → split] × scales → z, all invertible, so
log p(x) = log p(z) + log |det dz/dx| exactly (eq. 3). The last scale keeps its channels; their prior is learned and
may depend on the class.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.errors import UsageError
from gzcli.models.base import Model
from gzcli.models.nn.common import ClassEmbedding, spread_labels, zero_init
from gzcli.models.normalizing_flow import layers
from gzcli.types import Batch, DataInfo, Noise, Progress, no_progress

LABEL_DROP = 0.1  # multi-label sets: how often the null label is trained, as there is no sum over 2^K labels


class ConvNet(nn.Module):
    """The paper's coupling net: 3×3, 1×1, 3×3 convolutions; ActNorm and ReLU after two; the last starts at 0."""

    def __init__(self, channels: int, out: int, hidden: int):
        super().__init__()
        self.first = layers.ActNormConv(channels, hidden, 3)
        self.second = layers.ActNormConv(hidden, hidden, 1)
        self.last = layers.ZeroConv(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x), inplace=True)
        return self.last(F.relu(self.second(h), inplace=True))


class ResidualNet(nn.Module):
    """A coupling net that sees further: the paper's with a residual 3×3 → 1×1 block in place of its 1×1 convolution."""

    def __init__(self, channels: int, out: int, hidden: int):
        super().__init__()
        self.first = layers.ActNormConv(channels, hidden, 3)
        self.second = layers.ActNormConv(hidden, hidden, 3)
        self.third = layers.ActNormConv(hidden, hidden, 1)
        self.last = layers.ZeroConv(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x), inplace=True)
        h = h + self.third(F.relu(self.second(h), inplace=True))
        return self.last(F.relu(h, inplace=True))


class Step(nn.Module):
    """One step of flow (fig. 2a): ActNorm, invertible 1×1 convolution, coupling."""

    def __init__(self, channels: int, hidden: int, coupling: str, net: str):
        super().__init__()
        kept = channels // 2
        changed = channels - kept
        affine = coupling == "affine"
        build = {"conv": ConvNet, "residual": ResidualNet}[net]
        fn = build(kept, 2 * changed if affine else changed, hidden)
        self.norm = layers.ActNorm(channels)
        self.conv = layers.InvertibleConv1x1(channels)
        self.coupling = layers.AffineCoupling(channels, fn) if affine else layers.AdditiveCoupling(fn)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, log_det = self.conv(x, self.norm)
        y, coupling_log_det = self.coupling(h)
        return y, log_det + coupling_log_det

    def inverse(self, y: Tensor) -> Tensor:
        return self.norm.inverse(self.conv.inverse(self.coupling.inverse(y)))


class Glow(Model):
    """A multi-scale flow with exact likelihood of the dequantised image.

    scales: how often the image is squeezed; depth: steps of flow a scale; hidden: channels of the coupling nets;
    logit: alpha of logit(alpha/2 + (1 − alpha) v) before the flow, 0 = v − 1/2 as in the paper;
    class_weight: weight of −log p(y | x), in nats, beside −log p(x | y) when conditional.

    Raises UsageError where height or width cannot be halved `scales` times.
    """

    paper: ClassVar[str] = "arXiv:1807.03039"
    likelihood: ClassVar[str] = "exact"

    def __init__(
        self,
        data: DataInfo,
        *,
        scales: int = 2,
        depth: int = 8,
        hidden: int = 64,
        coupling: Literal["affine", "additive"] = "affine",
        net: Literal["conv", "residual"] = "conv",
        logit: float = 0.0,
        conditional: bool = False,
        class_weight: float = 1.0,
    ):
        super().__init__(data)
        check_size(data.shape, scales)
        self.conditional, self.class_weight = conditional, class_weight
        self.logit = layers.Logit(logit) if logit else None
        self.flow, self.splits = nn.ModuleList(), nn.ModuleList()
        self.shapes: list[tuple[int, int, int]] = []  # of the latents, first split first, top last
        C, H, W = data.shape
        for i in range(scales):
            C, H, W = 4 * C, H // 2, W // 2
            self.flow.append(nn.ModuleList(Step(C, hidden, coupling, net) for _ in range(depth)))
            if i < scales - 1:
                self.splits.append(layers.SplitPrior(C))
                self.shapes.append((C - C // 2, H, W))
                C //= 2
        self.shapes.append((C, H, W))
        self.top = nn.Parameter(torch.zeros(2, C, H, W))  # mean and log std
        self.classes = zero_init(ClassEmbedding(len(data.classes), self.top.numel())) if conditional else None

    # ------------------------------------------------------------------------ the bijection

    def encode(self, v: Tensor) -> tuple[list[Tensor], Tensor]:
        """v [B, C, H, W] in [0, 1) → latents of `self.shapes`, all N(0, 1) but the top one; and log |det dz/dv| [B]."""
        h, log_det = self.logit(v) if self.logit else (v - 0.5, v.new_zeros(len(v)))
        z = []
        for steps, split in zip(self.flow, [*self.splits, None], strict=True):
            h = layers.squeeze(h)
            for step in steps:
                h, step_log_det = step(h)
                log_det = log_det + step_log_det
            if split is not None:
                h, eps, split_log_det = split(h)
                z.append(eps)
                log_det = log_det + split_log_det
        return [*z, h], log_det

    def decode(self, z: list[Tensor], progress: Progress = no_progress) -> Tensor:
        """The inverse of `encode`."""
        *eps, h = z
        for i in reversed(range(len(self.flow))):
            if i < len(self.splits):
                h = self.splits[i].inverse(h, eps[i])
            for step in reversed(self.flow[i]):
                h = step.inverse(h)
            h = layers.unsqueeze(h)
            progress(len(self.flow) - i, len(self.flow))
        return self.logit.inverse(h) if self.logit else h + 0.5

    def to_unit(self, x: Tensor, noise: Noise) -> tuple[Tensor, float]:
        """x in [-1, 1], dequantised where it has grey levels, and the constant that this adds to log p."""
        if self.data.levels is None:
            return x, 0.0
        return layers.dequantise(x, self.data.levels, noise.rand(*x.shape).to(x.device))

    def to_image(self, v: Tensor) -> Tensor:
        """The inverse of `to_unit`."""
        return v if self.data.levels is None else layers.quantise(v, self.data.levels)

    def top_prior(self, labels: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
        """Mean and log std of the top latent, each [n, C, H, W], or [1, C, H, W] where no label matters."""
        if self.classes is None:
            return self.top[:1], self.top[1:]
        with torch.autocast(self.top.device.type, enabled=False):
            of_class = self.classes(labels, n).view(n, *self.top.shape)
        return (self.top + of_class).unbind(1)

    # ------------------------------------------------------------------------ likelihood

    def log_joint(self, x: Tensor, labels: Tensor | None, noise: Noise, *, each_class: bool) -> Tensor:
        """log p(x | labels) [B] of one dequantisation, or with `each_class` log p(x | y) [B, K] for every class y."""
        v, constant = self.to_unit(x, noise)
        (*eps, top), log_det = self.encode(v)
        log_p = constant + log_det + sum(layers.gaussian_log_prob(e) for e in eps)
        if each_class:
            K = len(self.data.classes)
            log_p, top = log_p[:, None], top[:, None]
            mean, log_std = self.top_prior(torch.arange(K, device=x.device), K)
        else:
            mean, log_std = self.top_prior(labels, len(x))
        standard = (top - mean) * (-log_std).exp()
        log_normal = -0.5 * (standard.square() + math.log(2 * math.pi)) - log_std
        return log_p + log_normal.flatten(-3).sum(-1)

    def log_prob(self, x: Tensor, labels: Tensor | None = None, *, noise: Noise, samples: int = 1) -> Tensor:
        """log p(x), or log p(x | labels), [B] nats; the density is averaged over `samples` dequantisations.

        A conditional model without labels gives the marginal over equally likely classes (multi-label: the null label).
        """
        marginal = self.classes is not None and labels is None and not self.data.multilabel
        draws = torch.stack([self.log_joint(x, labels, noise, each_class=marginal) for _ in range(samples)])
        log_p = draws.logsumexp(0) - math.log(samples) if samples > 1 else draws[0]
        return log_p.logsumexp(1) - math.log(log_p.shape[1]) if marginal else log_p

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """−log p(x | y) in nats, with −class_weight · log p(y | x) by Bayes' rule where labels are single."""
        if self.classes is None or self.data.multilabel:
            nll = -self.log_joint(batch.x, self.drop(batch), batch.noise, each_class=False).mean()
            return {"loss": nll, "bpd": self.bpd(nll)}
        log_p = self.log_joint(batch.x, None, batch.noise, each_class=True)  # [B, K]
        nll, cross_entropy = F.nll_loss(log_p, batch.y), F.cross_entropy(log_p, batch.y)
        accuracy = (log_p.argmax(1) == batch.y).float().mean()
        return {"loss": nll + self.class_weight * cross_entropy, "bpd": self.bpd(nll), "accuracy": accuracy}

    def drop(self, batch: Batch) -> Tensor | None:
        """Multi-hot labels, zero rows for the dropped ones; None for an unconditional model."""
        if self.classes is None:
            return None
        keep = batch.noise.rand(len(batch)).to(batch.x.device) >= LABEL_DROP
        return batch.y * keep[:, None]

    def bpd(self, nll: Tensor) -> Tensor:
        return nll.detach() / (math.prod(self.data.shape) * math.log(2))

    def on_start(self, batch: Batch) -> None:
        """Fits every ActNorm to the first batch, layer by layer, in one pass."""
        with layers.initialising(self) as fresh, torch.no_grad():
            if fresh:
                self.encode(self.to_unit(batch.x, batch.noise)[0])

    # ------------------------------------------------------------------------ sampling and applications

    @torch.no_grad()
    def sample(self, n: int, *, labels: Tensor | None = None, noise: Noise, progress: Progress, temperature: float = 1.0) -> Tensor:
        """n images; `temperature` multiplies the standard deviation of every latent (§6, reduced-temperature model)."""
        device = self.top.device
        if self.classes is not None:
            labels = spread_labels(labels, n, self.data, device)
        *eps, top = (noise.randn(n, *shape).to(device) * temperature for shape in self.shapes)
        mean, log_std = self.top_prior(labels, n)
        return self.to_image(self.decode([*eps, mean + top * log_std.exp()], progress))

    @torch.no_grad()
    def reconstruct(self, x: Tensor, *, noise: Noise, progress: Progress = no_progress) -> Tensor:
        """x through the latents and back: equal to x, up to rounding, where the flow is well conditioned."""
        return self.to_image(self.decode(self.encode(self.to_unit(x, noise)[0])[0], progress))

    @torch.no_grad()
    def interpolate(self, x: Tensor, *, noise: Noise, progress: Progress = no_progress, steps: int = 8) -> Tensor:
        """Between the images 0 and 1, 2 and 3, …, linear in the latents (fig. 5): [n/2 · steps, C, H, W].

        Raises UsageError for an odd number of images.
        """
        if len(x) % 2:
            raise UsageError(f"interpolation goes between pairs of images, and there are {len(x)}")
        z, _ = self.encode(self.to_unit(x, noise)[0])
        w = torch.linspace(0, 1, steps, device=x.device)[:, None, None, None]
        between = [torch.lerp(e[0::2, None], e[1::2, None], w).flatten(0, 1) for e in z]
        return self.to_image(self.decode(between, progress))


def check_size(shape: tuple[int, ...], scales: int) -> None:
    """Raises UsageError unless height and width of `shape` can be halved `scales` ≥ 1 times."""
    _, height, width = shape
    if scales < 1:
        raise UsageError(f"`model.scales` must be at least 1, not {scales}")
    unit = 2**scales
    if height % unit or width % unit:
        most = int(math.log2(math.gcd(height, width) & -math.gcd(height, width)))
        larger = f"`data.size={-(-max(height, width) // unit) * unit}`"
        raise UsageError(
            f"`model.scales={scales}` halves images {scales} times, and {height}×{width} is not divisible by {unit}",
            hint=f"set `model.scales={most}`, or {larger}" if most else f"set {larger}",
        )
