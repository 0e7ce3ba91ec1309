"""EDM — Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models",
arXiv:2206.00364: a denoiser D of x = x_0 + σ ε whose network F has inputs and targets of unit variance.

    D(x, σ) = c_skip x + c_out F(c_in x, c_noise)                                           (eq. 7)
    c_skip = σ_d² / (σ² + σ_d²),  c_out = σ σ_d / √(σ² + σ_d²),  c_in = 1 / √(σ² + σ_d²)    (table 1)
    E λ(σ) ‖D(x, σ) − x_0‖²,   ln σ ~ N(−1.2, 1.2²),   λ = 1 / c_out²                       (eq. 2)

Its successor EDM2 (Karras 2023, arXiv:2312.02696) is `net: edm2` with `uncertainty`: E λ/e^u ‖D − x_0‖² + u.
With a `prediction` other than edm, the network and its loss are those of `sgm` on the same noise.

The process is VE, whose time t in 0 … 1 is linear in ln σ. The network's input is 1000 t, which is affine in
the paper's c_noise = ¼ ln σ, because its embedding is designed for times of that range.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, Literal

import torch
from torch import Tensor

from gzcli.core import ranks
from gzcli.core.errors import UsageError
from gzcli.core.types import Batch, DataInfo
from gzcli.models.denoising.denoiser import LOSSES, LikelihoodByODE, ObjectiveOptions, Prediction, Times
from gzcli.models.denoising.process import VE, Level, Shift, shift_of
from gzcli.models.denoising.samplers import Estimate
from gzcli.models.labelled import ClusterOptions
from gzcli.models.nn.magnitude import Uncertainty
from gzcli.models.nn.nets import NetOptions
from gzcli.models.score.sgm import ScoreModel

MEASURED_BATCHES = 8  # batches of training images that determine σ_d
FIRST_BOUND, GROWTH = 5.0, 100.0  # the bound of λ at the start of its warm-up, and how much it grows


@dataclass(frozen=True, kw_only=True)
class EDMOptions(ObjectiveOptions):
    """The noise and its weights.

    prediction: prediction target: F, whose input and target have unit variance (edm); or the noise (eps), the
      image (x0), v or the velocity, as for `sgm`.
    sigma_data: σ_d, the standard deviation of images in [-1, 1]. Default: measured on the training images.
    sigma_min: smallest σ of samplers and likelihoods.
    sigma_max: σ at which sampling starts.
    shift: factor of sigma_max, and of σ in training by log_normal. auto: side / 64, at least 1 (Hoogeboom
      2023, arXiv:2301.11093).
    weight_warmup: fraction of training in which λ is capped. The cap grows from 5 to 500, so structure is
      learned before detail (Wu 2023, arXiv:2306.06991).
    uncertainty: whether the loss is divided by its learned expectation at each noise level (Karras 2023,
      arXiv:2312.02696, eq. 21), so that all levels contribute alike.
    """

    prediction: Prediction | Literal["edm"] = "edm"  # type: ignore[assignment]
    time_sampling: Times = "log_normal"
    sigma_data: float | None = None
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    shift: Shift = 1.0
    weight_warmup: float = 0.0
    uncertainty: bool = False


class EDM(LikelihoodByODE, ScoreModel):
    """A network with EDM's preconditioning. Raises UsageError for incompatible loss weights."""

    paper = "Karras et al. 2022, arXiv:2206.00364"
    sigma_data: Tensor  # scalar

    def __init__(
        self,
        data: DataInfo,
        *,
        net: NetOptions = NetOptions(),
        edm: EDMOptions = EDMOptions(),
        labels: ClusterOptions = ClusterOptions(),
    ):
        shift, network = shift_of(edm.shift, data.shape), net.build(data, classes=labels.kinds(data))
        process = VE(1e-5, edm.sigma_min, shift * edm.sigma_max)
        score = replace(edm, log_mean=math.log(shift) + edm.log_mean)
        super().__init__(data, network, process, score, labels)
        self.preconditioned = edm.prediction == "edm"
        # whether the weight is λ
        self.karras = self.preconditioned and edm.weighting == "even" and edm.min_snr is None
        if not self.karras and (edm.uncertainty or edm.weight_warmup):
            hint = "omit `model.prediction`, `model.weighting` and `model.min_snr`"
            raise UsageError("`uncertainty` and `weight_warmup` need EDM's weight λ", hint=hint)
        self.measured, self.warmup = edm.sigma_data is None, edm.weight_warmup * data.steps
        self.register_buffer("sigma_data", torch.tensor(0.5 if self.measured else edm.sigma_data))
        self.uncertainty = Uncertainty() if edm.uncertainty else None
        self.on_step(-1)

    # ---- the network

    def coefficients(self, sigma: Any) -> tuple[Any, Any, Any]:
        """c_skip, c_out and c_in."""
        variance, c_in = sigma**2 + self.sigma_data**2, (sigma**2 + self.sigma_data**2) ** -0.5
        return self.sigma_data**2 / variance, sigma * self.sigma_data * c_in, c_in

    def inputs(self, x: Tensor, level: Level, guide: Tensor | None = None) -> Tensor:
        return self.coefficients(level.sigma)[2] * x if self.preconditioned else super().inputs(x, level)

    def to_estimate(self, out: Tensor, x: Tensor, level: Level) -> Estimate:
        if not self.preconditioned:
            return super().to_estimate(out, x, level)
        c_skip, c_out, _ = self.coefficients(level.sigma)
        x0 = c_skip * x + c_out * out
        return Estimate(x0, (x - x0) / level.sigma)

    # ---- training

    def fit(self, batches: Iterable[Batch]) -> None:
        batches = iter(batches)
        first = list(islice(batches, MEASURED_BATCHES))
        if self.measured:
            std = float(torch.cat([batch.x for batch in first]).std())
            self.sigma_data.fill_(ranks.agree(max(std, 0.01)))
        super().fit(chain(first, batches))

    def target(self, x: Tensor, eps: Tensor, level: Level) -> Tensor:
        """The F for which D = x_0 (eq. 8): (x_0 − c_skip (x_0 + σ ε)) / c_out."""
        if not self.preconditioned:
            return super().target(x, eps, level)
        c_in = self.coefficients(level.sigma)[2]
        return c_in * (level.sigma / self.sigma_data * x - self.sigma_data * eps)

    def image_weight(self, level: Level) -> Tensor:
        if not self.preconditioned:
            return super().image_weight(level)
        return (self.coefficients(level.sigma)[1] ** -2).view(-1)

    def objective(self, out: Tensor, target: Tensor, level: Level) -> dict[str, Tensor]:
        if not self.karras:
            return super().objective(out, target, level)
        c_out = self.coefficients(level.sigma)[1]
        bound = self.bound if self.training else math.inf
        weight = (bound * c_out**2).clamp(max=1)  # λ c_out²; below 1 if λ is bounded
        errors = weight * LOSSES[self.loss_type](out, target, reduction="none")
        if self.uncertainty is None:
            return {"loss": errors.mean()}
        error = errors.flatten(1).mean(1)
        u = self.uncertainty(self.time_input(level.t))
        return {"loss": (error / u.exp() + u).mean(), "unweighted": error.detach().mean()}

    def on_step(self, step: int) -> None:
        """Sets the bound of λ for the next step."""
        share = (step + 1) / self.warmup if self.warmup else 1.0
        self.bound = FIRST_BOUND * GROWTH**share if share < 1 else math.inf
