"""Prescribed GAN — Dieng, Ruiz, Blei & Titsias 2019, "Prescribed Generative Adversarial Networks",
arXiv:1910.04302.

The generator adds noise to its image, x = G(z) + σ ε, ε ~ N(0, I). Therefore p(x | z) = N(G(z), σ²) is a
density, and the entropy of p(x), which is small for a collapsed generator, can be increased:

    min over G, σ:  E −log D(x)  −  λ H(p)                                                   (eq. 6)
    ∇ H = −E[∇ₓ log p(x) · ∂x],    ∇ₓ log p(x) = −E over p(z' | x) of (x − G(z')) / σ²       (eq. 9, 11)

z' ~ p(z | x) comes from Hamiltonian Monte Carlo through the generator, started at the z from which x was
generated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gzcli.core import ranks
from gzcli.core.errors import UsageError
from gzcli.core.types import Batch, DataInfo, Noise, Progress
from gzcli.models.base import Phase
from gzcli.models.gan.base import GAN, GANOptions, GeneratorOptions, conv_nets
from gzcli.models.nn import Labels, within
from gzcli.models.nn.adversarial import CriticOptions

Potential = Callable[[Tensor], Tensor]  # z [B, D] → U [B], differentiable


def gradient(potential: Potential, z: Tensor) -> tuple[Tensor, Tensor]:
    """U [B] and ∂U/∂z [B, D]. The U of each chain depends only on its own z."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        u = potential(z)
        return u.detach(), torch.autograd.grad(u.sum(), z)[0]


