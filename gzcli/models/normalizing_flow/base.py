"""What every image flow shares: x → dequantise → v → bijection → z, so log p(x) = log p(z) + log |det dz/dv|
− the noise's cost.

A flow says in its `__init__` what the bijection is made of:

    super().__init__(data, logit=…, dequantiser=…, conditional=…, class_weight=…)
    self.build(scales, steps)      # [squeeze → steps(i, channels) → split] × scales, then the top prior

and inherits the rest. `steps(i, channels)` gives the layers of scale i (see `layers`: `forward(x) -> (y,
log_det)`,
`inverse(y) -> x`) on squeezed images of that many channels. One that is made differently overrides `encode`
and `decode`, begins and ends them with `preprocess` and `postprocess`, and calls `build_top(shapes)` with the
shapes [C, H, W] of its latents, the top one last, instead of `build`.

`dequantiser`: None for uniform noise, or a module `forward(x, noise) -> (v [B, C, H, W] in [0, 1), log q(u |
x) [B])`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.errors import UsageError
from gzcli.models.base import Model
from gzcli.models.nn import (
    ClassEmbedding,
    as_ways,
    full_fp32,
    pairs_of,
    spread_labels,
    to_fp32,
    ways,
    zero_init,
)
from gzcli.models.normalizing_flow import layers
from gzcli.models.normalizing_flow.norms import initialising
from gzcli.types import Applied, Batch, DataInfo, Noise, Progress, no_progress

LABEL_DROP = 0.1  # multi-label sets: how often the null label is trained, as there is no sum over 2^K labels


class ImageFlow(Model):
    """A flow with exact likelihood of the dequantised image, hence a bound on that of the discrete one, by
    one draw of the dequantisation; the prior of its top latent may depend on the class.

    logit: alpha of logit(alpha/2 + (1 − alpha) v) before the flow, 0 = v − 1/2;
    class_weight: weight of −log p(y | x), in nats, beside −log p(x | y) when conditional.
    """

    likelihood: ClassVar[str] = "bound"

    def __init__(
        self,
        data: DataInfo,
        *,
        logit: float = 0.0,
        dequantiser: nn.Module | None = None,
        conditional: bool = False,
        class_weight: float = 1.0,
    ):
        super().__init__(data)
        if conditional and not data.classes:
            raise UsageError("`model.conditional` needs a data set with labels", hint="gz list data")
        if dequantiser is not None and data.levels is None:
            raise UsageError(
                "`model.dequant` is for grey levels, and latents have none",
                hint="set `model.dequant=uniform`",
            )
        if not 0 <= logit < 1:
            raise UsageError(f"`model.logit` must be in [0, 1), not {logit}")
        self.conditional, self.class_weight = conditional, class_weight
        self.logit = layers.Logit(logit) if logit else None
        self.dequantiser = dequantiser

    def build(self, scales: int, steps: Callable[[int, int], Iterable[nn.Module]]) -> None:
        """The multi-scale architecture (Dinh 2017, §3.6). Raises UsageError where the image cannot be halved
        so often."""
        check_size(self.data.shape, scales)
        self.flow, self.splits, shapes = nn.ModuleList(), nn.ModuleList(), []
        C, H, W = self.data.shape
        for i in range(scales):
            C, H, W = 4 * C, H // 2, W // 2
            self.flow.append(nn.ModuleList(steps(i, C)))
            if i < scales - 1:
                self.splits.append(layers.SplitPrior(C))
                shapes.append((C - C // 2, H, W))
                C //= 2
        self.build_top([*shapes, (C, H, W)])

    def build_top(self, shapes: list[tuple[int, int, int]]) -> None:
        """The prior of the top latent, the last of `shapes`; the others are N(0, 1)."""
        self.shapes = shapes
        self.top = nn.Parameter(torch.zeros(2, *shapes[-1]))  # mean and log std
        self.classes = (
            zero_init(ClassEmbedding(len(self.data.classes), self.top.numel())) if self.conditional else None
        )

    # ------------------------------------------------------------------------ the bijection

    def preprocess(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """v in [0, 1) as the flow sees it, and the log-det [B]."""
        return self.logit(v) if self.logit else (v - 0.5, v.new_zeros(len(v)))

    def postprocess(self, h: Tensor) -> Tensor:
        """The inverse of `preprocess`."""
        return self.logit.inverse(h) if self.logit else h + 0.5

    def encode(self, v: Tensor) -> tuple[list[Tensor], Tensor]:
        """v [B, C, H, W] in [0, 1) → latents of `self.shapes`, all N(0, 1) but the top one; and log |det
        dz/dv| [B]."""
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
        """The inverse of `encode`."""
        *eps, h = z
        for i in reversed(range(len(self.flow))):
            if i < len(self.splits):
                h = self.splits[i].inverse(h, eps[i])
            for step in reversed(self.flow[i]):
                h = step.inverse(h)
            h = layers.unsqueeze(h)
            progress(len(self.flow) - i, len(self.flow))
        return self.postprocess(h)

    def to_unit(self, x: Tensor, noise: Noise) -> tuple[Tensor, Tensor | float]:
        """x in [-1, 1], dequantised where it has grey levels, and what this adds to log p: −D log L − log q(u
        | x)."""
        if self.data.levels is None:
            return x, 0.0
        if self.dequantiser is None:
            return layers.dequantise(x, self.data.levels, noise.rand(*x.shape).to(x))
        v, log_q = self.dequantiser(x, noise)
        return v, -x[0].numel() * math.log(self.data.levels) - log_q

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

    def class_log_probs(self, top: Tensor) -> Tensor:
        """log p(top | y) of every class y, [B, K], by products of matrices, without a [B, K, C, H, W].

        With t = (top − m) / s, of what all classes share, and a class's own mean m + s d and log std log s +
        e: Σ (t − d)² exp(−2e) = t² · exp(−2e) − 2 t · d exp(−2e) + d² · exp(−2e).
        """
        with full_fp32(top.device):
            log_std, classes = self.top[1], torch.arange(len(self.data.classes), device=top.device)
            shift, extra = self.classes(classes, len(classes)).view(-1, *self.top.shape).unbind(1)
            t = ((to_fp32(top) - self.top[0]) * (-log_std).exp()).flatten(1)  # [B, D]
            d, extra = (shift * (-log_std).exp()).flatten(1), extra.flatten(1)  # [K, D]
            precision = (-2 * extra).exp()
            constant = (d.square() * precision).sum(1)
            quadratic = t.square() @ precision.mT - 2 * t @ (d * precision).mT + constant
            return -0.5 * (quadratic + t.shape[1] * math.log(2 * math.pi)) - (log_std.sum() + extra.sum(1))

    # ------------------------------------------------------------------------ likelihood

    def log_joint(self, x: Tensor, labels: Tensor | None, noise: Noise, *, each_class: bool) -> Tensor:
        """log p(x | labels) [B] of one dequantisation, or with `each_class` log p(x | y) [B, K] for every
        class y."""
        v, constant = self.to_unit(x, noise)
        (*eps, top), log_det = self.encode(v)
        log_p = constant + log_det + sum(layers.gaussian_log_prob(e) for e in eps)
        if each_class:
            return log_p[:, None] + self.class_log_probs(top)
        return log_p + top_log_prob(top, *self.top_prior(labels, len(x)))

    def log_prob(self, x: Tensor, labels: Tensor | None = None, *, noise: Noise, samples: int = 1) -> Tensor:
        """log p(x), or log p(x | labels), [B] nats; the density is averaged over `samples` dequantisations.

        A conditional model without labels gives the marginal over equally likely classes (multi-label: the
        null label).
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
        """Fits every layer with a data-dependent start to the first batch, layer by layer, in one pass."""
        with initialising(self) as fresh, torch.no_grad():
            if fresh:
                self.encode(self.to_unit(batch.x, batch.noise)[0])

    # ------------------------------------------------------------------------ sampling and applications

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress,
        temperature: float = 1.0,
    ) -> Tensor:
        """n images; `temperature` multiplies the standard deviation of every latent (Glow §6,
        reduced-temperature model)."""
        device = self.top.device
        if self.classes is not None:
            labels = spread_labels(labels, n, self.data, device)
        *eps, top = (noise.randn(n, *shape).to(device) * temperature for shape in self.shapes)
        mean, log_std = self.top_prior(labels, n)
        return self.to_image(self.decode([*eps, mean + top * log_std.exp()], progress))

    @torch.no_grad()
    def reconstruct(self, x: Tensor, *, noise: Noise, progress: Progress = no_progress) -> Applied:
        """x through the latents and back: equal to x, up to rounding, where the flow is well conditioned."""
        back = self.to_image(self.decode(self.encode(self.to_unit(x, noise)[0])[0], progress))
        return Applied(back, rows=("reconstruction",))

    @torch.no_grad()
    def interpolate(
        self, x: Tensor, *, noise: Noise, progress: Progress = no_progress, steps: int = 8
    ) -> Applied:
        """The way from image 0 to 1, 2 to 3, …, linear in the latents (Glow, fig. 5), ends included.

        Raises UsageError for fewer than two images, or steps.
        """
        x = pairs_of(x)
        z, _ = self.encode(self.to_unit(x, noise.first(len(x)))[0])
        between = [ways(e.flatten(1), steps).unflatten(1, e.shape[1:]) for e in z]
        return as_ways(self.to_image(self.decode(between, progress)), steps)

    @torch.no_grad()
    def edit(
        self,
        x: Tensor,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        strength: float = 1.0,
    ) -> Applied:
        """x with its top latent moved from the prior of its own class to that of `labels` (i % K without),
        all else kept (after Glow, fig. 6).

        Its own class is the most probable one; multi-label: no class, so that the attributes are added, or
        with a negative `strength` taken away. Raises UsageError for an unconditional model.
        """
        if self.classes is None:
            raise UsageError(
                "only a class-conditional flow can edit", hint="train it with `--set model.conditional=true`"
            )
        labels = spread_labels(labels, len(x), self.data, x.device)
        (*eps, top), _ = self.encode(self.to_unit(x, noise)[0])
        if self.data.multilabel:
            own = torch.zeros_like(labels)
        else:
            own = self.class_log_probs(top).argmax(1)
        (mean, log_std), (to_mean, to_log_std) = self.top_prior(own, len(x)), self.top_prior(labels, len(x))
        standard = (top - mean) * (-log_std).exp()
        top = torch.lerp(mean, to_mean, strength) + standard * torch.lerp(log_std, to_log_std, strength).exp()
        return Applied(self.to_image(self.decode([*eps, top], progress)), rows=("edited",), labels=labels)


def top_log_prob(top: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log N(top; mean, std) summed over [C, H, W]; what stands before is broadcast."""
    standard = (top - mean) * (-log_std).exp()
    return (-0.5 * (standard.square() + math.log(2 * math.pi)) - log_std).flatten(-3).sum(-1)


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
            f"`model.scales={scales}` halves images {scales} times, and {height}×{width} is not divisible "
            f"by {unit}",
            hint=f"set `model.scales={most}`, or {larger}" if most else f"set {larger}",
        )
