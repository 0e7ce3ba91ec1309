"""Flow matching — Lipman et al. 2022, arXiv:2210.02747: a network learns the velocity of straight paths from
noise to data.

    x_t = (1 − (1 − σ) t) x_0 + t x_1,   x_0 ~ N(0, I),   u_t = x_1 − (1 − σ) x_0           (eq. 22, 23)
    E ‖v(x_t, t) − u_t‖²                                                                    (eq. 9)

Times run from noise at t = 0 to data at t = 1; images are made by solving dx/dt = v(x, t).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from gzcli.core.types import Batch, DataInfo, Noise, Progress, no_progress
from gzcli.core.units import Size
from gzcli.models.denoising.coupling import coupled
from gzcli.models.denoising.guided import logit_normal, stratified
from gzcli.models.denoising.round_trip import RoundTrip
from gzcli.models.denoising.samplers import Denoise
from gzcli.models.denoising.schedule import Level, Shift, shift_of
from gzcli.models.labelled import ClusterOptions
from gzcli.models.nn import at_least, to_fp32
from gzcli.models.nn.ode import (
    LikelihoodOptions,
    Solver,
    Velocity,
    dequantised,
    grey_levels,
    log_density,
    solve_by,
)

TimeSampling = Literal["uniform", "stratified", "logit_normal"]
Coupling = Literal["independent", "ot"]

TimesT = TypeVar("TimesT", float, Tensor)

SCALE = 1000.0  # the networks were designed for times 0 … 1000
LAST = 20.0  # σ/α from which a likelihood takes one step to pure noise, where σ/α is infinite


@dataclass(frozen=True)
class FlowOptions:
    """How a flow is trained.

    time_sampling: times of a batch: uniform; one from each of its equal shares of [0, 1) (stratified); or
      logit-normal, which has more in the middle, where the velocity is hard to predict (Esser 2024,
      arXiv:2403.03206, section 3.1).
    shift: factor of the noise-to-signal ratio at the times of training and of samplers; auto: side / 64, at
      least 1 (Esser 2024, eq. 23).
    coupling: how noise and images of a batch are paired: independent, or by optimal transport between them
      (ot; Tong 2023, arXiv:2302.00482), within a class if the model is conditional.
    """

    time_sampling: TimeSampling = "logit_normal"
    shift: Shift = 1.0
    coupling: Coupling = "independent"


def shifted(t: TimesT, shift: float) -> TimesT:
    """The times at which the noise-to-signal ratio (1 − t) / t is `shift` times that at t, in [0, 1] (Esser
    2024, eq. 23, of noise at time 0)."""
    return t if shift == 1 else t / (t + shift * (1 - t))


class FlowMatching(RoundTrip):
    """A network that predicts the velocity v(x [B, C, H, W], t [B]) from noise to data.

    sigma_min: σ, standard deviation of the noise that is left at t = 1, for images in [-1, 1].
    """

    likelihood = "ode"
    best = "loss"

    def __init__(
        self,
        data: DataInfo,
        net: nn.Module,
        flow: FlowOptions,
        labels: ClusterOptions,
        *,
        sigma_min: float = 0.0,
    ):
        super().__init__(data, net, labels)
        self.sigma_min, self.time_sampling, self.coupling = sigma_min, flow.time_sampling, flow.coupling
        self.shift = shift_of(flow.shift, data.shape)

    # ---- training

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The mean squared error of the velocity at one time an image (eq. 23)."""
        t = self.draw_times(batch.noise, len(batch))
        x0, x1 = self.pairs(batch)
        y, drop = self.training_labels(batch)
        v = to_fp32(self.net(self.between(x0, x1, t), SCALE * t, y, drop))
        return {"loss": (v - (x1 - (1 - self.sigma_min) * x0)).square().mean()}

    def on_batch(self, batch: Batch) -> dict[str, Tensor]:
        """With `coupling` ot, the noises of a step, paired over its whole batch before it is cut into
        micro-batches."""
        return {"x0": self.pairs(batch)[0]} if self.coupling == "ot" else {}

    def pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The noises x_0 and images x_1 [B, C, H, W] at the ends of a batch's paths."""
        if "x0" in batch.extra:
            return batch.extra["x0"], batch.x
        x0 = batch.noise.randn(*batch.x.shape)
        if self.coupling == "ot":
            x0 = coupled(x0, batch.x, batch.y if self.conditional else None, self)
        return x0, batch.x

    def draw_times(self, noise: Noise, n: int) -> Tensor:
        """The times of a batch, [B] in (0, 1)."""
        u = noise.rand(n)
        if self.time_sampling != "uniform":
            u = stratified(u, noise)
        return shifted(logit_normal(u) if self.time_sampling == "logit_normal" else u, self.shift)

    def between(self, x0: Tensor, x1: Tensor, t: Tensor | float) -> Tensor:
        """x_t of noise and data at t [B], or at one time for all (eq. 22)."""
        t = t[:, None, None, None] if isinstance(t, Tensor) else t
        return (1 - (1 - self.sigma_min) * t) * x0 + t * x1

    # ---- sampling

    def velocity(
        self, y: Tensor | None, guidance: float = 1.0, interval: Sequence[float] = (0.0, 1.0)
    ) -> Velocity:
        """The velocity v(x, t) for solvers. Raises UsageError for guidance without labels.

        y: labels that it is conditioned on.
        guidance: strength of the labels.
        interval: times t between which guidance acts.
        """
        self.check_guidance(guidance, y)

        def predict(x: Tensor, t: Tensor, y: Tensor | None, scale: float) -> Tensor:
            return self.guided(x, SCALE * t, y, scale)

        return lambda x, t: self.guided_within(predict, x, t, y, guidance, interval)

    def denoiser(self, y: Tensor | None = None, *, guidance: float = 1.0) -> Denoise:
        """The function of a diffusion's samplers that estimates (x_1, x_0), data and noise, at one time."""
        f = self.velocity(y, guidance)

        def denoise(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
            v = f(x, x.new_full((len(x),), t))
            return (1 - self.sigma_min) * x + (1 - (1 - self.sigma_min) * t) * v, x - t * v

        return denoise

    def level(self, t: float) -> Level:
        return Level(t, t, 1 - (1 - self.sigma_min) * t)

    def flow(
        self,
        f: Velocity,
        x: Tensor,
        start: float,
        end: float,
        *,
        solver: Solver,
        steps: int,
        tolerance: float = 1e-4,
        progress: Progress = no_progress,
    ) -> Tensor:
        """The solution at the time `end` from x at `start`, by `steps` that are equal before the shift, or by
        the adaptive solver."""
        at_least(1, steps=steps)
        low, high = (shifted(t, 1 / self.shift) for t in (start, end))
        times = [shifted(low + (high - low) * i / steps, self.shift) for i in range(steps + 1)]
        return solve_by(solver, f, x, times, tolerance=tolerance, progress=progress)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        sampler: Solver = "midpoint",
        steps: int = 10,
        tolerance: float = 1e-4,
        guidance: float | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
        size: Size | None = None,
    ) -> Tensor:
        """n images [n, C, H, W] in [-1, 1], by solving the ODE from noise at t = 0 to data at t = 1.

        sampler: the solver of the ODE: with equal steps of one network call (euler), two (midpoint, heun) or
          four (rk4), or with steps of six that fit the image (adaptive).
        steps: of the solvers with equal steps.
        tolerance: largest error of an adaptive step, for images in [-1, 1].
        guidance: strength of the labels (Ho & Salimans 2022); 1: as trained, 0: without them, more: sharper;
          null: 1, and 1.3 towards clusters.
        interval: times t between which guidance acts.
        size: of the images in pixels, for a network that draws others than it was trained on; null: as in
          training.
        """
        x = noise.randn(n, *self.drawn_shape(size))
        y = self.sampled_labels(labels, n, noise)
        f = self.velocity(y, self.strength(guidance), interval)
        x = self.flow(f, x, 0.0, 1.0, solver=sampler, steps=steps, tolerance=tolerance, progress=progress)
        return self.into_range(x)

    # ---- likelihood

    def log_prob(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        *,
        noise: Noise,
        ode: LikelihoodOptions = LikelihoodOptions(),
    ) -> Tensor:
        """[B] nats of the discrete image by the flow from data to noise (appendix C), see nn/ode.py. Raises
        UsageError for latents."""
        at_least(1, steps=ode.steps)
        levels = grey_levels(self.data.levels)
        least = max(dequantised(levels), self.sigma_min)
        ratios = least * (LAST * self.shift / least) ** (np.arange(ode.steps) / max(ode.steps - 1, 1))
        times = [*(1 / (ratios + 1 - self.sigma_min)).tolist(), 0.0]  # the times of these σ/α
        f = self.velocity(self.known_labels(labels))
        return log_density(f, x, times, ode, levels=levels, alpha=times[0], noise=noise)
