"""Conditional flow matching — Tong et al. 2023, "Improving and generalizing flow-based generative models with
minibatch optimal transport", arXiv:2302.00482 — given the class, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gzcli.models.denoising.flow import SCALE, FlowOptions
from gzcli.models.denoising.guided import LabelOptions
from gzcli.models.flow_matching.fm import FM
from gzcli.models.nn import spread_labels, to_fp32
from gzcli.models.nn.unet_sizes import UNetOptions
from gzcli.types import Batch, DataInfo, Noise

FEW = 200  # images that `measure` classifies


class CFM(FM):
    """`fm` conditioned on the label. The keys are those of `fm`; `coupling: ot` is the paper's OT-CFM."""

    paper = "Tong et al. 2023, arXiv:2302.00482"

    def __init__(
        self,
        data: DataInfo,
        *,
        unet: UNetOptions = UNetOptions(),
        sigma_min: float = 0.0,
        flow: FlowOptions = FlowOptions(),
        labels: LabelOptions = LabelOptions(conditional=True),
    ):
        super().__init__(data, unet=unet, sigma_min=sigma_min, flow=flow, labels=labels)

    @torch.no_grad()
    def class_errors(self, x: Tensor, noise: Noise, times: int = 4) -> Tensor:
        """[B, K]: the error of the velocity given each class, at `times` times and with the same noise for
        every class. The class of the least error is the model's classification (Li 2023, "Your Diffusion
        Model is Secretly a Zero-Shot Classifier", arXiv:2303.16203)."""
        classes = spread_labels(None, len(self.data.classes), self.data, x.device)
        errors = x.new_zeros(len(x), len(classes))
        for i in range(times):
            t = x.new_full((len(x),), (i + 0.5) / times)
            x0 = noise.randn(*x.shape)
            x_t, target = self.between(x0, x, t), x - (1 - self.sigma_min) * x0
            guesses = (to_fp32(self.net(x_t, SCALE * t, y.expand(len(x), *y.shape))) for y in classes)
            found = torch.stack([(v - target).square().flatten(1).mean(1) for v in guesses], 1)
            errors = errors + found / times
        return errors

    def measure(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The `accuracy` of the model as a classifier of the first 200 images; nothing for an unconditional
        model and for multi-label data."""
        if not self.conditional or self.data.multilabel:
            return {}
        right, n = 0, 0
        for batch in batches:
            if n < FEW and batch.y is not None:
                right += int((self.class_errors(batch.x, batch.noise).argmin(1) == batch.y).sum())
                n += len(batch)
        return {"accuracy": right / n}
