"""Flow matching with straight conditional paths (CondOT) — Lipman et al. 2022, arXiv:2210.02747, section
4.1."""

from __future__ import annotations

from gzcli.core.types import DataInfo
from gzcli.models.denoising.flow import FlowOptions
from gzcli.models.denoising.flow_applications import FlowApplications
from gzcli.models.labelled import ClusterOptions
from gzcli.models.nn.unet import UNet
from gzcli.models.nn.unet_sizes import UNetOptions


class FM(FlowApplications):
    """A U-Net that predicts the velocity of denoising/flow.py.

    sigma_min: standard deviation of the noise that is left at t = 1, for images in [-1, 1].
    """

    paper = "Lipman et al. 2022, arXiv:2210.02747"

    def __init__(
        self,
        data: DataInfo,
        *,
        unet: UNetOptions = UNetOptions(),
        sigma_min: float = 0.0,
        flow: FlowOptions = FlowOptions(),
        labels: ClusterOptions = ClusterOptions(),
    ):
        net = UNet.of(data, unet, classes=labels.count(data))
        super().__init__(data, net, flow, labels, sigma_min=sigma_min)
