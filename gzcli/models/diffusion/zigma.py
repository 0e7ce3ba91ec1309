"""ZigMa, a DiT-style zigzag Mamba diffusion model — Hu et al. 2024, arXiv:2403.13802 — trained as the paper
does, by a stochastic interpolant with the linear path from noise to data: the velocity of
flow_matching/flow.py."""

from __future__ import annotations

from typing import Literal

from gzcli.models.diffusion.zigzag import ZigzagNet
from gzcli.models.flow_matching.applications import Applications
from gzcli.models.flow_matching.flow import Times
from gzcli.types import DataInfo


class ZigMa(Applications):
    """State-space blocks over patches that tell the velocity, see flow.py for `time_sampling` and `coupling`.

    patch: side in pixels, a divisor of the image's; width: of `layers` blocks, each `expand` times as wide
    inside, with
    `state` numbers of memory a channel. Cost is linear in the number of patches. Raises UsageError for sizes
    that do not fit, and for a conditional model of data without labels.
    """

    paper = "Hu et al. 2024, arXiv:2403.13802"

    def __init__(
        self,
        data: DataInfo,
        *,
        width: int = 128,
        layers: int = 8,
        patch: int = 2,
        expand: int = 2,
        state: int = 16,
        time_sampling: Times = "logit_normal",
        coupling: Literal["independent", "ot"] = "independent",
        conditional: bool = False,
        label_dropout: float = 0.1,
    ):
        net = ZigzagNet(
            data.shape,
            width=width,
            layers=layers,
            patch=patch,
            expand=expand,
            state=state,
            classes=len(data.classes) if conditional else 0,
        )
        super().__init__(
            data,
            net,
            sigma_min=0.0,
            time_sampling=time_sampling,
            coupling=coupling,
            conditional=conditional,
            label_dropout=label_dropout,
        )
