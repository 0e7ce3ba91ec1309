"""Easy consistency tuning — Geng et al. 2024, "Consistency Models Made Easy", arXiv:2406.14548: a trained
denoiser becomes a consistency function f(x, σ), which maps every point of a path of the ODE to its image.

    x_t = x_0 + t ε,   x_r = x_0 + r ε,   r < t of the same image and noise
    E ‖f(x_t, t) − sg f(x_r, r)‖ / (t − r),   f(x, 0) = x                                  (eq. 7, 12)
    1 − r/t = q^−(s + 1) n(t),   n(t) = 1 + 8 sigmoid(−t),   at r = 0 if that is above 1    (eq. 14)

The stages s = 0, 1, … bring r closer to t. σ is the noise-to-signal ratio of the teacher's process; f is
initialised as the teacher's estimate of x_0. Sampling takes one call, or several with noise added again in
between.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from gzcli.core.errors import UsageError
from gzcli.core.types import Batch, DataInfo, Noise, Progress, no_progress
from gzcli.core.units import Size
from gzcli.models.base import Model
from gzcli.models.denoising.denoiser import Denoiser, conditions_of
from gzcli.models.denoising.process import SIGMA_MAX, Level, normal_draws, per_image, stratified
from gzcli.models.denoising.samplers import Estimate
from gzcli.models.labelled import Guidance, LabelOptions
from gzcli.models.nn import at_least

LEAST = 0.005  # σ below which an image is clean
SMOOTH = 1e-3  # added under the root of ‖f(x_t, t) − f(x_r, r)‖ / (t − r), which has no gradient at 0
K = 8.0  # of n(t)
CELLS = 512  # cells of the table of times, equally spaced in ln σ


@dataclass(frozen=True)
class TuningOptions:
    """How a denoiser is tuned.

    log_mean: mean of ln t.
    log_std: standard deviation of ln t.
    q: factor by which each stage brings r closer to t; above 1.
    stages: number of stages of equal length. In the last, 1 − r/t is between q^−stages and nine times that.
    tuned_guidance: guidance scale of the teacher that tuning learns. 1: no guidance. Default: the teacher's.
    """

    log_mean: float = -1.1
    log_std: float = 2.0
    q: float = 2.0
    stages: int = 8
    tuned_guidance: float | None = None


class ECT(Denoiser):
    """A consistency function tuned from a trained `teacher`, any ddpm, sgm, edm, fm or rf.

    Raises UsageError if the teacher is not a denoiser, or if only one of teacher and student is conditional.
    """

    paper = "Geng et al. 2024, arXiv:2406.14548"
    watched = None  # its loss compares it with itself
    teacher: Denoiser
    levels: Tensor  # [CELLS + 1, 2], the teacher's t and α from σ = LEAST to its largest, at most SIGMA_MAX

    def __init__(
        self,
        data: DataInfo,
        *,
        teacher: Model,
        tuning: TuningOptions = TuningOptions(),
        labels: LabelOptions = LabelOptions(label_dropout=0.0),
    ):
        if not isinstance(teacher, Denoiser):
            raise UsageError("the stage `teacher` is not a denoiser", hint="use a `ddpm`, `sgm` or `fm`")
        conditions = replace(conditions_of(teacher, labels), label_dropout=0.0)
        if tuning.q <= 1:
            raise UsageError(f"`model.q` must be above 1, not {tuning.q:g}")
        at_least(1, stages=tuning.stages)
        net = copy.deepcopy(teacher.get_submodule("net")).requires_grad_(True)
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # f(x_t, t) and f(x_r, r) would differ by their masks alone
        super().__init__(data, net, teacher.process, conditions)
        self.learn_from(teacher)
        self.bounded = teacher.bounded
        self.tuning, self.guidance = tuning, teacher.guidance_scale(tuning.tuned_guidance)
        top = teacher.process.ratio_level(SIGMA_MAX)
        self.sigma_max = top.sigma / top.alpha
        levels = map(teacher.process.ratio_level, np.geomspace(LEAST, self.sigma_max, CELLS + 1).tolist())
        table = torch.tensor([[level.t, level.alpha] for level in levels], device="cpu")
        self.register_buffer("levels", table, persistent=False)
        self.on_step(-1)

    def fit(self, batches: Iterable[Batch]) -> None:
        """Does nothing, because the clusters are the teacher's."""

    # ---- the function

    def inputs(self, x: Tensor, level: Level, guide: Tensor | None = None) -> Tensor:
        return self.teacher.inputs(x, level, guide)

    def to_estimate(self, out: Tensor, x: Tensor, level: Level) -> Estimate:
        return self.teacher.to_estimate(out, x, level)

    def target(self, x: Tensor, eps: Tensor, level: Level) -> Tensor:
        return self.teacher.target(x, eps, level)

    def level_of(self, sigma: Tensor) -> Level:
        """The teacher's levels with noise-to-signal ratios sigma [B]."""
        place = (sigma / LEAST).log() * (CELLS / math.log(self.sigma_max / LEAST))
        k = place.long().clamp(0, CELLS - 1)
        t, alpha = torch.lerp(self.levels[k], self.levels[k + 1], (place - k)[:, None].to(self.levels)).T
        return Level(t, per_image(alpha), per_image(alpha * sigma))

    def consistent(self, x: Tensor, sigma: Tensor, y: Tensor | None) -> Tensor:
        """f(x, σ) for x = x_0 + σ ε, with sigma [B] at least LEAST."""
        level = self.level_of(sigma)
        return self.estimate(level.alpha * x, level, y).x0

    # ---- training

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        eps, y = batch.noise.randn(*batch.x.shape), self.condition(batch)
        z = normal_draws(stratified(batch.noise.rand(len(batch)), batch.noise))
        t = (self.tuning.log_mean + self.tuning.log_std * z).exp()
        t = t.clamp(2 * LEAST, self.sigma_max)
        r = t * (1 - self.gap * (1 + K * (-t).sigmoid()))
        r = torch.where(r < LEAST, 0.0, r)
        x_t = batch.x + per_image(t) * eps
        with torch.no_grad():
            x_r = x_t + per_image(r - t) * self.guided(eps, x_t, t, y)
            target = torch.where(per_image(r) > 0, self.consistent(x_r, r.clamp(min=LEAST), y), x_r)
        slope = (self.consistent(x_t, t, y) - target) / per_image(t - r)
        return {"loss": (slope.square().flatten(1).mean(1) + SMOOTH**2).sqrt().mean()}

    def guided(self, eps: Tensor, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """ε + (w − 1) (ε − ε̂), with the teacher's ε̂ without labels: given x_t its mean is the guided ε."""
        if self.guidance == 1:
            return eps
        self.teacher.check_guidance(self.guidance, y)
        level = self.level_of(t)
        unguided = self.teacher.estimate(level.alpha * x_t, level).eps
        return torch.lerp(unguided, eps, self.guidance)

    def on_step(self, step: int) -> None:
        """Sets 1 − r/t at large t for the stage of the next step."""
        stage = (step + 1) * self.tuning.stages // max(self.data.steps, 1)
        self.gap = self.tuning.q ** -(min(stage, self.tuning.stages - 1) + 1)

    # ---- sampling

    def guidance_scale(self, guidance: Guidance) -> float:
        """Always 1, because the paths are guided already."""
        return 1.0

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress = no_progress,
        steps: int = 2,
        sigma_last: float = 0.8,
        size: Size | None = None,
    ) -> Tensor:
        """n images [n, C, H, W] in [-1, 1].

        steps: network calls. Before each except the first, noise is added to the image.
        sigma_last: σ of the last call. Levels between the first and the last are uniform in ln σ.
        size: image size in pixels, if the network supports other sizes. Default: the size of the training
          images.
        """
        at_least(1, steps=steps)
        shape, y = self.shape_of(size), self.draw_labels(labels, n, noise)
        x = torch.zeros(n, *shape, device=self.device)
        for i, sigma in enumerate(np.geomspace(self.sigma_max, sigma_last, steps).tolist()):
            x_t = x + sigma * noise.randn(n, *shape)
            x = self.into_range(self.consistent(x_t, x_t.new_full((n,), sigma), y))
            progress(i + 1, steps, x)
        return x
