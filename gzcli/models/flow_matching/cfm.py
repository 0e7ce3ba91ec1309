"""Conditional flow matching — Tong et al. 2023, "Improving and generalizing flow-based generative models with
minibatch optimal transport", arXiv:2302.00482 — given the class, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from gzcli.core.types import Batch, DataInfo
from gzcli.models.flow_matching.fm import FM, FlowOptions
from gzcli.models.labelled import ClusterOptions
from gzcli.models.nn.nets import NetOptions

CLASSIFIED_IMAGES = 200  # images that `measure` classifies


class CFM(FM):
    """`fm` conditioned on the label. The keys are those of `fm`; `coupling: ot` is the paper's OT-CFM."""

    paper = "Tong et al. 2023, arXiv:2302.00482"

    def __init__(
        self,
        data: DataInfo,
        *,
        net: NetOptions = NetOptions(),
        sigma_min: float = 0.0,
        flow: FlowOptions = FlowOptions(),
        labels: ClusterOptions = ClusterOptions(conditional=True),
    ):
        super().__init__(data, net=net, sigma_min=sigma_min, flow=flow, labels=labels)

    @torch.no_grad()
    def measure(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The `accuracy` of the model as a classifier of the first images; nothing for an unconditional model
        and for multi-label data."""
        if not self.conditional or self.data.multilabel:
            return {}
        correct, n = 0, 0
        for batch in batches:
            if n < CLASSIFIED_IMAGES and batch.y is not None:
                correct += int((self.class_errors(batch.x, batch.noise).argmin(1) == batch.y).sum())
                n += len(batch)
        return {"accuracy": correct / n}
