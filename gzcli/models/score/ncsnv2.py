"""NCSNv2 — Song & Ermon 2020, "Improved Techniques for Training Score-Based Generative Models",
arXiv:2006.09011.

    score(x, σ) = −net(x) / σ,   E ½ ‖net(x + σ ε) − ε‖² over a ladder σ_1 > … > σ_L   (eq. 1 with λ = σ²)

The network is not conditioned on the noise level, which it infers from the image (technique 3). The ladder is
that of the VE SDE at t = 0, 1/(L − 1), …, 1, so every sampler of score models works. The network may predict
v instead of ε, from x / √(1 + σ²). Its error of x_0 then stays bounded as σ grows (Karras 2022, eq. 7).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, cast

import numpy as np
import torch
from scipy.special import ndtr
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.core.errors import UsageError
from gzcli.core.types import Batch, DataInfo, Noise, Progress, no_progress
from gzcli.models.denoising.denoiser import ObjectiveOptions
from gzcli.models.denoising.process import VE, Level
from gzcli.models.denoising.samplers import annealed_langevin
from gzcli.models.labelled import ClusterOptions
from gzcli.models.nn import ClassEmbedding, Classes, at_least, stacked, to_fp32
from gzcli.models.score.sgm import SAMPLERS, SamplingOptions, ScoreModel, Spacing

MAX_DISTANCE_RATIO = 1.7  # the largest distance between two images of a set in units of √D


@dataclass(frozen=True)
class RefineNetOptions:
    """The sizes of a RefineNet.

    width: feature maps of the first stage.
    mult: feature maps of each stage as a multiple of `width`. A stage has two residual blocks.
    dilation: dilation of each stage's convolutions, the first 1. A later stage with dilation 1 halves the
      resolution.
    """

    width: int = 32
    mult: tuple[int, ...] = (1, 2, 2)
    dilation: tuple[int, ...] = (1, 1, 2)


class RefineNet(nn.Module):
    """x [B, C, H, W], labels as in `ClassEmbedding` → [B, C, H, W]; times are ignored. Raises UsageError if
    `mult` and `dilation` differ in length."""

    def __init__(self, channels: int, options: RefineNetOptions, *, classes: Classes):
        width, mult, dilation = options.width, options.mult, options.dilation
        super().__init__()
        if len(mult) != len(dilation) or dilation[0] != 1:
            numbers = f"{len(mult)} and {len(dilation)} numbers, the first dilation {dilation[0]}"
            raise UsageError(
                f"`model.mult` and `model.dilation` have {numbers}",
                hint="give both one number for each stage, and begin `model.dilation` with 1",
            )
        widths = [width * m for m in mult]
        self.conv_in = stacked(nn.Conv2d(channels, width, 3, padding=1), 0)
        self.stages, self.refine, c = nn.ModuleList(), nn.ModuleList(), width
        for i, (o, d) in enumerate(zip(widths, dilation, strict=True)):
            blocks = [ScoreBlock(c, o, classes, d, first=i > 0), ScoreBlock(o, o, classes, d)]
            self.stages.append(nn.ModuleList(blocks))
            c = o
        for i in reversed(range(len(widths))):
            coarsest = i == len(widths) - 1
            o = c if coarsest else widths[max(i - 1, 0)]
            inputs = [widths[i]] if coarsest else [widths[i], c]
            self.refine.append(RefineBlock(inputs, o, end=3 if i == 0 else 1))
            c = o
        self.norm_out = InstanceNormPlus(c, classes)
        self.conv_out = stacked(nn.Conv2d(c, channels, 3, padding=1), 0)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
        h, skips = self.conv_in(x), []
        # in bf16 with channels last, as for colour images, oneDNN's gradient of a dilated convolution is
        # wrong except for multiples of 16 channels; on a CPU all maps get the layout of this one
        if torch.is_grad_enabled() and h.dtype is torch.bfloat16 and h.shape[1] % 16:
            h = h.contiguous()
        for stage in self.stages:
            for block in cast(nn.ModuleList, stage):
                h = block(h, y, drop)
            skips.append(h)
        h = self.refine[0]([skips.pop()])
        for refine in self.refine[1:]:
            h = refine([skips.pop(), h])
        return self.conv_out(F.elu(self.norm_out(h, y, drop)))


class InstanceNormPlus(nn.Module):
    """InstanceNorm++ (Song & Ermon 2019, appendix A.1): adds back the means that instance normalisation
    removes, normalised over the channels. Without them, scores shift colours. The embedding of a label is
    added to γ, α and β."""

    def __init__(self, c: int, classes: Classes):
        super().__init__()
        self.scale = nn.Parameter(1 + 0.02 * torch.randn(2, c))  # γ, α
        self.shift = nn.Parameter(torch.zeros(c))  # β
        self.label = ClassEmbedding(classes, 3 * c) if classes else None
        if self.label is not None:
            self.label.init_weights(0.02)

    def forward(self, x: Tensor, y: Tensor | None, drop: Tensor | None) -> Tensor:
        x = to_fp32(x)
        means = x.mean((2, 3))  # [B, C]
        spread = (means - means.mean(1, keepdim=True)) * (means.var(1, keepdim=True) + 1e-5).rsqrt()
        rows = torch.cat([self.scale, self.shift[None]])[None]  # [1, 3, C]
        if self.label is not None:
            rows = rows + self.label(y, x.shape[0], drop).unflatten(1, (3, -1))
        gamma, alpha, beta = rows[..., None, None].unbind(1)
        return gamma * (F.instance_norm(x) + alpha * spread[:, :, None, None]) + beta


class ScoreBlock(nn.Module):
    """A residual block of two pre-activated convolutions. The `first` block of a stage without dilation
    halves the resolution by average pooling, odd sides rounded up."""

    def __init__(self, c_in: int, c_out: int, classes: Classes, dilation: int, first: bool = False):
        super().__init__()
        wide = 3 if dilation > 1 else 1  # the kernel of the shortcut
        self.norm1, self.norm2 = InstanceNormPlus(c_in, classes), InstanceNormPlus(c_in, classes)
        self.conv1 = nn.Conv2d(c_in, c_in, 3, padding=dilation, dilation=dilation)
        self.conv2 = nn.Conv2d(c_in, c_out, 3, padding=dilation, dilation=dilation)
        self.skip = None
        if first or c_in != c_out:
            self.skip = nn.Conv2d(c_in, c_out, wide, padding=dilation * (wide // 2), dilation=dilation)
        self.pool = first and dilation == 1

    def forward(self, x: Tensor, y: Tensor | None, drop: Tensor | None) -> Tensor:
        h = self.conv1(F.elu(self.norm1(x, y, drop)))
        h = self.conv2(F.elu(self.norm2(h, y, drop)))
        h = h + (x if self.skip is None else self.skip(x))
        return F.avg_pool2d(h, 2, ceil_mode=True) if self.pool else h


class RefineBlock(nn.Module):
    """Residual units of each input, their sum at the size of the first, chained pooling, residual units."""

    def __init__(self, inputs: list[int], c: int, end: int):
        super().__init__()
        self.adapt = nn.ModuleList(nn.Sequential(ResidualUnit(i), ResidualUnit(i)) for i in inputs)
        self.fuse = nn.ModuleList(nn.Conv2d(i, c, 3, padding=1) for i in inputs) if len(inputs) > 1 else None
        self.chain = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1, bias=False) for _ in range(2))
        self.out = nn.Sequential(*(ResidualUnit(c) for _ in range(end)))

    def forward(self, xs: list[Tensor]) -> Tensor:
        xs = [adapt(x) for adapt, x in zip(self.adapt, xs, strict=True)]
        h = xs[0]
        if self.fuse is not None:
            size = h.shape[2:]
            parts = (conv(x) for conv, x in zip(self.fuse, xs, strict=True))
            h, *coarser = [F.interpolate(p, size=size, mode="bilinear", align_corners=True) for p in parts]
            for part in coarser:
                h = h + part
        h = path = F.elu(h)
        for conv in self.chain:
            path = conv(max_pool(path))
            h = h + path
        return self.out(h)


def max_pool(x: Tensor) -> Tensor:
    """5×5 max pooling. On a CPU it runs with channels last, in a quarter of the time."""
    if x.device.type != "cpu":
        return F.max_pool2d(x, 5, stride=1, padding=2)
    last = x.contiguous(memory_format=torch.channels_last)
    return F.max_pool2d(last, 5, stride=1, padding=2).contiguous()


class ResidualUnit(nn.Module):
    """x + two pre-activated convolutions of x."""

    def __init__(self, c: int):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for conv in self.convs:
            h = conv(F.elu(h))
        return x + h


@dataclass(frozen=True)
class NCSNSampling(SamplingOptions):
    """`SamplingOptions`, with the paper's Langevin dynamics.

    A network without the noise level infers it from the image. Solvers of the ODE never correct noise that
    differs from the level's; those of the SDE renew the noise.

    sampler: the paper's langevin (repeats · levels + 1 network calls), a solver of the SDE (dpmpp_sde, em,
      pc), or of the ODE (dpmpp, unipc, heun, ode).
    repeats: Langevin steps at each of the model's levels.
    step: Langevin step size in units of σ². Default: the size that preserves the variance of each level
      (technique 4).
    """

    sampler: Annotated[str, "langevin", SAMPLERS, "ode"] = "em"
    steps: int = 50
    spacing: Spacing = "logsnr"
    repeats: int = 5
    step: float | None = None


class NCSNv2(ScoreModel):
    """A RefineNet that predicts the score.

    sigma_max: largest σ, for images in [-1, 1]. It should be at least the largest distance between two images
      (technique 1), which gz checks when training starts. Default: 1.7 √(C H W), about the paper's values.
    sigma_min: smallest σ.
    levels: L, the number of noise levels. Default: enough for neighbours to overlap (technique 2).
    """

    paper = "Song & Ermon 2020, arXiv:2006.09011"

    def __init__(
        self,
        data: DataInfo,
        *,
        refinenet: RefineNetOptions = RefineNetOptions(),
        sigma_max: float | None = None,
        sigma_min: float = 0.02,
        levels: int | None = None,
        score: ObjectiveOptions = ObjectiveOptions(
            prediction="eps", weighting="score", time_sampling="uniform"
        ),
        labels: ClusterOptions = ClusterOptions(),
    ):
        net, size = RefineNet(data.shape[0], refinenet, classes=labels.kinds(data)), math.prod(data.shape)
        ladder = VE(1e-5, sigma_min, MAX_DISTANCE_RATIO * math.sqrt(size) if sigma_max is None else sigma_max)
        super().__init__(data, net, ladder, score, labels)
        self.rescale = score.prediction == "v"
        if levels is not None and levels < 2:
            raise UsageError(
                "there must be at least two noise levels", hint="set `model.levels` to 2 or more, or to null"
            )
        self.rungs = levels or 1 + math.ceil(ladder.log_ratio / math.log(overlap_ratio(size)))

    def on_start(self, batch: Batch) -> None:
        widest = float(torch.cdist(batch.x.flatten(1).float(), batch.x.flatten(1).float()).max())
        if widest > self.process.prior_std:
            self.warnings = (
                f"images are up to {widest:.3g} apart, more than `model.sigma_max`: samples may miss modes",
            )

    def draw_times(self, noise: Noise, n: int) -> Tensor:
        """Times of levels of the ladder, one in each of `rungs` equal parts of the time."""
        share = (self.rungs * super().draw_times(noise, n)).floor()
        return (share / (self.rungs - 1)).clamp(max=1.0)

    @torch.no_grad()
    def sample(  # type: ignore[override]
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        options: NCSNSampling = NCSNSampling(),
    ) -> Tensor:
        """Draws n images [n, C, H, W] in [-1, 1] from noise."""
        if options.sampler != "langevin":
            return super().sample(n, labels=labels, noise=noise, progress=progress, options=options)
        at_least(1, repeats=options.repeats)
        ladder = [self.process.level(t) for t in np.linspace(1, 0, self.rungs).tolist()]
        step = options.step or steady_step(ladder[0].sigma / ladder[1].sigma, options.repeats)
        ladder.append(Level(0.0, 1.0, 0.0))
        sampler = partial(annealed_langevin, repeats=options.repeats, step=step)
        return self.draw(n, labels, noise, progress, options, sampler, ladder)


def overlap_ratio(size: int, overlap: float = 0.5) -> float:
    """The ratio γ of neighbouring σ (technique 2), for which a fraction `overlap` of one level's images is
    within three standard deviations of the other level's mean radius.

    size: D, the number of elements of an image. The image's radius is distributed as N(√D σ, σ²/2).
    """
    from scipy.optimize import brentq

    def excess(gamma: float) -> float:
        shift = math.sqrt(2 * size) * (gamma - 1)
        return ndtr(shift + 3 * gamma) - ndtr(shift - 3 * gamma) - overlap

    return float(brentq(excess, 1.0, 1e3))


def steady_step(gamma: float, repeats: int) -> float:
    """The step ε/σ² with which `repeats` steps best change the variance of samples from that of the level γ σ
    to that of the level σ (eq. 7, technique 4)."""
    eta = np.geomspace(1e-4, 1, 100_000)[:-1]
    stationary = 2 * eta / (1 - (1 - eta) ** 2)  # the variance after many steps, in units of σ²
    ratio = (1 - eta) ** (2 * repeats) * (gamma**2 - stationary) + stationary
    return float(eta[np.abs(ratio - 1).argmin()])
