"""Flow matching — Lipman et al. 2022, arXiv:2210.02747: a network learns the velocity of straight paths from
noise to data.

    x_t = (1 − (1 − σ) t) x_0 + t x_1,   x_0 ~ N(0, I),   u_t = x_1 − (1 − σ) x_0                        (eq.
    22, 23)
    E ‖v(x_t, t) − u_t‖²                                                                                 (eq.
    9)

Times run from noise at t = 0 to data at t = 1; images are made by solving dx/dt = v(x, t).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from gzcli.errors import UsageError
from gzcli.models.diffusion.samplers import Denoise
from gzcli.models.diffusion.schedule import Level
from gzcli.models.flow_matching.coupling import coupled
from gzcli.models.guided import Returning, stratified
from gzcli.models.nn import to_fp32
from gzcli.models.nn.ode import Velocity, density_norm, dequantised, log_density, solve, solve_adaptive
from gzcli.types import Batch, DataInfo, Noise, Progress, no_progress

Solver = Literal["euler", "midpoint", "heun", "rk4", "adaptive"]
Times = Literal["uniform", "stratified", "logit_normal"]

SCALE = 1000.0  # the networks were designed for times 0 … 1000
LAST = 20.0  # σ/α from which a likelihood takes one step to pure noise, where σ/α has no end


class FlowMatching(Returning):
    """A network that tells the velocity v(x [B, C, H, W], t [B]) at which noise becomes data.

    sigma_min: σ, the noise that is left at t = 1. time_sampling: uniform, stratified over the batch, or
    logit-normal: the middle, where the velocity is hard to tell, more often (Esser 2024, arXiv:2403.03206,
    section 3.1). coupling: noise and images of a batch are paired at random, or by the cheapest transport
    between them (Tong 2023, arXiv:2302.00482), among those of a class where labels are told; see coupling.py
    for what it costs.
    """

    likelihood = "ode"
    best = "loss"

    def __init__(
        self,
        data: DataInfo,
        net: nn.Module,
        *,
        sigma_min: float,
        time_sampling: Times,
        coupling: Literal["independent", "ot"],
        conditional: bool,
        label_dropout: float,
    ):
        super().__init__(data, net, conditional=conditional, label_dropout=label_dropout)
        self.sigma_min, self.time_sampling, self.coupling = sigma_min, time_sampling, coupling

    # ---- training

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The mean squared error of the velocity at one time an image (eq. 23)."""
        t = self.draw_times(batch.noise, len(batch)).to(batch.x)
        x0, x1 = self.pairs(batch)
        y, drop = self.training_labels(batch)
        v = to_fp32(self.net(self.between(x0, x1, t), SCALE * t, y, drop))
        return {"loss": (v - (x1 - (1 - self.sigma_min) * x0)).square().mean()}

    def on_batch(self, batch: Batch) -> dict[str, Tensor]:
        """The noises of a step that are coupled with its images, before micro-batches are cut from it."""
        return {"x0": self.pairs(batch)[0]} if self.coupling == "ot" else {}

    def pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The noises x_0 and the images x_1 that the paths of a batch lead between."""
        if "x0" in batch.extra:
            return batch.extra["x0"], batch.x
        x0 = batch.noise.randn(*batch.x.shape).to(batch.x)
        if self.coupling == "ot":
            x0 = coupled(x0, batch.x, batch.y if self.conditional else None, self)
        return x0, batch.x

    def draw_times(self, noise: Noise, n: int) -> Tensor:
        """[B] in (0, 1)."""
        if self.time_sampling == "uniform":
            return noise.rand(n)
        u = stratified(noise.rand(n), noise)
        return (
            u
            if self.time_sampling == "stratified"
            else torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)).sigmoid()
        )

    def between(self, x0: Tensor, x1: Tensor, t: Tensor | float) -> Tensor:
        """x_t of noise and data at t [B], or at one time for all (eq. 22)."""
        t = t[:, None, None, None] if isinstance(t, Tensor) else t
        return (1 - (1 - self.sigma_min) * t) * x0 + t * x1

    # ---- sampling

    def velocity(
        self, y: Tensor | None, guidance: float = 1.0, interval: Sequence[float] = (0.0, 1.0)
    ) -> Velocity:
        """v(x, t) as solvers call it, guided within the `interval` of t. Raises UsageError for guidance
        without labels."""
        self.check_guidance(guidance, y)

        def predict(x: Tensor, t: Tensor, y: Tensor | None, scale: float) -> Tensor:
            return self.guided(x, SCALE * t, y, scale)

        if guidance == 1 or (interval[0] <= 0 and interval[1] >= 1):
            return lambda x, t: predict(x, t, y, guidance)
        return lambda x, t: self.guided_within(predict, x, t, y, guidance, interval)

    def denoiser(self, y: Tensor | None = None, *, guidance: float = 1.0) -> Denoise:
        """Estimates (x_1, x_0) of data and noise at one time, as the samplers of diffusions call it."""
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
        """x carried from one time to another, by as many equal `steps` or with the adaptive solver's
        `tolerance`."""
        if solver == "adaptive":
            return solve_adaptive(f, x, start, end, rtol=tolerance, atol=tolerance, progress=progress)
        if steps < 1:
            raise UsageError("`steps` must be 1 or more")
        return solve(f, x, [start + (end - start) * i / steps for i in range(steps + 1)], solver, progress)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        solver: Solver = "midpoint",
        steps: int = 10,
        tolerance: float = 1e-4,
        guidance: float = 1.0,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> Tensor:
        """n images [n, C, H, W] in [-1, 1]: noise carried from t = 0 to 1.

        `steps` equal ones of one network call (euler), two (midpoint, heun) or four (rk4), or adaptive ones
        of six, whose error is kept to `tolerance`. guidance: 1 = the labels as trained, 0 = without them,
        more = sharper (Ho 2022), within the `interval` of t.
        """
        x = noise.randn(n, *self.data.shape).to(self.device)
        f = self.velocity(self.asked_labels(labels, n), guidance, interval)
        x = self.flow(f, x, 0.0, 1.0, solver=solver, steps=steps, tolerance=tolerance, progress=progress)
        return self.into_range(x)

    # ---- likelihood

    def log_prob(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        *,
        noise: Noise,
        solver: Solver = "rk4",
        steps: int = 24,
        tolerance: float = 1e-4,
        probes: int = 1,
    ) -> Tensor:
        """[B] nats of the discrete image by the flow from data to noise (appendix C), see nn/ode.py. Raises
        UsageError for latents.

        `steps`, of four network calls and gradients by default, are uniform in log σ/α, as what there is to
        learn of data is spread over its noise levels; adaptive ones keep the error of x and of the nats a
        dimension each to `tolerance`.
        """
        if steps < 1:
            raise UsageError("`steps` must be 1 or more")
        least = max(dequantised(self.data.levels), self.sigma_min)
        ratios = least * (LAST / least) ** (np.arange(steps) / max(steps - 1, 1))
        times = [*(1 / (ratios + 1 - self.sigma_min)).tolist(), 0.0]  # t where σ/α is so large

        def carry(g: Velocity, state: Tensor) -> Tensor:
            if solver == "adaptive":
                return solve_adaptive(
                    g, state, times[0], 0.0, rtol=tolerance, atol=tolerance, norm=density_norm
                )
            return solve(g, state, times, solver)

        f = self.velocity(self.known_labels(labels))
        return log_density(f, carry, x, levels=self.data.levels, alpha=times[0], noise=noise, probes=probes)
