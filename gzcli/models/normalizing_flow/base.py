"""The core of image flows: x → dequantise → v → bijection → z, so that log p(x) = log p(z) + log |det
dz/dv| minus the log density of the noise.

There are two kinds of flows. A `MultiscaleFlow` defines the steps of each scale in its `__init__`. Any other
bijection overrides `encode`, which begins with `preprocess`, and `decode`, which ends with `postprocess`. It
also calls `build_top(shapes)` with the shapes (C, H, W) of its latents, the top one last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.core.errors import UsageError
from gzcli.core.hints import advice, setting
from gzcli.core.types import Applied, Batch, DataInfo, Noise, Progress, no_progress
from gzcli.core.units import as_size
from gzcli.models.labelled import ClusterOptions, Labelled
from gzcli.models.nn import (
    ClassEmbedding,
    Labels,
    Modules,
    as_interpolations,
    bits_per_dim,
    complete_pairs,
    full_fp32,
    mix_codes,
    spread_labels,
    to_fp32,
    zero_init,
)
from gzcli.models.normalizing_flow import layers
from gzcli.models.normalizing_flow.layers import ActNormConv, Bijection, ConvNet, initialising


class VariationalDequantiser(nn.Module):
    """u ~ q(u | x) on [0, 1)^D: logistic noise through couplings conditioned on x, then a sigmoid, so that
    log P(x) ≥ E_q[log p((k + u) / L) − log q(u | x)] − D log L (Flow++, arXiv:1902.00275, eq. 12).
    """

    def __init__(self, data: DataInfo, *, depth: int = 4, hidden: int = 32):
        super().__init__()
        self.levels = grey_levels(data)
        channels = 4 * data.shape[0]  # squeezed
        unchanged = channels // 2
        self.context = ActNormConv(channels, hidden, 3)
        self.steps = nn.ModuleList(
            layers.AffineCoupling(channels, ConvNet(unchanged + hidden, channels, hidden), flip=i % 2 == 1)
            for i in range(depth)
        )

    def forward(self, x: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """x [B, C, H, W] in [-1, 1] → v = (k + u) / L, and log q(u | x) [B]."""
        tiny = torch.finfo(x.dtype).eps
        base = noise.rand(*x.shape).to(x.dtype).clamp(tiny, 1 - tiny)
        y = layers.squeeze(base.logit())
        log_q = layers.log_logistic(y)
        context = F.relu(self.context(layers.squeeze(x)))
        for step in self.steps:
            y, log_det = step(y, context)
            log_q = log_q - log_det
        # du/dy of the sigmoid is the logistic density
        v, _ = layers.dequantise(x, self.levels, layers.unsqueeze(y).sigmoid())
        return v, log_q - layers.log_logistic(y)


def grey_levels(data: DataInfo) -> int:
    if data.levels is None:
        message = "`model.dequant` needs grey levels, which latents do not have"
        raise UsageError(message, hint="set `model.dequant=uniform`")
    return data.levels


@dataclass(frozen=True)
class DequantOptions:
    """Dequantisation and logit.

    dequant: dequantization noise: `uniform`, or learned by a flow (`variational`).
    logit: alpha of the map logit(alpha/2 + (1 − alpha) v) before the flow, in [0, 1). 0: v − 1/2.
    """

    dequant: Literal["uniform", "variational"] = "uniform"
    logit: float = 0.0


@dataclass(frozen=True)
class ImageFlowOptions(DequantOptions):
    """`DequantOptions`, and labels.

    conditional: whether the prior of the top latent depends on the class.
    """

    conditional: bool = False


LABEL_DROP = 0.1  # share of null labels in training on multi-label sets; a sum over 2^K labels costs too much


class ImageFlow(Labelled):
    """A flow with the exact likelihood of the dequantised image, and so, by one draw of the noise, a bound
    for the discrete image. The prior of its top latent may depend on the class, unless the bijection does.

    `dequantiser` builds the module of variational dequantisation, such as `VariationalDequantiser`. `labels`
    are the label options of a bijection that takes a condition.
    """

    likelihood: ClassVar[str] = "bound"
    with_labels = ("edit",)
    sums = ("main",)
    shapes: list[tuple[int, int, int]]  # shapes of the latents, the top one last

    def __init__(
        self,
        data: DataInfo,
        options: DequantOptions,
        dequantiser: Callable[[DataInfo], nn.Module] = VariationalDequantiser,
        labels: ClusterOptions | None = None,
    ):
        conditional = isinstance(options, ImageFlowOptions) and options.conditional
        super().__init__(data, labels or ClusterOptions(conditional, label_dropout=0.0))
        self.prior_of_class = conditional  # otherwise the bijection gets the class, if anything does
        if not 0 <= options.logit < 1:
            raise UsageError(f"`model.logit` must be in [0, 1), not {options.logit}")
        self.logit = layers.Logit(options.logit) if options.logit else None
        self.dequantiser = dequantiser(data) if options.dequant == "variational" else None

    def build_top(self, shapes: list[tuple[int, int, int]]) -> None:
        """Builds the prior of the top latent, the last of `shapes`. The prior of the other latents is N(0,
        1)."""
        self.shapes = shapes
        self.top = nn.Parameter(torch.zeros(2, *shapes[-1]))  # mean and log std
        classes, size = len(self.data.classes), self.top.numel()
        self.classes = zero_init(ClassEmbedding(classes, size)) if self.prior_of_class else None

    # ---- the bijection

    def preprocess(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """v in [0, 1) as the input of the flow, and the log-det [B]."""
        return self.logit(v) if self.logit else (v - 0.5, v.new_zeros(len(v)))

    def postprocess(self, h: Tensor) -> Tensor:
        return self.logit.inverse(h) if self.logit else h + 0.5

    def encode(self, v: Tensor) -> tuple[list[Tensor], Tensor]:
        """v [B, C, H, W] in [0, 1) → latents of `self.shapes`, and log |det dz/dv| [B]."""
        raise NotImplementedError

    def decode(self, z: list[Tensor], progress: Progress = no_progress) -> Tensor:
        raise NotImplementedError

    def to_unit(self, x: Tensor, noise: Noise) -> tuple[Tensor, Tensor | float]:
        """x in [0, 1), dequantised if it has grey levels, and the term −D log L − log q(u | x) of
        log p(x)."""
        if self.data.levels is None:
            return x, 0.0
        if self.dequantiser is None:
            return layers.dequantise(x, self.data.levels, noise.rand(*x.shape))
        v, log_q = self.dequantiser(x, noise)
        return v, -x[0].numel() * math.log(self.data.levels) - log_q

    def codes(self, x: Tensor, noise: Noise) -> list[Tensor]:
        return self.encode(self.to_unit(x, noise)[0])[0]

    def from_unit(self, v: Tensor) -> Tensor:
        return v if self.data.levels is None else layers.quantise(v, self.data.levels)

    def images(self, z: list[Tensor], progress: Progress) -> Tensor:
        return self.from_unit(self.decode(z, progress))

    def top_prior(self, labels: Labels, n: int) -> tuple[Tensor, Tensor]:
        """The mean and log std of the top latent, [n, C, H, W] each, or [1, C, H, W] without labels."""
        if self.classes is None:
            return self.top[:1], self.top[1:]
        with torch.autocast(self.top.device.type, enabled=False):
            of_class = self.classes(labels, n).view(n, *self.top.shape)
        return (self.top + of_class).unbind(1)

    def class_log_probs(self, top: Tensor) -> Tensor:
        """log p(top | y) of every class y, [B, K], by matrix products, without a tensor [B, K, C, H, W].

        Let t = (top − m) / s, where m and s are the mean and std that the classes share, and let class y have
        mean m + s d and log std log s + e. Then Σ (t − d)² exp(−2e) = t² · exp(−2e) − 2 t · d exp(−2e) + d² ·
        exp(−2e).
        """
        if self.classes is None:
            return top.new_zeros(len(top), 0)
        with full_fp32(top.device):
            log_std, classes = self.top[1], torch.arange(len(self.data.classes), device=top.device)
            shift, extra = self.classes(classes, len(classes)).view(-1, *self.top.shape).unbind(1)
            t = ((to_fp32(top) - self.top[0]) * (-log_std).exp()).flatten(1)  # [B, D]
            d, extra = (shift * (-log_std).exp()).flatten(1), extra.flatten(1)  # [K, D]
            precision = (-2 * extra).exp()
            constant = (d.square() * precision).sum(1)
            quadratic = t.square() @ precision.mT - 2 * t @ (d * precision).mT + constant
            return -0.5 * (quadratic + t.shape[1] * math.log(2 * math.pi)) - (log_std.sum() + extra.sum(1))

    # ---- likelihood

    def log_joint(self, x: Tensor, labels: Labels, noise: Noise, *, each_class: bool) -> Tensor:
        """log p(x | labels) [B] by one draw of the noise, or log p(x | y) [B, K] of every class y."""
        v, constant = self.to_unit(x, noise)
        (*eps, top), log_det = self.encode(v)
        log_p = constant + log_det + sum(layers.gaussian_log_prob(e) for e in eps)
        if each_class:
            return log_p[:, None] + self.class_log_probs(top)
        return log_p + top_log_prob(top, *self.top_prior(labels, len(x)))

    def log_prob(self, x: Tensor, labels: Labels = None, *, noise: Noise, samples: int = 1) -> Tensor:
        """A lower bound of log p(x), or of log p(x | labels), [B] nats.

        A conditional model without labels has that of the mixture of its classes (multi-label: of the null
        label).

        samples: draws of the noise over which the density is averaged.
        """

        def averaged(labels: Labels, noise: Noise, *, each_class: bool = False) -> Tensor:
            draws = [self.log_joint(x, labels, noise, each_class=each_class) for _ in range(samples)]
            return torch.stack(draws).logsumexp(0) - math.log(samples) if samples > 1 else draws[0]

        of_each = partial(averaged, None, noise, each_class=True) if self.prior_of_class else None
        return self.over_classes(averaged, len(x), labels, noise, of_each=of_each)

    def map_nll(self, x: Tensor, *, noise: Noise, draws: int = 8) -> Tensor:
        """The excess in nats of the local part of −log p(x) over its expectation, [B, H, W], for the most
        probable class. It is ½ z² − ½ of the latents over each pixel, averaged over 3 × 3 pixels.

        draws: draws of the noise to average over, because the latents of a uniform background are only noise.
        """
        single = self.classes is not None and not self.data.multilabel
        surprise = x.new_zeros(len(x), 1, *x.shape[2:])
        for _ in range(draws):
            *eps, top = self.codes(x, noise)
            mean, log_std = self.top_prior(self.class_log_probs(top).argmax(1) if single else None, len(x))
            for z in (*eps, (top - mean) * (-log_std).exp()):
                nats = 0.5 * (to_fp32(z).square() - 1).sum(1, keepdim=True)
                area = (x.shape[2] / z.shape[2]) * (x.shape[3] / z.shape[3])  # pixels of a position
                surprise = surprise + F.interpolate(nats / (area * draws), x.shape[2:])
        return F.avg_pool2d(surprise, 3, 1, 1, count_include_pad=False)[:, 0]

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """−log p(x | y) in nats; unless the data are multi-label, plus −log p(y | x) by Bayes' rule."""
        y = batch.y
        if self.classes is None or self.data.multilabel or y is None:
            if self.classes is None or y is None:
                y = None
            else:  # multi-hot labels, with zero rows for the hidden ones
                y = y * (batch.noise.rand(len(batch)) >= LABEL_DROP)[:, None]
            nll = -self.log_joint(batch.x, y, batch.noise, each_class=False).mean()
            return {"loss": nll, "bpd": bits_per_dim(nll, self.data)}
        log_p = self.log_joint(batch.x, None, batch.noise, each_class=True)  # [B, K]
        nll, cross_entropy = F.nll_loss(log_p, y), F.cross_entropy(log_p, y)
        accuracy = log_p.argmax(1).eq(y).float().mean()
        return {"loss": nll + cross_entropy, "bpd": bits_per_dim(nll, self.data), "accuracy": accuracy}

    def on_start(self, batch: Batch) -> None:
        """Initialises the layers with the first batch, one after another in a single pass."""
        with initialising(self) as fresh, torch.no_grad():
            if fresh:
                self.codes(batch.x, batch.noise)

    # ---- sampling and applications

    @torch.no_grad()
    def sample(
        self, n: int, *, labels: Labels = None, noise: Noise, progress: Progress, temperature: float = 1.0
    ) -> Tensor:
        """n images.

        temperature: factor of the standard deviation of every latent (Glow, §6).
        """
        labels = self.requested_labels(labels, n)
        *eps, top = (noise.randn(n, *shape) * temperature for shape in self.shapes)
        mean, log_std = self.top_prior(labels, n)
        return self.images([*eps, mean + top * log_std.exp()], progress)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, *, noise: Noise, progress: Progress = no_progress) -> Applied:
        """Encodes and decodes x. The result is exact up to rounding if the flow is well conditioned."""
        return Applied(self.images(self.codes(x, noise), progress), rows=("reconstruction",))

    @torch.no_grad()
    def interpolate(
        self, x: Tensor, *, noise: Noise, progress: Progress = no_progress, frames: int = 8
    ) -> Applied:
        """Interpolates between image 0 and 1, 2 and 3, … along straight lines of latents (Glow, figure 5).

        frames: images of an interpolation, both ends included.
        """
        x = complete_pairs(x)
        z = self.codes(x, noise.first(len(x)))
        latents = [mix_codes(e.flatten(1), frames).unflatten(1, e.shape[1:]) for e in z]
        return as_interpolations(self.images(latents, progress), frames)

    def check_edit(self) -> None:
        if not self.conditional:
            hint = advice("train it with {}", setting("model.conditional", True))
            raise UsageError("only a class-conditional flow can edit", hint=hint)

    @torch.no_grad()
    def edit(
        self,
        x: Tensor,
        *,
        labels: Labels = None,
        y: Labels = None,
        noise: Noise,
        progress: Progress = no_progress,
        strength: float = 1.0,
    ) -> Applied:
        """Moves the top latent of x from the prior of its class to the prior of `labels` (after Glow, figure
        6). The other latents stay the same. If the class of x is unknown, the most probable class is used
        (multi-label: none). Without labels, the images get all classes in turn. Raises UsageError for an
        unconditional model.

        strength: how far the latent is moved. 1: to the prior of the labels; below 0: away from it.
        """
        self.check_edit()
        labels = spread_labels(labels, len(x), self.data, x.device)
        *eps, top = self.codes(x, noise)
        if y is None:
            y = torch.zeros_like(labels) if self.data.multilabel else self.class_log_probs(top).argmax(1)
        (mean, log_std), (to_mean, to_log_std) = self.top_prior(y, len(x)), self.top_prior(labels, len(x))
        standard = (top - mean) * (-log_std).exp()
        top = torch.lerp(mean, to_mean, strength) + standard * torch.lerp(log_std, to_log_std, strength).exp()
        return Applied(self.images([*eps, top], progress), rows=("edited",), labels=labels)


