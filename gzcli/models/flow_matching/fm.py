"""Flow matching with straight conditional paths (CondOT) — Lipman et al. 2022, arXiv:2210.02747: a network
learns the velocity from noise to data.

    x_t = (1 − (1 − σ) t) x_0 + t x_1,   x_0 ~ N(0, I),   u_t = x_1 − (1 − σ) x_0           (eq. 22, 23)
    E ‖v(x_t, t) − u_t‖²                                                                    (eq. 9)

Times run from noise at t = 0 to data at t = 1; solving dx/dt = v(x, t) generates images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from gzcli.core import ranks
from gzcli.core.errors import UsageError
from gzcli.core.types import Batch, DataInfo, Noise, Progress, no_progress
from gzcli.models.denoising import samplers
from gzcli.models.denoising.applications import Applications
from gzcli.models.denoising.denoiser import (
    LEAST_SIGMA,
    DrawOptions,
    LikelihoodByODE,
    ObjectiveOptions,
    Prediction,
    Times,
    WalkOptions,
)
from gzcli.models.denoising.process import PATHS, START_RATIO, CondOT, SDEOptions, Shift, shift_of
from gzcli.models.denoising.samplers import Path, Randn, Solver, solve
from gzcli.models.labelled import ClusterOptions
from gzcli.models.nn import full_fp32, to_fp32
from gzcli.models.nn.nets import NetOptions

# images that `measure` classifies, with one network call per class
CLASSIFIED_IMAGES, MAX_CLASSIFIED = 200, 100
END_SIGMA = 0.002  # by which an estimated image becomes a velocity at the end, where a likelihood starts


@dataclass(frozen=True, kw_only=True)
class FlowOptions(ObjectiveOptions):
    """How a flow is trained.

    process: path from data to noise: straight lines (straight), cosine (Albergo 2023, arXiv:2303.08797), or
      an SDE (vp, subvp, ve; Song 2021, arXiv:2011.13456).
    shift: factor of the noise-to-signal ratio in training and sampling. auto: side / 64, at least 1 (Esser
      2024, eq. 23).
    coupling: pairing of noise and images in a batch: independent, or by optimal transport (ot; Tong 2023,
      arXiv:2302.00482). Conditional models pair within a class or cluster.
    """

    process: Annotated[str, PATHS] = "straight"
    prediction: Prediction = "velocity"
    time_sampling: Times = "logit_normal"
    shift: Shift = 1.0
    coupling: Literal["independent", "ot"] = "independent"


@dataclass(frozen=True)
class SamplingOptions(DrawOptions):
    """The solver of the ODE or the SDE, its steps and guidance.

    sampler: solver of the ODE, with one network call per step (euler, adams), two (midpoint, heun), four
      (rk4), or six in adaptive steps (adaptive). sde: an SDE with the same densities (Ma 2024,
      arXiv:2401.08740, eq. 5).
    steps: number of steps. The adaptive solver ignores it.
    tolerance: largest error of an adaptive step, for images in [-1, 1].
    """

    sampler: Annotated[Solver, "sde"] = "midpoint"
    steps: int = 10
    tolerance: float = 1e-4


class FlowMatching(LikelihoodByODE, Applications):
    """A network that predicts the velocity v(x [B, C, H, W], t [B]) from noise to data."""

    path_mean: Tensor | None = None  # [3], set by `fit_path`; float64 on the CPU
    path_precision: Tensor | None = None  # [3, 3]

    def __init__(
        self,
        data: DataInfo,
        net: nn.Module,
        flow: FlowOptions,
        labels: ClusterOptions,
        sigma_min: float = 0.0,
    ):
        if sigma_min and flow.process != "straight":
            hint = "omit one of them"
            raise UsageError(f"`model.sigma_min` is for straight paths, not for `{flow.process}`", hint=hint)
        process = PATHS[flow.process](SDEOptions(), shift_of(flow.shift, data.shape))
        if isinstance(process, CondOT):
            process.sigma_min = sigma_min
        super().__init__(data, net, process, labels)
        flow = replace(flow, bounded=flow.bounded and data.levels is not None)
        process.least_sigma = END_SIGMA if flow.bounded or flow.prediction == "x0" else 0.0
        process.least_alpha = 1 / START_RATIO if flow.prediction == "eps" else 0.0
        self.train_by(flow)
        self.coupling = flow.coupling

    # ---- training

    def on_batch(self, batch: Batch) -> dict[str, Tensor]:
        """With `coupling` ot, the noise, paired over the whole batch before that is split into
        micro-batches."""
        return {"x0": self.noise_and_images(batch)[0]} if self.coupling == "ot" else {}

    def noise_and_images(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if "x0" in batch.extra:
            return batch.extra["x0"], batch.x
        eps, x = super().noise_and_images(batch)
        if self.coupling == "ot":
            eps = couple_noise(eps, x, self.condition(batch), self)
        return eps, x

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
        """n images [n, C, H, W] in [-1, 1], by the ODE or SDE from noise at t = 0 to data at t = 1."""
        if options.sampler == "sde":
            walk = WalkOptions(options.guidance, options.size, options.interval)
            sampler, path = partial(samplers.dpmpp, noisy=True), self.process.path(options.steps)
            return self.draw(n, labels, noise, progress, walk, sampler, path)
        x, y = self.initial_noise(n, labels, noise, options.size)
        f = self.velocity(y, self.guidance_scale(options.guidance), options.interval)
        times, solver = self.process.ode_times(options.steps), options.sampler
        how: dict[str, Any] = {"tolerance": options.tolerance, "progress": progress}
        if self.process.least_sigma and solver in ("heun", "rk4"):
            # as in EDM the last step is Euler's, to the estimated image: the velocity there divides by 0
            x, times, solver = solve(f, x, times[:-1], solver, **how), times[-2:], "euler"
        return self.into_range(solve(f, x, times, solver, **how))

    def denoise_path(
        self, x: Tensor, path: Path, y: Tensor | None, guidance: float, randn: Randn, progress: Progress
    ) -> Tensor:
        """The solution of the ODE at t = 1."""
        times = [level.t for level in path]
        return self.into_range(solve(self.velocity(y, guidance), x, times, "midpoint", progress=progress))

    # ---- an out-of-distribution score

    def path_statistics(self, x: Tensor, steps: int) -> Tensor:
        """Statistics [B, 3] of an image's path to noise: the logarithms of the mean squares of its velocity,
        of the change of its velocity, and of its end."""
        f, before = self.velocity(self.image_condition(x)), None
        speed, turns = x.new_zeros(len(x)), x.new_zeros(len(x))
        first = LEAST_SIGMA if self.process.least_sigma else 0.0  # the error of an image is divided by σ
        clean, way = self.process.clean, self.process.noisy - self.process.clean
        for i in range(steps):
            v = f(x, x.new_full((len(x),), clean + way * max(i / steps, first)))
            speed = speed + v.square().flatten(1).mean(1) / steps
            if before is not None:
                turns = turns + (v - before).square().flatten(1).mean(1) * steps
            x, before = x + way * v / steps, v
        return torch.stack([speed, turns, x.square().flatten(1).mean(1)], 1).clamp(min=1e-12).log()

    @torch.no_grad()
    def fit_path(self, batches: Iterable[Batch], *, steps: int = 10) -> None:
        """Fits mean and precision of the statistics over held-out images."""
        statistics = torch.cat([self.path_statistics(batch.x, steps) for batch in batches]).cpu().double()
        covariance = torch.cov(statistics.T) + 1e-6 * torch.eye(3, dtype=torch.float64)
        self.path_mean, self.path_precision = statistics.mean(0), torch.linalg.inv(covariance)

    @torch.no_grad()
    def score_path(self, x: Tensor, *, noise: Noise, steps: int = 10) -> Tensor:
        """The squared Mahalanobis distance [B] of the statistics of an image's path to noise (after DiffPath,
        Heng 2024, arXiv:2405.15342). Raises UsageError before `fit_path`.

        steps: Euler steps of the path.
        """
        if self.path_mean is None or self.path_precision is None:
            raise UsageError("the `path` score needs in-distribution statistics", hint="fit the score first")
        gap = self.path_statistics(x, steps).cpu().double() - self.path_mean
        return ((gap @ self.path_precision) * gap).sum(1).to(x)


@torch.no_grad()
def couple_noise(x0: Tensor, x1: Tensor, y: Tensor | None, module: nn.Module) -> Tensor:
    """The noise x0 [B, …], reordered so that its total squared distance to the data x1 [B, …] is minimal.
    Paths between close pairs cross less and are straighter (Tong 2023, arXiv:2302.00482).

    Noise is paired within the images of each label or cluster y, [B] or [B, K]. Otherwise the noise of a
    class would not be N(0, I), from which its samples start (Cheng & Schwing 2025, arXiv:2503.10636). While
    `module` trains, the rows of all ranks are paired. The assignment is exact and runs on the CPU: 10 ms for
    256 images of MNIST and 50 ms for 512.
    """
    from scipy.optimize import linear_sum_assignment

    noise, data = ranks.rows(x0, module), ranks.rows(x1, module)
    labels = np.zeros(len(noise)) if y is None else ranks.rows(y, module).cpu().numpy()
    group = np.unique(labels, axis=0, return_inverse=True)[1].reshape(len(noise))
    with full_fp32(x0.device):  # ‖x1‖² and ‖x0‖² are the same in every order
        product = to_fp32(data).flatten(1) @ to_fp32(noise).flatten(1).mT
    cost, order = -product.cpu().numpy(), np.arange(len(noise))
    for k in range(group.max() + 1):
        rows = np.flatnonzero(group == k)
        order[rows] = rows[linear_sum_assignment(cost[np.ix_(rows, rows)])[1]]
    rank_order = ranks.own_rows(torch.from_numpy(order), module)
    return noise[rank_order.to(x0.device)]


class FM(FlowMatching):
    """A network that predicts the velocity.

    sigma_min: standard deviation of the remaining noise at t = 1, for images in [-1, 1].
    """

    paper = "Lipman et al. 2022, arXiv:2210.02747"
    variants = {
        "cfm": {"paper": "Tong et al. 2023, arXiv:2302.00482", "conditional": True},
        "rf": {"paper": "Liu et al. 2022, arXiv:2209.03003", "shares": True, "net": "dit"},
        "zigma": {"paper": "Hu et al. 2024, arXiv:2403.13802", "net": "zigzag"},
    }

    def __init__(
        self,
        data: DataInfo,
        *,
        net: NetOptions = NetOptions(),
        sigma_min: float = 0.0,
        flow: FlowOptions = FlowOptions(),
        labels: ClusterOptions = ClusterOptions(),
    ):
        network = net.build(data, classes=labels.kinds(data))
        super().__init__(data, network, flow, labels, sigma_min)

    @torch.no_grad()
    def measure(self, batches: Iterable[Batch]) -> dict[str, float]:
        """A metric of the first held-out images. {} for an unconditional model, for multi-label data and for
        more than `MOST_CLASSES` classes.

        accuracy: accuracy of the model as a classifier.
        """
        if not self.conditional or self.data.multilabel or len(self.data.classes) > MAX_CLASSIFIED:
            return {}
        correct, n = 0, 0
        for batch in batches:
            if n < CLASSIFIED_IMAGES and batch.y is not None:
                correct += int((self.class_errors(batch.x, batch.noise).argmin(1) == batch.y).sum())
                n += len(batch)
        return {"accuracy": correct / n}
