"""The Gaussian diffusion process of a network net(x, t, y, drop): training, denoising, sampling, bound (Ho
2020).

Times t are noise levels, 0 … T − 1 from least to most noise (denoising/schedule.py).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.core.errors import UsageError
from gzcli.core.types import Batch, DataInfo, Noise, Progress, moved, no_progress
from gzcli.models.denoising import samplers
from gzcli.models.denoising.guided import logit_normal, stratified
from gzcli.models.denoising.inpainting import Inpainting
from gzcli.models.denoising.schedule import Level, Schedule, Spacing, shift_of
from gzcli.models.diffusion.bound import discretised_gaussian, strata
from gzcli.models.diffusion.options import SAMPLERS, DiffusionOptions, LossType, SamplingOptions, Variance
from gzcli.models.labelled import ClusterOptions
from gzcli.models.nn import to_fp32
from gzcli.models.nn.ode import grey_levels

HIDDEN = 0.1  # share of the small images that training with a `factor` hides
# ᾱ of an exported schedule at zero SNR, as in diffusers, whose solver takes its logarithm
LEAST_ALPHA_BAR = 2.0**-24
LOSSES = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.smooth_l1_loss}


class Diffusion(Inpainting):
    """A network that predicts the noise (eps), the image (x0) or v = α ε − σ x_0 from a noised image.

    net(x [B, C, H, W], t [B], y, drop) → [B, C, H, W], as denoising/guided.py says. Raises UsageError for
    settings that contradict each other.

    factor: the network is also conditioned on a small image, which it enlarges so many times (as SR3, Saharia
      2021, arXiv:2104.07636); training hides a share HIDDEN of the small images, so that the network can do
      without.
    """

    likelihood = "bound"
    best = "loss"  # the bound takes tens of network calls an image
    walk_back = staticmethod(samplers.ddim)
    alpha: Tensor  # [T]
    sigma: Tensor
    snr: Tensor

    def __init__(
        self,
        data: DataInfo,
        net: nn.Module,
        process: DiffusionOptions,
        labels: ClusterOptions,
        *,
        factor: int | None = None,
    ):
        super().__init__(data, net, labels)
        if factor and any(side % factor for side in data.shape[1:]):
            raise UsageError(
                f"images of {data.shape[1]}×{data.shape[2]} are no {factor} times larger ones",
                hint="set `model.factor` to a divisor of their side",
            )
        if process.zero_snr and process.prediction == "eps":
            raise UsageError(
                "`zero_snr` with `prediction: eps`: the last level is pure noise, which says nothing about "
                "the image",
                hint="set `model.prediction` to `v` or `x0`",
            )
        self.timesteps, self.prediction = process.timesteps, process.prediction
        self.loss_type: LossType = process.loss_type
        self.min_snr, self.time_sampling, self.factor = process.min_snr, process.time_sampling, factor
        shift = shift_of(process.shift, data.shape)
        self.schedule = Schedule(process.schedule, process.timesteps, zero_snr=process.zero_snr, shift=shift)
        for name in ("alpha", "sigma", "snr"):
            table = torch.as_tensor(getattr(self.schedule, name), dtype=torch.float32)
            self.register_buffer(name, table, persistent=False)

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The error of the network's prediction at one random time an image (Ho 2020, algorithm 1)."""
        x, n, noise = batch.x, len(batch), batch.noise
        t = self.draw_times(noise, n)
        eps = noise.randn(*x.shape)
        y, drop = self.training_labels(batch)
        alpha, sigma = at(self.alpha, t), at(self.sigma, t)
        x_t = alpha * x + sigma * eps
        target = {"eps": eps, "x0": x, "v": alpha * eps - sigma * x}[self.prediction]
        small = None
        if self.factor:
            shown = noise.rand(n) >= HIDDEN
            small = shown[:, None, None, None] * F.avg_pool2d(x, self.factor)
        out = to_fp32(self.net(self.beside(x_t, small), t, y, drop))
        error = LOSSES[self.loss_type](out, target, reduction="none").flatten(1).mean(1)  # [B]
        if self.min_snr is None:
            return {"loss": error.mean()}
        snr = self.snr[t]
        # the weight of the error of x_0 in the error of the prediction
        plain = {"eps": snr, "x0": torch.ones_like(snr), "v": snr + 1}[self.prediction]
        weight = snr.clamp(max=self.min_snr) / plain
        return {"loss": (weight * error).mean(), "unweighted": error.detach().mean()}

    def draw_times(self, noise: Noise, n: int) -> Tensor:
        """The times of a batch, [n] int64 in 0 … T − 1, as `time_sampling` says; stratified over the global
        batch."""
        u = noise.rand(n)
        if self.time_sampling != "uniform":
            u = stratified(u, noise)
        if self.time_sampling == "logit_normal":
            u = logit_normal(u)
        return (u * self.timesteps).long().clamp_(max=self.timesteps - 1)

    def beside(self, x: Tensor, small: Tensor | None = None) -> Tensor:
        """The input of the network: x, and for a model with a `factor` also the enlarged small images.

        small: [B, C, h, w]; None: hidden, which is an input of zeros.
        """
        if not self.factor:
            return x
        if small is None:
            return torch.cat([x, torch.zeros_like(x)], 1)
        return torch.cat([x, F.interpolate(small, size=x.shape[2:], mode="bicubic", align_corners=False)], 1)

    # ---- denoising

    def split(
        self, out: Tensor, x: Tensor, alpha: Tensor | float, sigma: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """(x_0, ε) from the network's output at x = α x_0 + σ ε."""
        if self.prediction == "v":
            return alpha * x - sigma * out, sigma * x + alpha * out
        if self.prediction == "eps":
            return (x - sigma * out) / alpha, out
        return out, (x - alpha * out) / sigma

    def estimate(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """x_0, in the range of images, from noised images x at integer times t [B]."""
        out = to_fp32(self.net(self.beside(x), t, y))
        return self.into_range(self.split(out, x, at(self.alpha, t), at(self.sigma, t))[0])

    def denoiser(
        self,
        y: Tensor | None = None,
        *,
        guidance: float = 1.0,
        interval: tuple[float, float] = (0.0, 1.0),
        clip: bool = True,
        dynamic: float | None = None,
        small: Tensor | None = None,
    ) -> samplers.Denoise:
        """The `denoise(x, t)` that samplers call; options as in `SamplingOptions`.

        small: the images [B, C, h, w] that a model with a `factor` enlarges.
        """
        self.check_guidance(guidance, y)

        def denoise(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
            _, alpha, sigma = self.schedule.level(t)
            time = x.new_full((len(x),), t)
            scale = guidance if interval[0] <= t / self.timesteps <= interval[1] else 1.0
            out = self.guided(self.beside(x, small), time, y, scale)
            x0, eps = self.split(out, x, alpha, sigma)
            if not clip or self.data.levels is None:
                return x0, eps
            x0 = self.into_range(x0, dynamic)
            return x0, (x - alpha * x0) / sigma

        return denoise

    def into_range(self, x0: Tensor, dynamic: float | None = None) -> Tensor:
        """Images clamped to [-1, 1], or thresholded at the quantile `dynamic` of |x_0| (Saharia 2022);
        latents unchanged."""
        if self.data.levels is None:
            return x0
        if dynamic is None:
            return x0.clamp(-1, 1)
        s = x0.abs().flatten(1).quantile(dynamic, 1).clamp(min=1)[:, None, None, None]
        return x0.clamp(-s, s) / s

    # ---- sampling

    def level(self, t: float) -> Level:
        return self.schedule.level(t)

    def levels(self, steps: int, *, strength: float = 1.0, even_logsnr: bool = False) -> list[Level]:
        most = max(1, round(strength * self.timesteps))
        spacing: Spacing = "logsnr" if even_logsnr else "trailing"
        return self.schedule.spaced(min(steps, most), spacing, start=strength)

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
        x = noise.randn(n, *self.drawn_shape(options.size))
        denoise = self.denoiser(
            self.sampled_labels(labels, n, noise),
            guidance=self.strength(options.guidance),
            interval=options.interval,
            clip=options.clip,
            dynamic=options.dynamic,
        )
        path = self.schedule.spaced(options.steps, options.spacing)
        walk = SAMPLERS[options.sampler](options, self.schedule)
        x = walk(denoise, x, path, randn=samplers.draws_like(noise, x), progress=progress)
        return self.into_range(x)

    # ---- likelihood

    def log_prob(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        *,
        noise: Noise,
        terms: int = 50,
        variance: Variance = "small",
    ) -> Tensor:
        """[B] nats: the variational bound (Ho 2020, eq. 5), by `terms` + 1 network calls.

        L_T and L_0 are exact. Of the T − 1 other terms, one is drawn from each of `terms` strata and weighted
        by the stratum's width, which is unbiased; strata widen with t, as terms shrink. Raises UsageError for
        latents, which have no grey levels.

        terms: number of strata; T − 1 or more: the whole sum.
        variance: of p(x_{t−1} | x_t): β̃ (small), the tighter bound for digits, whose flat parts are known
          even from much noise; or β (large), for data that are smooth at the scale of one grey level.
        """
        levels, n, y = grey_levels(self.data.levels), len(x), self.known_labels(labels)
        alpha_T, sigma_T = self.schedule.alpha[-1], self.schedule.sigma[-1]
        # KL(q(x_T | x_0) ‖ N(0, 1))
        prior = 0.5 * (sigma_T**2 + (alpha_T * x) ** 2 - 1 - 2 * math.log(sigma_T))
        t = torch.zeros(n, dtype=torch.long, device=x.device)
        x0 = self.estimate(self.noised(x, t, noise), t, y)
        total = discretised_gaussian(x, x0, float(self.schedule.sigma[0]), levels).flatten(1).sum(1)
        total = total - prior.flatten(1).sum(1)
        edges = strata(self.timesteps, terms)
        u = noise.rand(n, len(edges) - 1)
        tables = (torch.as_tensor(table, dtype=torch.float32) for table in self.schedule.kl(variance))
        scale, offset = (moved(table, x.device) for table in tables)
        for k, (low, high) in enumerate(pairwise(edges)):
            t = low + (u[:, k] * (high - low)).long().clamp_(max=high - low - 1)
            x0 = self.estimate(self.noised(x, t, noise), t, y)
            kl = at(scale, t) * (x - x0).square() + at(offset, t)
            total = total - (high - low) * kl.flatten(1).sum(1)
        return total

    def to_scheduler(self) -> Any:
        """The scheduler of diffusers with this schedule: DPM-Solver++(2M), as in `sample` with `sampler`
        dpmpp and `spacing` trailing.

        Its thresholding at 1 clips x_0. diffusers' DDIM clips too, but by default keeps the ε from before the
        clipping; `sample` recomputes ε.
        """
        from diffusers import DPMSolverMultistepScheduler

        alpha_bar = np.append(1.0, self.schedule.alpha**2)
        alpha_bar[-1] = max(alpha_bar[-1], LEAST_ALPHA_BAR)
        return DPMSolverMultistepScheduler(
            num_train_timesteps=self.timesteps,
            trained_betas=1 - alpha_bar[1:] / alpha_bar[:-1],
            prediction_type={"eps": "epsilon", "x0": "sample", "v": "v_prediction"}[self.prediction],
            thresholding=self.data.levels is not None,
            sample_max_value=1.0,
            timestep_spacing="trailing",
        )

    def noised(self, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
        """A draw of q(x_t | x_0 = x) (Ho 2020, eq. 4)."""
        return at(self.alpha, t) * x + at(self.sigma, t) * noise.randn(*x.shape)


def at(table: Tensor, t: Tensor) -> Tensor:
    """table[t] as [B, 1, 1, 1]."""
    return table[t][:, None, None, None]
