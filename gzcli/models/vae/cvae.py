"""Conditional VAE — Sohn, Lee & Yan 2015, "Learning Structured Output Representation using Deep Conditional
Generative Models":

    log p(x | y) ≥ E_q(z|x,y) [log p(x | z, y)] − KL(q(z | x, y) ‖ p(z))                                 (eq.
    4)

with x and y in the roles of the paper's output and input. p(z | y) = N(0, I): the paper's learned Gaussian of
each label is the same model, with the affine map that makes it of N(0, I) in the decoder, which knows y.
"""

from __future__ import annotations

from typing import Literal

from gzcli.models.vae.vae import VAE
from gzcli.types import DataInfo


class CVAE(VAE):
    """A VAE whose encoder and decoder are told the label; the keys are those of `vae`.

    label_dim: size of a label's embedding. label_dropout: how often training hides it, for scores of images
    without labels.
    """

    paper = "Sohn 2015, NeurIPS 28"

    def __init__(
        self,
        data: DataInfo,
        *,
        net: Literal["mlp", "conv"] = "conv",
        hidden: tuple[int, ...] | None = None,
        blocks: int = 0,
        latent: int = 32,
        pixels: Literal["auto", "bernoulli", "gaussian", "logistic"] = "auto",
        recon: Literal["likelihood", "ms_ssim"] = "likelihood",
        beta: float = 1.0,
        kl_warmup: int = 0,
        iwae: int = 1,
        conditional: bool = True,
        label_dim: int = 32,
        label_dropout: float = 0.1,
    ):
        super().__init__(
            data,
            net=net,
            hidden=hidden,
            blocks=blocks,
            latent=latent,
            pixels=pixels,
            recon=recon,
            beta=beta,
            kl_warmup=kl_warmup,
            iwae=iwae,
            conditional=conditional,
            label_dim=label_dim,
            label_dropout=label_dropout,
        )
