"""Options of a diffusion: of the process that is trained, and of sampling; and the table of samplers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from gzcli.core.units import Size
from gzcli.models.denoising import samplers
from gzcli.models.denoising.samplers import Sampler
from gzcli.models.denoising.schedule import Schedule, ScheduleName, Shift, Spacing

Prediction = Literal["eps", "x0", "v"]
LossType = Literal["l2", "l1", "huber"]
TimeSampling = Literal["uniform", "stratified", "logit_normal"]
SamplerName = Literal["ancestral", "ddim", "dpmpp", "dpmpp_sde", "unipc", "heun"]
Variance = Literal["small", "large"]


@dataclass(frozen=True)
class DiffusionOptions:
    """The process and its training loss.

    timesteps: T, the number of noise levels; 2 or more.
    schedule: how noise grows with t: linear β (Ho 2020), or cosine ᾱ (Nichol 2021).
    shift: factor of the noise-to-signal ratio σ/α at every level; auto: side / 64, at least 1 (Hoogeboom
      2023, arXiv:2301.11093).
    zero_snr: whether the last level is pure noise (Lin 2023); not with prediction eps.
    prediction: what the network predicts: the noise eps, the image x0, or v = α ε − σ x_0 (Salimans 2022).
    loss_type: error of the prediction: squared (l2), absolute (l1) or Huber's.
    min_snr: γ of min-SNR-γ weights (Hang 2023); null: the plain error of the prediction (Ho 2020, eq. 14).
    time_sampling: how a batch draws its times: each on its own (uniform); one from each of its equal shares
      of 0 … T − 1 (stratified); or logit-normal, which has more in the middle (Esser 2024, arXiv:2403.03206).
    """

    timesteps: int = 1000
    schedule: ScheduleName = "cosine"
    shift: Shift = 1.0
    zero_snr: bool = False
    prediction: Prediction = "v"
    loss_type: LossType = "l2"
    min_snr: float | None = None
    time_sampling: TimeSampling = "stratified"


@dataclass(frozen=True)
class PathOptions:
    """The sampler and its steps.

    sampler: a solver of the ODE (ddim, dpmpp, unipc, heun), or of the SDE (ancestral, dpmpp_sde).
    steps: network calls, 1 … T; heun takes 2 steps − 1.
    spacing: where the steps lie: trailing, leading, linspace: evenly in t (Lin 2023, table 2); karras: in the
      7th root of σ/α (Karras 2022, eq. 5); logsnr: in log σ/α.
    """

    sampler: SamplerName = "dpmpp"
    steps: int = 20
    spacing: Spacing = "karras"


@dataclass(frozen=True)
class SamplingOptions(PathOptions):
    """The sampler, its steps and guidance.

    eta: noise of ddim as a share of that of the ancestral sampler, 0 … 1.
    churn: S_churn of heun (Karras 2022, algorithm 2); 0: no new noise.
    variance: of the ancestral sampler's steps (Ho 2020, section 3.2): β̃ (small) or β (large).
    guidance: strength of the labels (Ho & Salimans 2022); 1: as trained, 0: without them, more: sharper;
      null: 1, and 1.3 towards clusters.
    interval: shares of T between which guidance acts (Kynkäänniemi 2024).
    clip: whether estimates of x_0 are clamped to [-1, 1].
    dynamic: a quantile of |x_0|, such as .995, at which estimates are thresholded in place of clamping
      (Saharia 2022); null: none.
    size: of the images in pixels, for a network that draws others than it was trained on; null: as in
      training.
    """

    eta: float = 0.0
    churn: float = 0.0
    variance: Variance = "small"
    guidance: float | None = None
    interval: tuple[float, float] = (0.0, 1.0)
    clip: bool = True
    dynamic: float | None = None
    size: Size | None = None


SAMPLERS: dict[SamplerName, Callable[[SamplingOptions, Schedule], Sampler]] = {
    "ancestral": lambda options, _: partial(samplers.ancestral, variance=options.variance),
    "ddim": lambda options, _: partial(samplers.ddim, eta=options.eta),
    "dpmpp": lambda *_: samplers.dpmpp,
    "dpmpp_sde": lambda *_: partial(samplers.dpmpp, noisy=True),
    "unipc": lambda *_: samplers.unipc,
    "heun": lambda options, schedule: partial(samplers.heun, churn=options.churn, level=schedule.at_ratio),
}
