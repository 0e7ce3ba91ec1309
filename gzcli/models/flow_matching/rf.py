"""Rectified flow — Liu et al. 2022, arXiv:2209.03003 — with the transformer and the times of Esser et al.
2024 (Stable Diffusion 3), arXiv:2403.03206. A second stage, reflow.py, straightens the flow."""

from __future__ import annotations

from typing import ClassVar

from gzcli.core.types import DataInfo
from gzcli.models.flow_matching.fm import FM, FlowOptions
from gzcli.models.labelled import ClusterOptions
from gzcli.models.nn.nets import NetOptions


class RF(FM):
    """A transformer over patches that predicts the velocity."""

    paper = "Liu et al. 2022, arXiv:2209.03003"
    shares: ClassVar[bool] = True

    def __init__(
        self,
        data: DataInfo,
        *,
        net: NetOptions = NetOptions(net="dit"),
        flow: FlowOptions = FlowOptions(),
        labels: ClusterOptions = ClusterOptions(),
    ):
        super().__init__(data, net=net, flow=flow, labels=labels)
