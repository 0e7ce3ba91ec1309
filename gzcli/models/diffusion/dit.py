"""Scalable diffusion models with transformers — Peebles & Xie 2023, arXiv:2212.09748."""

from __future__ import annotations

from typing import Any, Literal

from gzcli.models.diffusion.applications import Applications
from gzcli.models.nn.dit import DiTNet
from gzcli.types import DataInfo


class DiT(Applications):
    """A transformer over patches, in the process that process.py describes, with its variances; the paper
    learns them.

    patch: side in pixels, a divisor of the image's; width: of `layers` blocks of `heads` attention heads.
    Raises UsageError for sizes that do not fit, and for a conditional model of data without labels.
    """

    paper = "Peebles & Xie 2023, arXiv:2212.09748"

    def __init__(
        self,
        data: DataInfo,
        *,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        patch: int = 2,
        timesteps: int = 1000,
        schedule: Literal["linear", "cosine"] = "cosine",
        zero_snr: bool = False,
        prediction: Literal["eps", "x0", "v"] = "v",
        loss_type: Literal["l2", "l1", "huber"] = "l2",
        min_snr: float | None = None,
        time_sampling: Literal["uniform", "stratified"] = "stratified",
        conditional: bool = True,
        label_dropout: float = 0.1,
    ):
        net = DiTNet(
            data.shape,
            width=width,
            layers=layers,
            heads=heads,
            patch=patch,
            classes=len(data.classes) if conditional else 0,
            freq_shift=1.0,  # as diffusers has it
        )
        super().__init__(
            data,
            net,
            timesteps=timesteps,
            schedule=schedule,
            zero_snr=zero_snr,
            prediction=prediction,
            loss_type=loss_type,
            min_snr=min_snr,
            time_sampling=time_sampling,
            conditional=conditional,
            label_dropout=label_dropout,
        )

    def to_diffusers(self) -> Any:
        """A `DiTPipeline` of the same weights and schedule, for its parts: without an autoencoder it draws no
        pictures."""
        from diffusers import DiTPipeline

        pipeline = DiTPipeline(transformer=self.net.to_diffusers(), vae=None, scheduler=self.to_scheduler())
        pipeline.usage = (
            "`pipeline.transformer(x, timestep=t, class_labels=y)` and `pipeline.scheduler`: without an "
            "autoencoder the pipeline "
            "itself draws no pictures"
        )
        return pipeline
