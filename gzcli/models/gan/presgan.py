"""Prescribed GAN — Dieng, Ruiz, Blei & Titsias 2019, "Prescribed Generative Adversarial Networks",
arXiv:1910.04302.

The generator's image has noise of its own, x = G(z) + σ ε, ε ~ N(0, I), so that p(x | z) = N(G(z), σ²) is a
density, and the entropy of p(x) can be raised, which a collapsed generator has little of:

    min over G, σ:  E −log D(x)  −  λ H(p)                                                              (eq.
    6)
    ∇ H = −E[∇ₓ log p(x) · ∂x],    ∇ₓ log p(x) = −E over p(z' | x) of (x − G(z')) / σ²                  (eq.
    9, 11)

z' ~ p(z | x) by Hamiltonian Monte Carlo through the generator, started at the z that made x.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gzcli import ranks
from gzcli.models.base import Phase
from gzcli.models.gan.augment import diff_augment
from gzcli.models.gan.base import GAN
from gzcli.models.gan.hmc import Potential, hmc_step
from gzcli.models.gan.losses import Objective, generator_loss
from gzcli.models.gan.nets import Critic, Generator, Norm
from gzcli.types import Batch, DataInfo, Noise, Progress


class PresGAN(GAN):
    """A DCGAN whose pixels have learned noise, trained with the entropy of what it makes.

    sigma: where the noise of every pixel starts, for images in [-1, 1]; it stays within `sigma_min` and
    `sigma_max`.
    entropy: λ, a pixel. The chains over z take `burn_in` moves, then `draws` that count, of `leapfrog` steps
    each; their step size is adapted to an acceptance of `accept`. The other keys are those of `dcgan`; there
    is no batch norm in the generator, for the likelihood of one image would then depend on the others.
    """

    paper = "Dieng 2019, arXiv:1910.04302"

    def __init__(
        self,
        data: DataInfo,
        *,
        latent: int = 64,
        width: int = 32,
        norm: Norm = "group",
        disc_norm: Norm = "none",
        kernel: int = 4,
        spectral: bool = True,
        objective: Objective = "nonsaturating",
        n_critic: int = 1,
        r1: float = 0.0,
        r1_every: int = 16,
        augment: tuple[str, ...] = (),
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
            r1=r1,
            r1_every=r1_every,
            augment=augment,
        )
        self.bounds = math.log(sigma_min), math.log(sigma_max)
        self.log_sigma = nn.Parameter(torch.full(data.shape, math.log(sigma)))
        self.entropy, self.burn_in, self.draws, self.leapfrog, self.accept = (
            entropy,
            burn_in,
            draws,
            leapfrog,
            accept,
        )
        self.register_buffer("step_size", torch.tensor(0.02))

    def phases(self) -> list[Phase]:
        # σ falls by the same relative step as a weight of size 1 moves: at its rate Adam would take thousands
        # of steps
        noise = {"params": [self.log_sigma], "lr_scale": 5.0, "weight_decay": 0.0}
        return [
            Phase("critic", list(self.critic.parameters())),
            Phase("generator", [{"params": list(self.generator.parameters())}, noise], every=self.n_critic),
        ]

    def sigma(self) -> Tensor:
        """[C, H, W], within its bounds."""
        return self.log_sigma.clamp(*self.bounds).exp()

    # ---- training

    def critic_loss(self, batch: Batch, real: Tensor, fake: Tensor, y: Tensor | None) -> dict[str, Tensor]:
        """Real images and means of the generator get equal noise: the critic must not tell them apart by
        it."""
        sigma = self.sigma().detach()
        real, fake = (x + sigma * batch.noise.randn(*x.shape).to(x) for x in (real, fake))
        return super().critic_loss(batch, real, fake, y)

    def generator_loss(self, batch: Batch, z: Tensor, y: Tensor | None) -> dict[str, Tensor]:
        mean, sigma = self.generator(z, y), self.sigma()
        x = mean + sigma * batch.noise.randn(*mean.shape).to(mean)
        adversarial = generator_loss(
            self.objective, self.critic(diff_augment(x, self.augment, batch.noise), y)
        )
        if not self.entropy:
            return {"loss": adversarial, "sigma": sigma.detach().mean()}
        score, accept = self.density_gradient(x.detach(), z, y, batch.noise)
        entropy = (
            -(score * x).flatten(1).sum(1).mean()
        )  # its gradient is that of the entropy, its value means nothing
        return {
            "loss": adversarial - self.entropy * entropy,
            "adversarial": adversarial.detach(),
            "sigma": sigma.detach().mean(),
            "accept": accept,
            "step_size": self.step_size.clone(),
        }

    def density_gradient(self, x: Tensor, z: Tensor, y: Tensor | None, noise: Noise) -> tuple[Tensor, Tensor]:
        """∇ₓ log p(x) [B, C, H, W] by chains from z, and their mean acceptance; adapts the step size in
        training."""
        sigma, potential, accepted, score = self.sigma().detach(), self.potential(x, y), [], 0.0
        with torch.autocast(x.device.type, enabled=False):
            z = z.to(x)
            for i in range(self.burn_in + self.draws):
                z, accept = hmc_step(potential, z, self.step_size, self.leapfrog, noise)
                accepted.append(accept.mean())
                if i >= self.burn_in:
                    with torch.no_grad():
                        score = score + (self.generator(z, y) - x) / sigma**2 / self.draws
            rate = ranks.mean(torch.stack(accepted).mean(), self)
        if self.training:
            self.step_size = (self.step_size * torch.where(rate > self.accept, 1.02, 0.98)).clamp(1e-4, 1.0)
        return score, rate

    def potential(self, x: Tensor, y: Tensor | None) -> Potential:
        """−log p(x | z) − log p(z) as a function of z, without its constants: [B]."""
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
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress,
        temperature: float = 1.0,
        mean: bool = True,
    ) -> Tensor:
        """G(z), z ~ N(0, temperature²); with the pixels' own noise unless `mean`."""
        x = super().sample(n, labels=labels, noise=noise, progress=progress, temperature=temperature)
        return x if mean else (x + self.sigma() * noise.randn(*x.shape).to(x)).clamp(-1, 1)