def top_log_prob(top: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log N(top; mean, std) summed over the last three dimensions, [C, H, W]; earlier ones are broadcast."""
    standard = (top - mean) * (-log_std).exp()
    return (-0.5 * (standard.square() + math.log(2 * math.pi)) - log_std).flatten(-3).sum(-1)


class MultiscaleFlow(ImageFlow):
    """[squeeze → steps → split] × scales (Dinh 2017, §3.6); the last scale is the top latent."""

    def build(self, scales: int | None, steps: Callable[[int, bool], Iterable[Bijection]]) -> None:
        """Builds the scales from steps(channels, last), each on squeezed images of that many channels.
        Without a number of scales, the image is halved at least once, and as long as both sides are even and
        the smaller one is above 4. Raises UsageError if the image cannot be halved that often.
        """
        C, H, W = self.data.shape
        if scales is None:
            scales = 1
            while math.gcd(H, W) % 2 ** (scales + 1) == 0 and min(H, W) > 4 * 2**scales:
                scales += 1
        check_size(H, W, scales)
        self.flow: Modules[Modules[Bijection]] = Modules()
        self.splits: Modules[layers.SplitPrior] = Modules()
        shapes = []
        for last in [False] * (scales - 1) + [True]:
            C, H, W = 4 * C, H // 2, W // 2
            self.flow.append(Modules(steps(C, last)))
            if not last:
                self.splits.append(layers.SplitPrior(C))
                shapes.append((C - C // 2, H, W))
                C //= 2
        self.build_top([*shapes, (C, H, W)])

    def encode(self, v: Tensor) -> tuple[list[Tensor], Tensor]:
        h, log_det = self.preprocess(v)
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
        *eps, h = z
        scales = list(zip(self.flow, [*self.splits, None], [*eps, None], strict=True))
        for count, (steps, split, e) in enumerate(reversed(scales), 1):
            if split is not None and e is not None:
                h = split.inverse(h, e)
            for step in reversed(steps):
                h = step.inverse(h)
            h = layers.unsqueeze(h)
            progress(count, len(scales))
        return self.postprocess(h)


def check_size(height: int, width: int, scales: int) -> None:
    """Raises UsageError unless height and width can be halved `scales` ≥ 1 times."""
    if scales < 1:
        raise UsageError(f"`model.scales` must be at least 1, not {scales}")
    unit = 2**scales
    if height % unit or width % unit:
        most = int(math.log2(math.gcd(height, width) & -math.gcd(height, width)))
        larger = f"`data.size={as_size(*(-(-side // unit) * unit for side in (height, width)))}`"
        raise UsageError(
            f"`model.scales={scales}` halves images {scales} times, but {height}×{width} is not divisible "
            f"by {unit}",
            hint=f"set `model.scales={most}`, or {larger}" if most else f"set {larger}",
        )
