"""Denoising diffusion probabilistic models — Ho et al. 2020, arXiv:2006.11239: a network on the discrete
variance-preserving process, its samplers, and the variational bound of its likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.core.errors import UsageError
from gzcli.core.types import Applied, Batch, DataInfo, Noise, Progress, no_progress
from gzcli.models.denoising import samplers
from gzcli.models.denoising.applications import NoiseApplications, block_means, downscale, interpolate_images
from gzcli.models.denoising.denoiser import UNCLIPPED, ObjectiveOptions, WalkOptions
from gzcli.models.denoising.process import (
    DiscreteVP,
    Level,
    ScheduleName,
    Shift,
    per_image,
    shift_of,
)
from gzcli.models.denoising.samplers import SOLVERS, Estimate, Sampler
from gzcli.models.labelled import ClusterOptions
from gzcli.models.nn import as_interpolations, at_least, complete_pairs, nearer
from gzcli.models.nn.dit import DiTNet
from gzcli.models.nn.nets import NetOptions
from gzcli.models.nn.unet import UNet

Spacing = Literal["trailing", "leading", "linspace", "karras", "logsnr"]
Variance = Literal["small", "large"]

VARIANCE_SHARES: dict[Variance | None, float] = {"small": 0.0, "large": 1.0}  # of log β/β̃
BOUND_WEIGHT = 1e-3  # λ of the bound in the loss of learned variances (Nichol 2021, eq. 16)

DIFFUSERS_PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
HIDDEN_SHARE = 0.1  # share of the small images hidden in training with a `factor`


@dataclass(frozen=True, kw_only=True)
class DiffusionOptions(ObjectiveOptions):
    """The process and its training loss.

    timesteps: T, the number of noise levels.
    schedule: noise schedule: linear β (Ho 2020), cosine ᾱ (Nichol 2021), or σ/α as on straight lines.
    shift: factor of the noise-to-signal ratio σ/α at every level. auto: side / 64, at least 1 (Hoogeboom
      2023, arXiv:2301.11093).
    zero_snr: whether the last level is pure noise (Lin 2023). Incompatible with prediction eps.
    learned_variance: whether the network learns the step variance of each pixel, between β̃ and β (Nichol
      2021, arXiv:2102.09672). Improves the likelihood.
    """

    timesteps: int = 1000
    schedule: ScheduleName = "cosine"
    shift: Shift = 1.0
    zero_snr: bool = False
    learned_variance: bool = False

    @property
    def outputs(self) -> int:
        """The number of output channels of the network per image channel."""
        return 2 if self.learned_variance else 1


@dataclass(frozen=True)
class PathOptions:
    """The sampler and its steps.

    sampler: a solver of the ODE (ddim, dpmpp, unipc, heun), or of the SDE (ancestral, dpmpp_sde).
    steps: network calls, 1 … T. heun takes 2 · steps − 1.
    spacing: spacing of the steps: uniform in t (trailing, leading, linspace; Lin 2023, table 2), in the 7th
      root of σ/α (karras; Karras 2022, eq. 5), or in log σ/α (logsnr).
    """

    sampler: Annotated[str, SAMPLERS] = "dpmpp"
    steps: int = 20
    spacing: Spacing = "karras"


@dataclass(frozen=True)
class SamplingOptions(WalkOptions, PathOptions):
    """The sampler, its steps and guidance.

    eta: noise of ddim as a fraction of the ancestral sampler's, 0 … 1.
    churn: S_churn of heun (Karras 2022, algorithm 2). 0: no new noise.
    variance: variance of ancestral steps (Ho 2020, section 3.2): β̃ (small) or β (large). Default: the
      learned variance if there is one, otherwise small.
    """

    eta: float = 0.0
    churn: float = 0.0
    variance: Variance | None = None


SAMPLERS: dict[str, Callable[[SamplingOptions, DiscreteVP], Sampler]] = {
    "ancestral": lambda options, _: partial(samplers.ancestral, share=VARIANCE_SHARES.get(options.variance)),
    "ddim": lambda options, _: partial(samplers.ddim, eta=options.eta),
    **SOLVERS,
}


class Diffusion(NoiseApplications):
    """A network on the discrete process. With a `factor`, it is also conditioned on a small image, which it
    enlarges by the factor (SR3, Saharia 2021, arXiv:2104.07636). Training hides the fraction HIDDEN_SHARE of
    the small images, so that the network also works without them. If it learns variances, equally many
    additional output channels are their shares of log β/β̃, from −1 for β̃ to 1 for β."""

    likelihood = "bound"
    reverse_sampler = staticmethod(samplers.ddim)
    process: DiscreteVP
    factor: int | None = None

    def __init__(self, data: DataInfo, net: nn.Module, process: DiffusionOptions, labels: ClusterOptions):
        if process.zero_snr and process.prediction == "eps":
            raise UsageError(
                "`prediction: eps` does not determine the image at the last level, which is pure noise with "
                "`zero_snr`",
                hint="set `model.prediction` to `v` or `x0`",
            )
        shift = shift_of(process.shift, data.shape)
        schedule = DiscreteVP(process.schedule, process.timesteps, zero_snr=process.zero_snr, shift=shift)
        super().__init__(data, net, schedule, labels)
        self.train_by(process)
        self.learned_variance = process.learned_variance

    # ---- training

    def objective(self, out: Tensor, target: Tensor, level: Level) -> dict[str, Tensor]:
        out, shares = out[:, : target.shape[1]], out[:, target.shape[1] :]
        losses = super().objective(out, target, level)
        if not self.learned_variance:
            return losses
        error = (out - target).detach().square() / per_image(self.image_weight(level))
        bound = self.process.timesteps * self.process.kl(level.t, error, (shares + 1) / 2).mean()
        return losses | {"loss": losses["loss"] + BOUND_WEIGHT * bound, "bound": bound.detach()}

    def to_estimate(self, out: Tensor, x: Tensor, level: Level) -> Estimate:
        estimate = super().to_estimate(out[:, : x.shape[1]], x, level)
        return estimate._replace(share=(out[:, x.shape[1] :] + 1) / 2) if self.learned_variance else estimate

    def training_guide(self, batch: Batch) -> Tensor | None:
        """The small images for a model with a `factor`; hidden ones are zero."""
        if not self.factor:
            return None
        visible = batch.noise.rand(len(batch)) >= HIDDEN_SHARE
        return visible[:, None, None, None] * F.avg_pool2d(batch.x, self.factor)

    def inputs(self, x: Tensor, level: Level, guide: Tensor | None = None) -> Tensor:
        """The input x. For a model with a `factor`, it is followed by the enlarged small images, or by
        zeros."""
        if not self.factor:
            return x
        if guide is None:
            return torch.cat([x, torch.zeros_like(x)], 1)
        return torch.cat([x, F.interpolate(guide, size=x.shape[2:], mode="bicubic", align_corners=False)], 1)

    # ---- sampling

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        options: SamplingOptions = SamplingOptions(),
    ) -> Tensor:
        """n images [n, C, H, W] in [-1, 1]."""
        sampler = SAMPLERS[options.sampler](options, self.process)
        return self.draw(n, labels, noise, progress, options, sampler)

    def to_noise(self, x: Tensor, y: Tensor | None, steps: int, progress: Progress) -> Tensor:
        return samplers.ddim_inverse(self.denoiser(y, UNCLIPPED), x, self.path(steps), progress=progress)

    def to_data(self, z: Tensor, y: Tensor | None, steps: int, guidance: float, progress: Progress) -> Tensor:
        denoise = self.denoiser(y, WalkOptions(guidance, clip=False))
        return samplers.ddim(denoise, z, self.path(steps), progress=progress)

    def to_scheduler(self) -> Any:
        """A scheduler of diffusers for DPM-Solver++(2M), equivalent to `sample` with dpmpp and trailing
        steps."""
        from diffusers import DPMSolverMultistepScheduler

        if self.prediction not in DIFFUSERS_PREDICTIONS:
            raise UsageError(f"diffusers does not support `prediction: {self.prediction}`")
        alpha_bar = np.append(1.0, self.process.alpha**2)
        alpha_bar[-1] = max(alpha_bar[-1], 2.0**-24)  # at zero SNR as in diffusers, which takes its log
        return DPMSolverMultistepScheduler(
            num_train_timesteps=self.process.timesteps,
            trained_betas=1 - alpha_bar[1:] / alpha_bar[:-1],
            prediction_type=DIFFUSERS_PREDICTIONS[self.prediction],
            thresholding=self.data.levels is not None,
            sample_max_value=1.0,
            timestep_spacing="trailing",
        )

    # ---- likelihood

    def log_prob(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        *,
        noise: Noise,
        terms: int = 50,
        variance: Variance | None = None,
    ) -> Tensor:
        """The variational bound (Ho 2020, eq. 5), [B] nats, by `terms` + 1 network calls. L_T and L_0 are
        exact. Of the T − 1 other terms, one is drawn from each of `terms` strata and weighted by the
        stratum's width. With clusters, the bound is that of x and its cluster. A conditional model without
        labels has the bound of the mixture of its classes, with `terms` + 1 calls for each. Raises UsageError
        for latents.

        terms: number of strata. T − 1 or more: the whole sum.
        variance: variance of p(x_{t−1} | x_t). β̃ (small) has the tighter bound for images with flat parts,
          such as digits; β (large) suits data that are smooth at the scale of one grey level. Default: the
          learned variance if there is one, otherwise small.
        """
        bound = partial(self.variational_bound, x, terms=terms, variance=variance)
        return self.over_classes(bound, len(x), labels, noise)

    def variational_bound(
        self, x: Tensor, labels: Tensor | None, noise: Noise, *, terms: int, variance: Variance | None
    ) -> Tensor:
        """`log_prob` given labels. For multi-label data, None hides the labels."""
        levels, n, process = self.grey_levels, len(x), self.process
        y = self.image_condition(x, labels)
        alpha_T, sigma_T = process.alpha[-1], process.sigma[-1]
        # KL(q(x_T | x_0) ‖ N(0, 1))
        prior = 0.5 * (sigma_T**2 + (alpha_T * x) ** 2 - 1 - 2 * math.log(sigma_T))
        x0, _ = self.predict_x0(x, torch.zeros(n, dtype=torch.long, device=x.device), y, noise)
        total = discretised_gaussian(x, x0, float(process.sigma[0]), levels).flatten(1).sum(1)
        total = total - prior.flatten(1).sum(1)
        edges = strata(process.timesteps, terms)
        u = noise.rand(n, len(edges) - 1)
        for k, (low, high) in enumerate(pairwise(edges)):
            t = low + (u[:, k] * (high - low)).long().clamp_(max=high - low - 1)
            x0, share = self.predict_x0(x, t, y, noise)
            kl = process.kl(t, (x - x0).square(), VARIANCE_SHARES.get(variance, share))
            total = total - (high - low) * kl.flatten(1).sum(1)
        return total + self.condition_log_prob(y, labels)

    def predict_x0(
        self, x: Tensor, t: Tensor, y: Tensor | None, noise: Noise
    ) -> tuple[Tensor, Tensor | float]:
        """The estimate of x from a draw of q(x_t | x_0 = x) at integer times t [B] (Ho 2020, eq. 4), and the
        variance share."""
        level = self.process.levels_at(t)
        x_t = level.alpha * x + level.sigma * noise.randn(*x.shape)
        estimate = self.estimate(x_t, level, y)
        return self.into_range(estimate.x0), estimate.share

    # ---- applications

    @torch.no_grad()
    def interpolate(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        frames: int = 8,
        strength: float = 0.5,
        steps: int = 20,
    ) -> Applied:
        """Interpolates between image 0 and 1, 2 and 3, …: adds noise, mixes and denoises (Ho 2020, figure 8).
        Noise is mixed on the sphere, which keeps its variance. Each frame has the label of the nearer image.
        Raises UsageError for fewer than two images, or frames.

        strength: noise level at which images are mixed, as a share of the way from data to noise, 0 … 1; .5
          is as much noise as image.
        steps: denoising steps, at most.
        """
        at_least(1, steps=steps)
        x = complete_pairs(x)
        path, eps = self.path(steps, start=strength), noise.first(len(x)).randn(*x.shape)
        x_0, eps = interpolate_images(x, frames), interpolate_images(eps, frames, mix_noises)
        x_t = path[0].alpha * x_0 + path[0].sigma * eps
        randn, y = partial(noise.randn, *x.shape), nearer(labels, frames)
        images = self.denoise_path(x_t, path, self.image_condition(x_0, y), 1.0, randn, progress)
        return as_interpolations(images, frames, y)

    @torch.no_grad()
    def upscale(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        factor: int | None = None,
        steps: int | None = None,
        eta: float | None = None,
    ) -> Applied:
        """Enlarges small images by DDNM (Wang 2022, arXiv:2212.00490), which needs no training. A model
        trained with a `factor` is also conditioned on them. Raises UsageError for sizes that
        do not fit.

        factor: factor by which full-size images are first reduced. Default: the model's factor, or 2.
        steps: steps of DDIM. Default: 50, or 4 if the model is conditioned on small images, because few steps
          stay near the mean.
        eta: noise of DDIM as a fraction of the ancestral sampler's, 0 … 1. Default: .85, or 0 if the model is
          conditioned on small images.
        """
        at_least(1, factor=factor, steps=steps)
        x, ratio = downscale(x, factor or self.factor or 2, self.data.shape[1:])
        if self.factor and ratio != self.factor:
            raise UsageError(
                f"the model was trained to enlarge images {self.factor} times, not {ratio} times"
            )
        eta = (0.0 if self.factor else 0.85) if eta is None else eta
        denoise = self.denoiser(self.image_condition(x, labels), guide=x if self.factor else None)
        path = self.path(steps or (4 if self.factor else 50))
        randn = partial(noise.randn, len(x), *self.data.shape)
        denoise = self.condition_on(denoise, x, block_means(ratio))
        images = samplers.ddim(denoise, randn(), path, eta=eta, randn=randn, progress=progress)
        upscaled, how = self.into_range(images), f"small, 1/{ratio}"
        return Applied(upscaled, rows=("upscaled",), condition=x, how=how, labels=labels)


def mix_noises(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """A mixture of independent noises that keeps their variance: a at t = 0, b at t = 1."""
    angle = t * (torch.pi / 2)
    return angle.cos() * a + angle.sin() * b


def strata(timesteps: int, terms: int) -> list[int]:
    """The edges, from 1 to T, of at most `terms` strata of the times 1 … T − 1. Their widths grow with t."""
    terms = min(terms, timesteps - 1)
    return [1 + max(k, round((timesteps - 1) * (k / terms) ** 2)) for k in range(terms + 1)]


def discretised_gaussian(x: Tensor, mean: Tensor, sigma: float, levels: int) -> Tensor:
    """The log mass of N(mean, σ²) in the bin of each grey level x; the end bins extend to ±∞ (Ho 2020, eq.
    13)."""
    half_bin = 1 / (levels - 1)
    low = torch.where(x < -1 + half_bin, -math.inf, (x - half_bin - mean) / sigma)
    high = torch.where(x > 1 - half_bin, math.inf, (x + half_bin - mean) / sigma)
    flip = low + high > 0  # the upper tail is mirrored to the lower one, where log Φ is exact
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    a, b = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return b + torch.log((-torch.expm1(a - b)).clamp(min=1e-30))


class DDPM(Diffusion):
    """A network on the discrete process: by default the U-Net of Ho 2020, appendix B.

    factor: super-resolution factor of `--do upscale`: the network is conditioned on small images.
      `train.init` can be an unconditional run. Default: no such condition.
    """

    paper = "Ho et al. 2020, arXiv:2006.11239"
    variants = {
        "cddpm": {"paper": "Ho & Salimans 2022, arXiv:2207.12598", "conditional": True},
        "dit": {
            "paper": "Peebles & Xie 2023, arXiv:2212.09748",
            "shares": True,
            "net": "dit",
            "conditional": True,
        },
    }
    net: UNet | DiTNet

    def __init__(
        self,
        data: DataInfo,
        *,
        net: NetOptions = NetOptions(),
        process: DiffusionOptions = DiffusionOptions(),
        labels: ClusterOptions = ClusterOptions(),
        factor: int | None = None,
    ):
        if factor and any(side % factor for side in data.shape[1:]):
            raise UsageError(
                f"images of {data.shape[1]}×{data.shape[2]} cannot be reduced {factor} times",
                hint="set `model.factor` to a divisor of their side",
            )
        guides = data.shape[0] if factor else 0
        classes, outputs = labels.kinds(data), process.outputs
        network = net.build(
            data, classes=classes, guides=guides, outputs=outputs, freq_shift=float(net.net == "dit")
        )
        super().__init__(data, network, process, labels)
        self.factor = factor

    def to_diffusers(self) -> Any:
        """A `DDPMPipeline` (for a transformer, a `DiTPipeline`) with the same weights and schedule,
        equivalent to `sample` with dpmpp and trailing steps. With labels, or for a transformer, only its
        parts can be used."""
        from diffusers import DDPMPipeline

        if self.factor:
            raise UsageError("diffusers has no pipeline for models with `model.factor`")
        if isinstance(self.net, DiTNet):
            from diffusers import DiTPipeline

            transformer, scheduler = self.net.to_diffusers(), self.to_scheduler()
            pipeline: Any = DiTPipeline(transformer=transformer, vae=None, scheduler=scheduler)
            pipeline.usage = (
                "use `pipeline.transformer(x, timestep=t, class_labels=y)` and `pipeline.scheduler`, because "
                "the pipeline itself cannot draw images without an autoencoder"
            )
            return pipeline
        null = self.label_dropout > 0 or self.clusters is not None  # otherwise nothing is known of it
        unet = self.net.to_diffusers(self.data.shape[1:], self.data.shape[0], null=null)  # without variances
        pipeline = DDPMPipeline(unet=unet, scheduler=self.to_scheduler())
        pipeline.usage = (
            "use `pipeline.unet(x, t, class_labels=y)` and `pipeline.scheduler`, because the pipeline "
            "itself does not support labels"
            if self.labelled
            else "run `pipeline(batch_size=16, num_inference_steps=20).images`, which draws like gz with "
            "`sample.sampler=dpmpp`, `sample.spacing=trailing` and as many `sample.steps`"
        )
        return pipeline
