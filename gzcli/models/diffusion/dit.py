"""Scalable diffusion models with transformers — Peebles & Xie 2023, arXiv:2212.09748."""

from __future__ import annotations

from typing import ClassVar

from gzcli.core.types import DataInfo
from gzcli.models.diffusion.ddpm import DDPM, DiffusionOptions
from gzcli.models.labelled import ClusterOptions
from gzcli.models.nn.nets import NetOptions


class DiT(DDPM):
    """A transformer over patches on the process of `ddpm`."""

    paper = "Peebles & Xie 2023, arXiv:2212.09748"
    shares: ClassVar[bool] = True

    def __init__(
        self,
        data: DataInfo,
        *,
        net: NetOptions = NetOptions(net="dit"),
        process: DiffusionOptions = DiffusionOptions(),
        labels: ClusterOptions = ClusterOptions(conditional=True),
    ):
        super().__init__(data, net=net, process=process, labels=labels)
