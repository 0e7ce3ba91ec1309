"""Conditional VAE — Sohn, Lee & Yan 2015, "Learning Structured Output Representation using Deep Conditional
Generative Models":

    log p(x | y) ≥ E_q(z|x,y) [log p(x | z, y)] − KL(q(z | x, y) ‖ p(z))          (eq. 4)

with x and y in the roles of the paper's output and input. p(z | y) = N(0, I): a learned Gaussian of each
label, as in the paper, is no other model, for the decoder, which is given y, can make it from N(0, I) by an
affine map.
"""

from __future__ import annotations

from gzcli.models.vae.base import HiddenLabelOptions
from gzcli.models.vae.nets import NetOptions
from gzcli.models.vae.vae import VAE, VAEOptions
from gzcli.types import DataInfo


class CVAE(VAE):
    """A VAE whose encoder and decoder are given the label. The keys are those of `vae`."""

    paper = "Sohn 2015, NeurIPS 28"

    def __init__(
        self,
        data: DataInfo,
        *,
        nets: NetOptions = NetOptions(),
        options: VAEOptions = VAEOptions(),
        labels: HiddenLabelOptions = HiddenLabelOptions(conditional=True),
    ):
        super().__init__(data, nets, options, labels)
