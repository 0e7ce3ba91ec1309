"""Scalable diffusion models with transformers — Peebles & Xie 2023, arXiv:2212.09748."""

from __future__ import annotations

from typing import Any, ClassVar

from gzcli.core.types import DataInfo
from gzcli.models.diffusion.ddpm import Diffusion, DiffusionOptions
from gzcli.models.labelled import ClusterOptions
from gzcli.models.nn.dit import DiTNet, DiTOptions


class DiT(Diffusion):
    """A transformer over patches as a `Diffusion`."""

    paper = "Peebles & Xie 2023, arXiv:2212.09748"
    shares: ClassVar[bool] = True
    net: DiTNet

    def __init__(
        self,
        data: DataInfo,
        *,
        dit: DiTOptions = DiTOptions(),
        process: DiffusionOptions = DiffusionOptions(),
        labels: ClusterOptions = ClusterOptions(conditional=True),
    ):
        classes, outputs = labels.kinds(data), process.outputs
        net = DiTNet(data.shape, dit, classes=classes, outputs=outputs, freq_shift=1.0)  # as in diffusers
        super().__init__(data, net, process, labels)

    def to_diffusers(self) -> Any:
        """A `DiTPipeline` with the same weights and schedule; only its parts can be used."""
        from diffusers import DiTPipeline

        net, scheduler = self.net.to_diffusers(), self.to_scheduler()
        pipeline: Any = DiTPipeline(transformer=net, vae=None, scheduler=scheduler)
        pipeline.usage = (
            "`pipeline.transformer(x, timestep=t, class_labels=y)` and `pipeline.scheduler`: without an "
            "autoencoder the pipeline itself draws no images"
        )
        return pipeline
