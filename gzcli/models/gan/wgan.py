"""WGAN-GP — Gulrajani et al. 2017, "Improved Training of Wasserstein GANs", arXiv:1704.00028.

    critic:    max  E f(x) − E f(G(z)) − λ E (‖∇ f(x̂)‖ − 1)²                      (eq. 3)
    generator: max  E f(G(z))

x̂ is uniform on the line from G(z) to x. The critic's output is unbounded, so it has no sigmoid. It has no
batch norm either, because the penalty is defined for each image separately (section 4).
"""

from __future__ import annotations

from gzcli.core.types import DataInfo
from gzcli.models.gan.base import GAN, GANOptions, GeneratorOptions, conv_nets
from gzcli.models.nn.adversarial import CriticOptions


class WGAN(GAN):
    """A convolutional WGAN-GP. Other objectives need another `penalty`; `relativistic` needs none.

    conditional: whether the networks are conditioned on labels. The generator gets them with z, the
      critic by projection.
    """

    paper = "Gulrajani 2017, arXiv:1704.00028"

    def __init__(
        self,
        data: DataInfo,
        *,
        generator: GeneratorOptions = GeneratorOptions(),
        options: GANOptions = GANOptions(objective="wasserstein", n_critic=5, penalty=10.0),
        conditional: bool = False,
    ):
        nets = conv_nets(data, generator, CriticOptions(), "projection")
        super().__init__(data, generator.latent, nets, options, conditional)
