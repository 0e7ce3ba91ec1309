"""Conditional flow matching — Tong et al. 2023, "Improving and generalizing flow-based generative models with
minibatch optimal transport", arXiv:2302.00482 — told the class, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from gzcli.models.flow_matching.flow import SCALE, Times
from gzcli.models.flow_matching.fm import FM
from gzcli.models.nn import spread_labels, to_fp32
from gzcli.types import Batch, DataInfo, Noise

FEW = 200  # images of a classification


class CFM(FM):
    """`fm` that knows the label; the keys are its. `coupling: ot` is the paper's OT-CFM."""

    paper = "Tong et al. 2023, arXiv:2302.00482"

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
        conditional: bool = True,
        label_dropout: float = 0.1,
    ):
        super().__init__(
            data,
            channels=channels,
            mult=mult,
            layers=layers,
            attention=attention,
            head_dim=head_dim,
            dropout=dropout,
            groups=groups,
            sigma_min=sigma_min,
            time_sampling=time_sampling,
            coupling=coupling,
            conditional=conditional,
            label_dropout=label_dropout,
        )

    @torch.no_grad()
    def class_errors(self, x: Tensor, noise: Noise, times: int = 4) -> Tensor:
        """[B, K]: the velocity's error given each class, at `times` times and with the same noise for every
        class, which makes a classifier of it (Li 2023, "Your Diffusion Model is Secretly a Zero-Shot
        Classifier", arXiv:2303.16203)."""
        classes, errors = spread_labels(None, len(self.data.classes), self.data, x.device), 0.0
        for i in range(times):
            t = x.new_full((len(x),), (i + 0.5) / times)
            x0 = noise.randn(*x.shape).to(x)
            x_t, target = self.between(x0, x, t), x - (1 - self.sigma_min) * x0
            guesses = (to_fp32(self.net(x_t, SCALE * t, y.expand(len(x), *y.shape))) for y in classes)
            errors = (
                errors + torch.stack([(v - target).square().flatten(1).mean(1) for v in guesses], 1) / times
            )
        return errors

    def measure(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The `accuracy` of its classification of the first 200 images; none without labels of one class
        each."""
        if not self.conditional or self.data.multilabel:
            return {}
        right, n = 0, 0
        for batch in batches:
            if n < FEW:
                right += int((self.class_errors(batch.x, batch.noise).argmin(1) == batch.y).sum())
                n += len(batch)
        return {"accuracy": right / n}
