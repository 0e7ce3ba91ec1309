"""Conditional VAE — Sohn, Lee & Yan 2015, "Learning Structured Output Representation using Deep Conditional
Generative Models":

    log p(x | y) ≥ E_q(z|x,y) [log p(x | z, y)] − KL(q(z | x, y) ‖ p(z))          (eq. 4)

x and y are the paper's output and input. p(z | y) is N(0, I). The paper's learned Gaussian for each label is
the same model, because the decoder knows y and can map N(0, I) to that Gaussian by an affine map.
"""

from __future__ import annotations

from gzcli.core.types import DataInfo
from gzcli.models.labelled import LabelOptions
from gzcli.models.vae.base import NetOptions
from gzcli.models.vae.vae import VAE, VAEOptions


class CVAE(VAE):
    """A VAE with encoder and decoder conditioned on the label. The keys are those of `vae`."""

    paper = "Sohn 2015, NeurIPS 28"

    def __init__(
        self,
        data: DataInfo,
        *,
        nets: NetOptions = NetOptions(),
        options: VAEOptions = VAEOptions(),
        labels: LabelOptions = LabelOptions(conditional=True),
    ):
        super().__init__(data, nets, options, labels)
