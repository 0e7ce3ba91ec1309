"""Conditional GAN — Mirza & Osindero 2014, arXiv:1411.1784, eq. 2: generator and discriminator are told the
label."""

from __future__ import annotations

from typing import Literal

from gzcli.models.gan.base import GAN
from gzcli.models.gan.losses import Objective
from gzcli.models.gan.nets import Critic, Generator, Norm
from gzcli.types import DataInfo


class CGAN(GAN):
    """A convolutional GAN that makes images of the class that it is asked for.

    label_as: how the discriminator is told them, as a `channel` of its input (after the paper) or by
    `projection` (Miyato 2018, arXiv:1802.05637); the generator has an embedding beside z. The other keys are
    those of `dcgan`.
    """

    paper = "Mirza & Osindero 2014, arXiv:1411.1784"

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
        label_as: Literal["channel", "projection"] = "channel",
        objective: Objective = "hinge",
        n_critic: int = 1,
        penalty: float = 0.0,
        r1: float = 0.0,
        r1_every: int = 16,
        augment: tuple[str, ...] = (),
        conditional: bool = True,
    ):
        classes = len(data.classes) if conditional else 0
        super().__init__(
            data,
            Generator(data.shape, latent, width, norm, classes),
            Critic(
                data.shape, width, classes, kernel=kernel, norm=disc_norm, spectral=spectral, labels=label_as
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
