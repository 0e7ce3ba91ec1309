"""Reflow — Liu et al. 2022, arXiv:2209.03003, section 2.2: a flow trained anew on the pairs of noise and image that another
one makes is straighter, and so needs few steps."""

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
    """A flow that starts as the trained `teacher`, of any flow-matching model, and learns straight lines between its pairs.

    The pairs, one for each training image and of its label, are made once (`prepare`), by pair_steps of pair_solver with
    pair_guidance, and arrive as `batch.extra`. conditional: as the teacher is, else UsageError. time_sampling: see flow.py.
    """

    paper = "Liu et al. 2022, arXiv:2209.03003"

    def __init__(
        self,
        data: DataInfo,
        *,
        teacher: Model,
        pair_solver: Solver = "midpoint",
        pair_steps: int = 20,
        pair_guidance: float = 1.0,
        time_sampling: Times = "stratified",
        conditional: bool = False,
        label_dropout: float = 0.1,
    ):
        if conditional != teacher.conditional:
            said = str(teacher.conditional).lower()
            raise UsageError(f"the teacher's `model.conditional` is {said}, and the student's is not", hint="set both alike")
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
        self.pair_solver, self.pair_steps, self.pair_guidance = pair_solver, pair_steps, pair_guidance

    @torch.no_grad()
    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """Noise, and the image that the teacher makes of it, given the label of each image of a batch.

        In half precision: an error of 1/2000 beside grey levels of 1/128, at half the room on disk.
        """
        f = self.teacher.velocity(batch.y if self.conditional else None, self.pair_guidance)
        x0 = batch.noise.randn(*batch.x.shape).to(batch.x).half()
        x1 = self.flow(f, x0.to(batch.x), 0.0, 1.0, solver=self.pair_solver, steps=self.pair_steps)
        return {"noise": x0, "image": x1.half()}

    def pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.extra["noise"].to(batch.x), batch.extra["image"].to(batch.x)
