"""Reflow — Liu et al. 2022, arXiv:2209.03003, section 2.2: a flow that is trained on a teacher's pairs of
noise and image is straighter than the teacher and needs fewer steps."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor

from gzcli.core.errors import UsageError
from gzcli.core.hints import advice, setting
from gzcli.core.types import Batch, DataInfo
from gzcli.models.base import Model
from gzcli.models.denoising.denoiser import TimeOptions, conditions_of
from gzcli.models.denoising.process import CondOT
from gzcli.models.denoising.samplers import Solver, solve
from gzcli.models.flow_matching.average_velocity import AverageVelocity
from gzcli.models.flow_matching.fm import FlowMatching, FlowOptions
from gzcli.models.labelled import Guidance, LabelOptions


class Reflow(FlowMatching):
    """A flow that starts from the weights of a flow-matching `teacher` and learns straight paths between the
    teacher's pairs. `prepare` generates these once; they arrive in `batch.extra`.

    Times are shifted like the teacher's. Raises UsageError if the teacher is not a flow, or if only one of
    teacher and student is conditional.

    pairs: number of generated pairs of noise and image for each training image, with its label. Each step
      uses one at random. With few images, use more than one, or the model memorizes it (Liu 2022 uses 80 for
      CIFAR-10).
    pair_solver: solver of the teacher's ODE, see `sample`.
    pair_steps: steps of `pair_solver`.
    pair_guidance: guidance scale of the pairs. 1: no guidance. Default: the teacher's.
    """

    paper = "Liu et al. 2022, arXiv:2209.03003"
    teacher: FlowMatching

    def __init__(
        self,
        data: DataInfo,
        *,
        teacher: Model,
        pairs: int = 1,
        pair_solver: Solver = "midpoint",
        pair_steps: int = 20,
        pair_guidance: float | None = None,
        times: TimeOptions = TimeOptions(),
        labels: LabelOptions = LabelOptions(),
    ):
        if pairs < 1:
            raise UsageError("`model.pairs`, the number of pairs per training image, must be at least 1")
        if not isinstance(teacher, FlowMatching) or isinstance(teacher, AverageVelocity):
            raise UsageError("the stage `teacher` is not a flow", hint="use an `rf` or an `fm`")
        conditions = conditions_of(teacher, labels)
        net = copy.deepcopy(teacher.get_submodule("net")).requires_grad_(True)
        if not isinstance(teacher.process, CondOT):
            hint = advice("train it with {}", setting("model.process", "straight"))
            raise UsageError("the stage `teacher` is a flow on curved paths", hint=hint)
        shift = teacher.process.shift
        flow = FlowOptions(prediction=teacher.prediction, bounded=teacher.bounded, shift=shift)
        super().__init__(data, net, flow, conditions)
        self.draw_by(times)
        self.learn_from(teacher)
        self.pairs_each, self.pair_solver, self.pair_steps = pairs, pair_solver, pair_steps
        self.pair_guidance = teacher.guidance_scale(pair_guidance)

    def fit(self, batches: Iterable[Batch]) -> None:
        """Does nothing, because the clusters are the teacher's."""

    def guidance_scale(self, guidance: Guidance) -> float:
        """By default 1, because the pairs are guided already."""
        return 1.0 if guidance is None or guidance == "auto" else guidance

    @torch.no_grad()
    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """Noise, and the images that the teacher generates from it given the labels of the batch: both [B, C,
        H, W], or [B, pairs, C, H, W] for several pairs. With clusters, also the clusters of the training
        images, [B]. Half precision suffices: its error, 1/2000, is small compared with the distance of grey
        levels, 1/128."""
        y = super().condition(batch)
        f, times = self.teacher.velocity(y, self.pair_guidance), self.process.ode_times(self.pair_steps)
        noises, images = [], []
        for _ in range(self.pairs_each):
            noises.append(batch.noise.randn(*batch.x.shape).half())
            images.append(solve(f, noises[-1].to(batch.x), times, self.pair_solver).half())
        pairs = {"noise": torch.stack(noises, 1).squeeze(1), "image": torch.stack(images, 1).squeeze(1)}
        return pairs if y is None or self.clusters is None else pairs | {"cluster": y}

    def condition(self, batch: Batch) -> Tensor | None:
        """The labels of training images, or the clusters of their pairs."""
        return super().condition(batch) if self.clusters is None else batch.extra["cluster"].long()

    def noise_and_images(self, batch: Batch) -> tuple[Tensor, Tensor]:
        noise, image = batch.extra["noise"], batch.extra["image"]
        if self.pairs_each > 1:
            rows = torch.arange(len(batch), device=batch.x.device)
            pair = batch.noise.randint(self.pairs_each, len(batch))
            noise, image = noise[rows, pair], image[rows, pair]
        return noise.to(batch.x), image.to(batch.x)
