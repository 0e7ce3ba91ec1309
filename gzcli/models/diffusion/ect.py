"""Easy consistency tuning — Geng et al. 2024, "Consistency Models Made Easy", arXiv:2406.14548: a trained
denoiser becomes a consistency function f(x, σ), which maps every point of a path of the ODE to its image.

    f(x, 0) = x,   f(x_t, t) = f(x_r, r) for two points of a path, r < t

The loss is that of `denoising.consistency`. σ is the noise-to-signal ratio of the teacher's process; f is
initialised as the teacher's estimate of x_0. Sampling takes one call, or several with noise added again in
between.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from gzcli.core.errors import UsageError
from gzcli.core.types import Batch, DataInfo, Noise, Progress, no_progress
from gzcli.core.units import Size
from gzcli.models.base import Model
from gzcli.models.denoising.consistency import ConsistencyFunction, ConsistencyOptions
from gzcli.models.denoising.denoiser import Denoiser, conditions_of
from gzcli.models.denoising.process import Level
from gzcli.models.denoising.samplers import Estimate
from gzcli.models.labelled import LabelOptions
from gzcli.models.nn import at_least

CLEAN_SIGMA = 0.005  # σ below which an image is clean


@dataclass(frozen=True)
class TuningOptions(ConsistencyOptions):
    """How a denoiser is tuned.

    tuned_guidance: guidance scale of the teacher that tuning learns. 1: no guidance. Default: the teacher's.
    """

    tuned_guidance: float | None = None


class ECT(ConsistencyFunction):
    """A consistency function tuned from a trained `teacher`, any ddpm, sgm, edm, fm or rf.

    Raises UsageError if the teacher is not a denoiser, or if only one of teacher and student is conditional.
    """

    paper = "Geng et al. 2024, arXiv:2406.14548"
    teacher: Denoiser

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
        net = copy.deepcopy(teacher.get_submodule("net")).requires_grad_(True)
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # f(x_t, t) and f(x_r, r) would differ by their masks alone
        super().__init__(data, net, teacher.process, conditions, tuning, CLEAN_SIGMA)
        self.learn_from(teacher)
        self.bounded, self.guidance = teacher.bounded, teacher.guidance_scale(tuning.tuned_guidance)

    def fit(self, batches: Iterable[Batch]) -> None:
        """Does nothing, because the clusters are the teacher's."""

    # ---- the function

    def inputs(self, x: Tensor, level: Level, guide: Tensor | None = None) -> Tensor:
        return self.teacher.inputs(x, level, guide)

    def to_estimate(self, out: Tensor, x: Tensor, level: Level) -> Estimate:
        return self.teacher.to_estimate(out, x, level)

    def target(self, x: Tensor, eps: Tensor, level: Level) -> Tensor:
        return self.teacher.target(x, eps, level)

    # ---- training

    def guided(self, eps: Tensor, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """ε + (w − 1) (ε − ε̂), with the teacher's ε̂ without labels: given x_t its mean is the guided ε."""
        if self.guidance == 1:
            return eps
        self.teacher.check_guidance(self.guidance, y)
        level = self.level_of(t)
        unguided = self.teacher.estimate(level.alpha * x_t, level).eps
        return torch.lerp(unguided, eps, self.guidance)

    # ---- sampling

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
