"""Reflow — Liu et al. 2022, arXiv:2209.03003, section 2.2: a flow trained anew on the pairs of noise and
image that another one makes is straighter, and so needs few steps."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from gzcli.errors import UsageError
from gzcli.models.base import Model
from gzcli.models.flow_matching.applications import Applications
from gzcli.models.flow_matching.flow import Solver, Times
from gzcli.types import Batch, DataInfo


class Reflow(Applications):
    """A flow that starts as the trained `teacher`, of any flow-matching model, and learns straight lines
    between its pairs.

    Of the pairs there are `pairs` for each training image, of its label, of which a step takes one at random;
    they are made once (`prepare`), by pair_steps of pair_solver with pair_guidance, and arrive as
    `batch.extra`. A set of few images wants more than one, or the student learns its few pairs by heart (Liu
    2022 draws 4 million for CIFAR-10: 80 an image). conditional: as the teacher is, else UsageError.
    time_sampling: see flow.py.
    """

    paper = "Liu et al. 2022, arXiv:2209.03003"

    def __init__(
        self,
        data: DataInfo,
        *,
        teacher: Model,
        pairs: int = 1,
        pair_solver: Solver = "midpoint",
        pair_steps: int = 20,
        pair_guidance: float = 1.0,
        time_sampling: Times = "stratified",
        conditional: bool = False,
        label_dropout: float = 0.1,
    ):
        if pairs < 1:
            raise UsageError("`model.pairs` is the number of pairs a training image, 1 or more")
        if conditional != teacher.conditional:
            said = str(teacher.conditional).lower()
            raise UsageError(
                f"the teacher's `model.conditional` is {said}, and the student's is not",
                hint="set both alike",
            )
        super().__init__(
            data,
            copy.deepcopy(teacher.net).requires_grad_(True),
            sigma_min=0.0,
            time_sampling=time_sampling,
            coupling="independent",
            conditional=conditional,
            label_dropout=label_dropout,
        )
        self.attach("teacher", teacher)
        self.pairs_each = pairs
        self.pair_solver, self.pair_steps, self.pair_guidance = pair_solver, pair_steps, pair_guidance

    @torch.no_grad()
    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """Noise, and the image that the teacher makes of it, given the label of each image of a batch: [B, C,
        H, W], or [B, pairs, C, H, W] of several.

        In half precision: an error of 1/2000 beside grey levels of 1/128, at half the room on disk.
        """
        f = self.teacher.velocity(batch.y if self.conditional else None, self.pair_guidance)
        made = []
        for _ in range(self.pairs_each):
            x0 = batch.noise.randn(*batch.x.shape).to(batch.x).half()
            x1 = self.flow(f, x0.to(batch.x), 0.0, 1.0, solver=self.pair_solver, steps=self.pair_steps)
            made.append((x0, x1.half()))
        noise, image = (
            torch.stack(each, 1) if self.pairs_each > 1 else each[0] for each in zip(*made, strict=True)
        )
        return {"noise": noise, "image": image}

    def pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        both = batch.extra["noise"], batch.extra["image"]
        if self.pairs_each > 1:
            rows, which = torch.arange(len(batch)), batch.noise.randint(self.pairs_each, len(batch))
            both = [each[rows.to(each.device), which.to(each.device)] for each in both]
        noise, image = (each.to(batch.x) for each in both)
        return noise, image