def leapfrog(
    potential: Potential, z: Tensor, p: Tensor, eps: float | Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(z, p) after `steps` leapfrog steps of size eps (eq. 2.28 – 2.30), and H [B] before and after."""
    u, g = gradient(potential, z)
    before = u + 0.5 * p.square().sum(1)
    for _ in range(steps):
        p = p - 0.5 * eps * g
        z = z + eps * p
        u, g = gradient(potential, z)
        p = p - 0.5 * eps * g
    return z, p, before, u + 0.5 * p.square().sum(1)


def hmc_step(
    potential: Potential, z: Tensor, eps: float | Tensor, steps: int, noise: Noise
) -> tuple[Tensor, Tensor]:
    """The next states [B, D] of the chains, and the acceptance probabilities [B] of proposals (Neal 2011,
    arXiv:1206.1901, section 3): min(1, exp(H_start − H_end)), H = U(z) + ‖p‖²/2."""
    p, u = noise.randn(*z.shape), noise.rand(len(z))
    proposal, _, before, after = leapfrog(potential, z, p, eps, steps)
    # a diverged trajectory has a NaN or infinite energy: its probability is 0
    accept = (before - after).clamp(max=0).exp().nan_to_num(0.0)
    return torch.where((u < accept)[:, None], proposal, z), accept


class PresGAN(GAN):
    """A DCGAN whose pixels have learned noise, trained with the entropy of its images.

    The other keys are those of `dcgan`. The generator should not have batch norm, because the likelihood of
    an image would then depend on its batch.

    sigma: initial standard deviation of every pixel's noise, for images in [-1, 1].
    sigma_min: smallest standard deviation of a pixel's noise.
    sigma_max: largest standard deviation of a pixel's noise.
    entropy: weight λ of the entropy, in nats.
    burn_in: number of discarded moves of the Markov chain over z, which estimates the entropy's gradient.
    draws: number of averaged moves of the chain.
    leapfrog: leapfrog steps per move.
    accept: target acceptance rate for the adaptive leapfrog step size, in [0, 1].
    conditional: whether the networks are conditioned on labels. The generator gets them with z, the
      discriminator as an input channel.
    """

    paper = "Dieng 2019, arXiv:1910.04302"
    step_size: Tensor

    def __init__(
        self,
        data: DataInfo,
        *,
        generator: GeneratorOptions = GeneratorOptions(),
        critic: CriticOptions = CriticOptions(kernel=4, spectral=True),
        options: GANOptions = GANOptions(objective="nonsaturating"),
        sigma: float = 0.1,
        sigma_min: float = 0.01,
        sigma_max: float = 0.3,
        entropy: float = 1e-4,
        burn_in: int = 2,
        draws: int = 2,
        leapfrog: int = 5,
        accept: float = 0.67,
        conditional: bool = False,
    ):
        nets = conv_nets(data, generator, critic)
        super().__init__(data, generator.latent, nets, options, conditional)
        if not 0 < sigma_min <= sigma <= sigma_max:
            raise UsageError("`sigma_min`, `sigma` and `sigma_max` must be above 0 and in ascending order")
        self.bounds = math.log(sigma_min), math.log(sigma_max)
        self.log_sigma = nn.Parameter(torch.full(data.shape, math.log(sigma)))
        self.entropy, self.burn_in, self.draws = entropy, burn_in, draws
        self.leapfrog, self.accept = leapfrog, accept
        self.register_buffer("step_size", torch.tensor(0.02))

    def phases(self) -> list[Phase]:
        # Adam moves log σ as far in a step as any weight; at that rate it would take thousands of steps
        noise: dict[str, Any] = {"params": [self.log_sigma], "lr_scale": 5.0, "weight_decay": 0.0}
        generator: dict[str, Any] = {"params": list(self.generator.parameters())}
        return [
            Phase("critic", list(self.critic.parameters())),
            Phase("generator", [generator, noise], every=self.options.n_critic),
        ]

    def sigma(self) -> Tensor:
        return self.log_sigma.clamp(*self.bounds).exp()

    # ---- training

    def real_images(self, batch: Batch) -> Tensor:
        # real images get the same noise, so that noise does not reveal fakes
        return batch.x + self.sigma().detach() * batch.noise.randn(*batch.x.shape)

    def critic_loss(self, batch: Batch, real: Tensor, fake: Tensor, y: Labels) -> dict[str, Tensor]:
        fake = fake + self.sigma().detach() * batch.noise.randn(*fake.shape)
        return super().critic_loss(batch, real, fake, y)

    def generator_loss(self, batch: Batch, z: Tensor, y: Labels) -> dict[str, Tensor]:
        mean, sigma = self.generator(z, y), self.sigma()
        x = mean + sigma * batch.noise.randn(*mean.shape)
        adversarial = self.adversarial_loss(batch, x, y)
        if not self.entropy:
            return {"loss": adversarial, "sigma": sigma.detach().mean()}
        score, accept = self.density_gradient(x.detach(), z, y, batch.noise)
        # only its gradient is that of the entropy
        surrogate = -(score * x).flatten(1).sum(1).mean()
        return {
            "loss": adversarial - self.entropy * surrogate,
            "adversarial": adversarial.detach(),
            "sigma": sigma.detach().mean(),
            "accept": accept,
            "step_size": self.step_size.clone(),
        }

    def density_gradient(self, x: Tensor, z: Tensor, y: Labels, noise: Noise) -> tuple[Tensor, Tensor]:
        """∇ₓ log p(x), estimated by chains from z, and their mean acceptance rate, which adapts their step
        size."""
        sigma, potential = self.sigma().detach(), self.potential(x, y)
        accepted, score = [], torch.zeros_like(x)
        with torch.autocast(x.device.type, enabled=False):
            for i in range(self.burn_in + self.draws):
                z, accept = hmc_step(potential, z, self.step_size, self.leapfrog, noise)
                accepted.append(accept.mean())
                if i >= self.burn_in:
                    with torch.no_grad():
                        score = score + (self.generator(z, y) - x) / sigma**2 / self.draws
            rate = ranks.mean_over_ranks(torch.stack(accepted).mean(), self)
        if self.training:
            factor = torch.where(rate > self.accept, 1.02, 0.98)
            self.step_size = (self.step_size * factor).clamp(1e-4, 1.0)
        return score, rate

    def potential(self, x: Tensor, y: Labels) -> Potential:
        """−log p(x | z) − log p(z) as a function of z, up to constants: [B]."""
        sigma = self.sigma().detach()

        def energy(z: Tensor) -> Tensor:
            residual = (x - self.generator(z, y)) / sigma
            return 0.5 * (residual.square().flatten(1).sum(1) + z.square().sum(1))

        return energy

    # ---- sampling

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Labels = None,
        noise: Noise,
        progress: Progress,
        temperature: float = 1.0,
        mean: bool = True,
    ) -> Tensor:
        """G(z) for z ~ N(0, temperature²), plus the noise of the pixels.

        temperature: standard deviation of z.
        mean: whether the image is G(z) without noise.
        """
        x = super().sample(n, labels=labels, noise=noise, progress=progress, temperature=temperature)
        return x if mean else within(x + self.sigma() * noise.randn(*x.shape))
