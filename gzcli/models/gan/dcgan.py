"""DCGAN — Radford, Metz & Chintala 2015, arXiv:1511.06434: strided convolutions both ways, and no pooling or
dense layers between them. Its tools are the paper's and what made such nets train reliably since: objectives,
spectral norm, R1."""

from __future__ import annotations

from gzcli.models.gan.base import GAN
from gzcli.models.gan.losses import Objective
from gzcli.models.gan.nets import Critic, Generator, Norm
from gzcli.types import DataInfo


class DCGAN(GAN):
    """A convolutional GAN; the paper's own has `norm` and `disc_norm` batch, `spectral` false, `kernel` 4.

    width: channels of the finest scale of both nets, doubled at each coarser one. norm, disc_norm: the
    generator's and the discriminator's. kernel: of the discriminator's convolutions. objective: see
    losses.py. n_critic: discriminator updates per generator update. penalty: of WGAN-GP. r1: γ of the
    gradient penalty on real images, at every `r1_every`-th step.
    augment: `color`, `translation`, `cutout`: what the discriminator sees is changed at random, for sets of
    few images.
    conditional: labels enter the generator beside z, and the discriminator as a channel of its input.
    """

    paper = "Radford 2015, arXiv:1511.06434"

    def __init__(
        self,
        data: DataInfo,
        *,
        latent: int = 64,
        width: int = 32,
        norm: Norm = "batch",
        disc_norm: Norm = "none",
        kernel: int = 4,
        spectral: bool = True,
        objective: Objective = "hinge",
        n_critic: int = 1,
        penalty: float = 0.0,
        r1: float = 0.0,
        r1_every: int = 16,
        augment: tuple[str, ...] = (),
        conditional: bool = False,
    ):
        classes = len(data.classes) if conditional else 0
        super().__init__(
            data,
            Generator(data.shape, latent, width, norm, classes),
            Critic(
                data.shape, width, classes, kernel=kernel, norm=disc_norm, spectral=spectral, labels="channel"
            ),
            latent=latent,
            conditional=conditional,
            objective=objective,
            n_critic=n_critic,
            penalty=penalty,
            r1=r1,
            r1_every=r1_every,
            augment=augment,
        )
