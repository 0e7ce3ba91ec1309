"""DCGAN — Radford, Metz & Chintala 2015, arXiv:1511.06434.

Both networks have strided convolutions, without pooling and without dense hidden layers. Options add later
methods for stable training: other objectives, spectral norm, R1, augmentation.
"""

from __future__ import annotations

from gzcli.core.types import DataInfo
from gzcli.models.gan.base import GAN, GANOptions, GeneratorOptions, conv_nets
from gzcli.models.nn.adversarial import CriticOptions


class DCGAN(GAN):
    """A convolutional GAN. The paper has `norm` and `disc_norm` batch, `spectral` false and `kernel` 4.

    conditional: whether the networks are conditioned on labels. The generator gets them with z, the
      discriminator as an input channel.
    """

    paper = "Radford 2015, arXiv:1511.06434"

    def __init__(
        self,
        data: DataInfo,
        *,
        generator: GeneratorOptions = GeneratorOptions(norm="batch"),
        critic: CriticOptions = CriticOptions(kernel=4, spectral=True),
        options: GANOptions = GANOptions(),
        conditional: bool = False,
    ):
        nets = conv_nets(data, generator, critic)
        super().__init__(data, generator.latent, nets, options, conditional)
