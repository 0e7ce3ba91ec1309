"""Class-conditional DDPM with classifier-free guidance — Ho & Salimans 2022, arXiv:2207.12598."""

from __future__ import annotations

from gzcli.core.types import DataInfo
from gzcli.models.diffusion.ddpm import DDPM, DiffusionOptions
from gzcli.models.labelled import ClusterOptions
from gzcli.models.nn.nets import NetOptions


class CDDPM(DDPM):
    """`ddpm` conditioned on the label. The keys are those of `ddpm`."""

    paper = "Ho & Salimans 2022, arXiv:2207.12598"

    def __init__(
        self,
        data: DataInfo,
        *,
        net: NetOptions = NetOptions(),
        process: DiffusionOptions = DiffusionOptions(),
        labels: ClusterOptions = ClusterOptions(conditional=True),
        factor: int | None = None,
    ):
        super().__init__(data, net=net, process=process, labels=labels, factor=factor)
