"""WGAN-GP — Gulrajani et al. 2017, "Improved Training of Wasserstein GANs", arXiv:1704.00028.

    critic:    max  E f(x) − E f(G(z)) − λ E (‖∇ f(x̂)‖ − 1)²,   x̂ uniform on the line from G(z) to x
    (eq. 3)
    generator: max  E f(G(z))

A step is a critic update on a fresh batch; every `n_critic`-th one is followed by a generator update. The
critic's output is unbounded (no sigmoid) and each image's own (no batch norm, which the penalty forbids:
section 4).
"""

from __future__ import annotations

from gzcli.models.gan.base import GAN
from gzcli.models.gan.nets import Critic, Generator, Norm
from gzcli.types import DataInfo


class WGAN(GAN):
    """A convolutional WGAN-GP.

    width: channels of the finest scale of both nets, doubled at each coarser one. norm: the generator's.
    n_critic: critic updates per generator update. penalty: λ.
    augment: `color`, `translation`, `cutout`: what the critic sees is changed at random, for sets of few
    images.
    conditional: labels enter the generator beside z, and the critic by projection.
    """

    paper = "Gulrajani 2017, arXiv:1704.00028"

    def __init__(
        self,
        data: DataInfo,
        *,
        latent: int = 64,
        width: int = 32,
        norm: Norm = "group",
        n_critic: int = 5,
        penalty: float = 10.0,
        augment: tuple[str, ...] = (),
        conditional: bool = False,
    ):
        classes = len(data.classes) if conditional else 0
        super().__init__(
            data,
            Generator(data.shape, latent, width, norm, classes),
            Critic(data.shape, width, classes),
            latent=latent,
            conditional=conditional,
            objective="wasserstein",
            n_critic=n_critic,
            penalty=penalty,
            augment=augment,
        )
