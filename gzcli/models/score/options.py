"""Options of a score model: of the training loss, and of sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gzcli.core.units import Size
from gzcli.models.nn.ode import Solver
from gzcli.models.score.sde import Spacing

Prediction = Literal["v", "eps"]
Weighting = Literal["even", "score", "likelihood"]
TimeSampling = Literal["uniform", "cosine"]


@dataclass(frozen=True)
class ScoreOptions:
    """The training loss.

    prediction: what the network predicts: the noise (eps), or v = (α ε − σ x_0) / √(α² + σ²).
    weighting: λ(t) of the loss: σ², the plain error of ε (score); g², a bound of the likelihood (likelihood;
      Song 2021b, arXiv:2101.09258); or the plain error of the prediction (even).
    time_sampling: times of a batch, one from each of its equal shares: uniform in t, or in the angle of (α,
      σ), as in the cosine schedule (cosine).
    """

    prediction: Prediction = "v"
    weighting: Weighting = "even"
    time_sampling: TimeSampling = "cosine"


@dataclass(frozen=True)
class SamplingOptions:
    """The sampler, its steps and guidance.

    sampler: a solver of the ODE: dpmpp, `steps` network calls (Lu 2022b), heun, 2 steps − 1 (Karras 2022), or
      ode, by a general `solver`; or of the SDE, which wants hundreds of uniform steps: em (Euler–Maruyama),
      `steps` calls, and pc (predictor–corrector), steps + corrector · (steps − 1) calls.
    steps: number of noise levels, 1 or more.
    spacing: where the noise levels lie: uniform: evenly in t; karras: in the 7th root of σ/α (Karras 2022,
      eq. 5); logsnr: in log σ/α.
    corrector: Langevin steps that pc takes at each level.
    snr: signal-to-noise ratio of the Langevin steps.
    solver: of ode: adaptive to `tolerance`, or steps − 1 steps of one network call (euler), two (midpoint,
      heun) or four (rk4).
    tolerance: largest error of an adaptive step, for images in [-1, 1].
    guidance: strength of the labels (Ho & Salimans 2022); 1: as trained, 0: without them, more: sharper;
      null: 1, and 1.3 towards clusters.
    interval: times t between which guidance acts.
    clip: whether estimates of x_0 are clamped to [-1, 1]; ode never clamps.
    size: of the images in pixels, for a network that draws others than it was trained on; null: as in
      training.
    """

    sampler: str = "dpmpp"
    steps: int = 25
    spacing: Spacing = "karras"
    corrector: int = 1
    snr: float = 0.16
    solver: Solver = "adaptive"
    tolerance: float = 1e-4
    guidance: float | None = None
    interval: tuple[float, float] = (0.0, 1.0)
    clip: bool = True
    size: Size | None = None
