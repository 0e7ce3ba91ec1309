"""Rectified flow — Liu et al. 2022, arXiv:2209.03003 — with the transformer and the times of Esser et al.
2024 (Stable Diffusion 3), arXiv:2403.03206. Its straightening is the second stage, reflow.py."""

from __future__ import annotations

from typing import Literal

from gzcli.models.flow_matching.applications import Applications
from gzcli.models.flow_matching.flow import Times
from gzcli.models.nn.dit import DiTNet
from gzcli.types import DataInfo


class RF(Applications):
    """A transformer over patches that tells the velocity, see flow.py for `time_sampling` and `coupling`.

    patch: side in pixels, a divisor of the image's; width: of `layers` blocks of `heads` attention heads.
    Raises UsageError for sizes that do not fit, and for a conditional model of data without labels.
    """

    paper = "Liu et al. 2022, arXiv:2209.03003"

    def __init__(
        self,
        data: DataInfo,
        *,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        patch: int = 2,
        time_sampling: Times = "logit_normal",
        coupling: Literal["independent", "ot"] = "independent",
        conditional: bool = False,
        label_dropout: float = 0.1,
    ):
        net = DiTNet(
            data.shape,
            width=width,
            layers=layers,
            heads=heads,
            patch=patch,
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
