"""Flow matching with straight conditional paths (CondOT) — Lipman et al. 2022, arXiv:2210.02747, section
4.1."""

from __future__ import annotations

from typing import Literal

from gzcli.models.flow_matching.applications import Applications
from gzcli.models.flow_matching.flow import Times
from gzcli.models.nn import UNet
from gzcli.types import DataInfo


class FM(Applications):
    """A U-Net that tells the velocity, see flow.py for `sigma_min`, `time_sampling` and `coupling`.

    channels × mult: width of each level, of `layers` residual blocks; attention: the resolutions, in pixels,
    that have it beside the middle, with heads of `head_dim` channels (None: one head).
    """

    paper = "Lipman et al. 2022, arXiv:2210.02747"

    def __init__(
        self,
        data: DataInfo,
        *,
        channels: int = 32,
        mult: tuple[int, ...] = (1, 2, 2),
        layers: int = 1,
        attention: tuple[int, ...] = (7, 8),
        head_dim: int | None = None,
        dropout: float = 0.0,
        groups: int = 8,
        sigma_min: float = 0.0,
        time_sampling: Times = "logit_normal",
        coupling: Literal["independent", "ot"] = "independent",
        conditional: bool = False,
        label_dropout: float = 0.1,
    ):
        net = UNet.of(
            data,
            channels=channels,
            mult=mult,
            attention=attention,
            conditional=conditional,
            layers=layers,
            head_dim=head_dim,
            dropout=dropout,
            groups=groups,
        )
        super().__init__(
            data,
            net,
            sigma_min=sigma_min,
            time_sampling=time_sampling,
            coupling=coupling,
            conditional=conditional,
            label_dropout=label_dropout,
        )
