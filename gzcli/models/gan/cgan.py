"""Conditional GAN — Mirza & Osindero 2014, arXiv:1411.1784, eq. 2: generator and discriminator are
conditioned on the label."""

from __future__ import annotations

from gzcli.core.types import DataInfo
from gzcli.models.gan.base import GAN, GANOptions, GeneratorOptions, conv_nets
from gzcli.models.nn.adversarial import CriticOptions, LabelAs


class CGAN(GAN):
    """A convolutional GAN that generates images of a given class. The other keys are those of `dcgan`.

    label_as: how the discriminator receives the label: as a `channel` of its input (the paper), or by
      `projection` (Miyato 2018, arXiv:1802.05637). The generator always uses an embedding.
    conditional: whether both networks are conditioned on labels.
    """

    paper = "Mirza & Osindero 2014, arXiv:1411.1784"

    def __init__(
        self,
        data: DataInfo,
        *,
        generator: GeneratorOptions = GeneratorOptions(norm="batch"),
        critic: CriticOptions = CriticOptions(kernel=4, spectral=True),
        label_as: LabelAs = "channel",
        options: GANOptions = GANOptions(),
        conditional: bool = True,
    ):
        nets = conv_nets(data, generator, critic, label_as)
        super().__init__(data, generator.latent, nets, options, conditional)
