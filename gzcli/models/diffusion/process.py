"""The Gaussian diffusion process of a network `net(x, t, y, drop)`: training, denoising, sampling, bound (Ho
2020).

Times t are noise levels, 0 … T − 1 from least to most noise (schedule.py).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.errors import UsageError
from gzcli.models.diffusion import samplers
from gzcli.models.diffusion.schedule import Schedule
from gzcli.models.guided import Returning, stratified
from gzcli.models.nn import to_fp32
from gzcli.types import Batch, DataInfo, Noise, Progress, moved, no_progress

HIDDEN = 0.1  # share of small images that the training of an enlarging model hides
LEAST_ALPHA_BAR = (
    2.0**-24
)  # of an exported schedule, whose solver takes logarithms; as diffusers has it for zero SNR
LOSSES = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.smooth_l1_loss}


class Diffusion(Returning):
    """A network that tells noise (eps), image (x0) or v = α ε − σ x_0 (Salimans 2022) from a noised image.

    net(x [B, C, H, W], t [B], y, drop) → [B, C, H, W]; y: labels or None = unknown, drop [B]: rows of unknown
    label.
    zero_snr: the last level is pure noise (Lin 2023). min_snr: γ of min-SNR-γ weights (Hang 2023), None = the
    plain loss of `prediction` (Ho 2020, eq. 14). time_sampling "stratified": one time from each of the
    batch's equal shares of 0 … T − 1. factor: the network sees a small image beside the noised one, which it
    is to enlarge so many times (as SR3, Saharia 2021, arXiv:2104.07636), hidden in a share HIDDEN of training
    so that it also does without. Raises UsageError for settings that contradict each other.
    """

    likelihood = "bound"
    best = "loss"  # the bound takes tens of network calls an image

    def __init__(
        self,
        data: DataInfo,
        net: nn.Module,
        *,
        timesteps: int,
        schedule: str,
        zero_snr: bool,
        prediction: str,
        loss_type: str,
        min_snr: float | None,
        time_sampling: str,
        conditional: bool,
        label_dropout: float,
        factor: int | None = None,
    ):
        super().__init__(data, net, conditional=conditional, label_dropout=label_dropout)
        if factor and any(side % factor for side in data.shape[1:]):
            raise UsageError(
                f"images of {data.shape[1]}×{data.shape[2]} are no {factor} times larger ones",
                hint="set `model.factor` to a divisor of their side",
            )
        if zero_snr and prediction == "eps":
            raise UsageError(
                "`zero_snr` with `prediction: eps`: the last level is pure noise, which says nothing about "
                "the image",
                hint="set `model.prediction` to `v` or `x0`",
            )
        self.timesteps, self.prediction, self.loss_type, self.min_snr = (
            timesteps,
            prediction,
            loss_type,
            min_snr,
        )
        self.time_sampling, self.factor = time_sampling, factor
        self.schedule = Schedule(schedule, timesteps, zero_snr=zero_snr)
        for name in ("alpha", "sigma", "snr"):
            table = torch.as_tensor(getattr(self.schedule, name), dtype=torch.float32)
            self.register_buffer(name, table, persistent=False)

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """Ho 2020, algorithm 1: the error of the network's guess at one random time an image."""
        x, n, noise = batch.x, len(batch), batch.noise
        t = self.draw_times(noise, n).to(x.device)
        eps = noise.randn(*x.shape).to(x.device)
        y, drop = self.training_labels(batch)
        alpha, sigma = at(self.alpha, t), at(self.sigma, t)
        x_t = alpha * x + sigma * eps
        target = {"eps": eps, "x0": x, "v": alpha * eps - sigma * x}[self.prediction]
        small = None
        if self.factor:
            shown = noise.rand(n).to(x) >= HIDDEN
            small = shown[:, None, None, None] * F.avg_pool2d(x, self.factor)
        out = to_fp32(self.net(self.beside(x_t, small), t, y, drop))
        error = LOSSES[self.loss_type](out, target, reduction="none").flatten(1).mean(1)  # [B]
        if self.min_snr is None:
            return {"loss": error.mean()}
        snr = self.snr[t]
        plain = {"eps": snr, "x0": 1, "v": snr + 1}[
            self.prediction
        ]  # the weight that `error` gives to that of x_0
        weight = snr.clamp(max=self.min_snr) / plain
        return {"loss": (weight * error).mean(), "unweighted": error.detach().mean()}

    def draw_times(self, noise: Noise, n: int) -> Tensor:
        """[n] int64, uniform over 0 … T − 1; stratified over the rows of the global batch where `noise` knows
        it."""
        u = noise.rand(n)
        if self.time_sampling == "stratified":
            u = stratified(u, noise)
        return (u * self.timesteps).long().clamp_(max=self.timesteps - 1)

    def beside(self, x: Tensor, small: Tensor | None = None) -> Tensor:
        """What the network sees of x: itself or, in a model with a `factor`, the enlarged small image [B, C,
        h, w] with it."""
        if not self.factor:
            return x
        if small is None:
            return torch.cat([x, torch.zeros_like(x)], 1)
        return torch.cat([x, F.interpolate(small, size=x.shape[2:], mode="bicubic", align_corners=False)], 1)

    # -----------------------------------------------------------------------------------------------------
    # denoising

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
        """x_0, in the range of images, from noised images x at integer times t [B], each its own."""
        return self.into_range(
            self.split(to_fp32(self.net(self.beside(x), t, y)), x, at(self.alpha, t), at(self.sigma, t))[0]
        )

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
        """The `denoise(x, t)` that samplers call; options as in `sample`. One pass of a doubled batch if
        guided. small: the images that a model with a `factor` is to enlarge."""
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
        """Images into [-1, 1]; `dynamic`: by thresholding at this quantile of |x_0| (Saharia 2022); latents
        stay."""
        if self.data.levels is None:
            return x0
        if dynamic is None:
            return x0.clamp(-1, 1)
        s = x0.abs().flatten(1).quantile(dynamic, 1).clamp(min=1)[:, None, None, None]
        return x0.clamp(-s, s) / s

    # ------------------------------------------------------------------------------------------------------
    # sampling

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        sampler: Literal["ancestral", "ddim", "dpmpp", "dpmpp_sde", "unipc", "heun"] = "dpmpp",
        steps: int = 20,
        spacing: Literal["trailing", "leading", "linspace", "karras", "logsnr"] = "karras",
        eta: float = 0.0,
        churn: float = 0.0,
        variance: Literal["small", "large"] = "small",
        guidance: float = 1.0,
        interval: tuple[float, float] = (0.0, 1.0),
        clip: bool = True,
        dynamic: float | None = None,
    ) -> Tensor:
        """n images [n, C, H, W] in [-1, 1], by `steps` network calls (2 steps − 1 for heun).

        eta: noise of ddim, 1 = ancestral; churn: of heun; variance: of the ancestral sampler. guidance: 1 =
        the labels as trained, 0 = without them, more = sharper (Ho 2022), within `interval` of t/T
        (Kynkäänniemi 2024). clip: estimates of x_0 into [-1, 1]; dynamic: a quantile of |x_0|, such as .995,
        at which they are thresholded instead.
        """
        x = noise.randn(n, *self.data.shape).to(self.alpha.device)
        y = self.asked_labels(labels, n)
        denoise = self.denoiser(y, guidance=guidance, interval=interval, clip=clip, dynamic=dynamic)
        path = self.schedule.spaced(steps, spacing)
        randn = self.fresh(noise, x)
        if sampler == "ancestral":
            x = samplers.ancestral(denoise, x, path, randn=randn, variance=variance, progress=progress)
        elif sampler == "ddim":
            x = samplers.ddim(denoise, x, path, randn=randn, eta=eta, progress=progress)
        elif sampler == "unipc":
            x = samplers.unipc(denoise, x, path, progress=progress)
        elif sampler == "heun":
            x = samplers.heun(
                denoise, x, path, randn=randn, churn=churn, level=self.schedule.at_ratio, progress=progress
            )
        else:
            x = samplers.dpmpp(denoise, x, path, randn=randn, noisy=sampler == "dpmpp_sde", progress=progress)
        return self.into_range(x)

    @staticmethod
    def fresh(noise: Noise, like: Tensor) -> samplers.Randn:
        return lambda: noise.randn(*like.shape).to(like.device)

    # ----------------------------------------------------------------------------------------------------
    # likelihood

    def log_prob(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        *,
        noise: Noise,
        terms: int = 50,
        variance: Literal["small", "large"] = "small",
    ) -> Tensor:
        """[B] nats: the variational bound (Ho 2020, eq. 5), by `terms` + 1 network calls.

        L_T and L_0 are whole; of the T − 1 terms between, one is drawn from each of `terms` strata and
        weighted by its stratum's width, which is unbiased, and the whole sum for terms ≥ T − 1. Strata widen
        with t, as terms shrink.
        variance: of p(x_{t−1} | x_t), as in `sample`; a bound for either: small is the tighter one for
        digits, whose flat parts are known even from much noise, large for data smooth at the scale of one
        grey level. Raises UsageError for latents, which have no grey levels.
        """
        if self.data.levels is None:
            raise UsageError("latents have no grey levels, so no likelihood of the discrete image")
        n, y = len(x), self.known_labels(labels)
        alpha_T, sigma_T = self.schedule.alpha[-1], self.schedule.sigma[-1]
        prior = 0.5 * (
            sigma_T**2 + (alpha_T * x) ** 2 - 1 - 2 * math.log(sigma_T)
        )  # KL(q(x_T | x_0) ‖ N(0, 1))
        t = torch.zeros(n, dtype=torch.long, device=x.device)
        x0 = self.estimate(self.noised(x, t, noise), t, y)
        total = discretised_gaussian(x, x0, float(self.schedule.sigma[0]), self.data.levels).flatten(1).sum(1)
        total = total - prior.flatten(1).sum(1)
        edges = strata(self.timesteps, terms)
        u = noise.rand(n, len(edges) - 1).to(x.device)
        scale, offset = (
            moved(torch.as_tensor(a, dtype=torch.float32), x.device) for a in self.schedule.kl(variance)
        )
        for k, (low, high) in enumerate(pairwise(edges)):
            t = low + (u[:, k] * (high - low)).long().clamp_(max=high - low - 1)
            x0 = self.estimate(self.noised(x, t, noise), t, y)
            kl = at(scale, t) * (x - x0).square() + at(offset, t)
            total = total - (high - low) * kl.flatten(1).sum(1)
        return total

    def to_scheduler(self) -> Any:
        """The scheduler of diffusers with this schedule: DPM-Solver++(2M), trailing, as `sample` has it with
        `sampler` dpmpp and `spacing` trailing. Its thresholding at no more than 1 is the clipping of x_0,
        which diffusers' DDIM does too, but unless it is told otherwise with an ε that belongs to the x_0
        before."""
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
        return at(self.alpha, t) * x + at(self.sigma, t) * noise.randn(*x.shape).to(x.device)


def at(table: Tensor, t: Tensor) -> Tensor:
    """table[t] as [B, 1, 1, 1]."""
    return table[t][:, None, None, None]


def strata(timesteps: int, terms: int) -> list[int]:
    """Edges 1 … T of at most `terms` strata of 1 … T − 1, of widths that grow with t."""
    terms = min(terms, timesteps - 1)
    return [1 + max(k, round((timesteps - 1) * (k / terms) ** 2)) for k in range(terms + 1)]


def discretised_gaussian(x: Tensor, mean: Tensor, sigma: float, levels: int) -> Tensor:
    """log mass of N(mean, σ²) in the bin of each grey level x in [-1, 1]; end bins reach ±∞ (Ho 2020, eq.
    13)."""
    half = 1 / (levels - 1)
    low = torch.where(x < -1 + half, -math.inf, (x - half - mean) / sigma)
    high = torch.where(x > 1 - half, math.inf, (x + half - mean) / sigma)
    flip = low + high > 0  # both tails by the lower one, where log Φ is exact
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    a, b = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return b + torch.log((-torch.expm1(a - b)).clamp(min=1e-30))
