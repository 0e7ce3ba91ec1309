"""ZigMa, a DiT-style zigzag Mamba diffusion model — Hu et al. 2024, arXiv:2403.13802.

As in the paper it is trained by a stochastic interpolant with the linear path from noise to data, which is
the flow matching of denoising/flow.py.
"""

from __future__ import annotations

from gzcli.core.types import DataInfo
from gzcli.models.denoising.flow import FlowOptions
from gzcli.models.denoising.flow_applications import FlowApplications
from gzcli.models.flow_matching.zigzag import ZigzagNet, ZigzagOptions
from gzcli.models.labelled import ClusterOptions


class ZigMa(FlowApplications):
    """State-space blocks over patches that predict the velocity, at a cost linear in the number of patches.

    Raises UsageError for sizes that do not fit, and for a conditional model of data without labels.
    """

    paper = "Hu et al. 2024, arXiv:2403.13802"

    def __init__(
        self,
        data: DataInfo,
        *,
        zigzag: ZigzagOptions = ZigzagOptions(),
        flow: FlowOptions = FlowOptions(),
        labels: ClusterOptions = ClusterOptions(),
    ):
        net = ZigzagNet(data.shape, zigzag, classes=labels.count(data))
        super().__init__(data, net, flow, labels)
