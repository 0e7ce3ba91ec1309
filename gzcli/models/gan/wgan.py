"""WGAN-GP — Gulrajani et al. 2017, "Improved Training of Wasserstein GANs", arXiv:1704.00028.

    critic:    max  E f(x) − E f(G(z)) − λ E (‖∇ f(x̂)‖ − 1)²,   x̂ uniform on the line from G(z) to x          (eq. 3)
    generator: max  E f(G(z))

A step is a critic update on a fresh batch; every `n_critic`-th one is followed by a generator update. The critic's
output is unbounded (no sigmoid) and each image's own (no batch norm, which the penalty forbids: section 4).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from gzcli.errors import UsageError
from gzcli.models.base import Model, Phase
from gzcli.models.gan.nets import Critic, Generator
from gzcli.models.nn import full, spread_labels
from gzcli.types import Batch, DataInfo, Noise, Progress


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor, alpha: Tensor, y: Tensor | None = None) -> Tensor:
    """(‖∇ f(x̂)‖₂ − 1)² of each sample, [B], in fp32 also under autocast; alpha [B] is uniform on [0, 1)."""
    train = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(real.device.type, enabled=False):
        x_hat = torch.lerp(fake.detach().clone(), real.detach().clone(), alpha.clone().view(-1, 1, 1, 1))
        x_hat.requires_grad_()
        # samples do not meet in the critic, so the gradient of the sum holds each one's own gradient
        (gradient,) = torch.autograd.grad(critic(x_hat, y).sum(), x_hat, create_graph=train)
        norm = gradient.flatten(1).norm(dim=1)
        return (norm - 1) ** 2


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Along the great circle from a to b [..., D], which keeps the norm that the generator knows."""
    cos = torch.nn.functional.cosine_similarity(a, b, dim=-1).clamp(-0.9995, 0.9995).unsqueeze(-1)
    omega = torch.acos(cos)
    return (torch.sin((1 - t) * omega) * a + torch.sin(t * omega) * b) / torch.sin(omega)


class WGAN(Model):
    """A convolutional WGAN-GP.

    width: channels of the finest scale of both nets, doubled at each coarser one. norm: the generator's.
    n_critic: critic updates per generator update. penalty: λ.
    conditional: labels enter the generator beside z, and the critic by projection.
    """

    paper = "Gulrajani 2017, arXiv:1704.00028"
    best = "fd"

    def __init__(
        self,
        data: DataInfo,
        *,
        latent: int = 64,
        width: int = 32,
        norm: Literal["none", "group"] = "group",
        n_critic: int = 5,
        penalty: float = 10.0,
        conditional: bool = False,
    ):
        super().__init__(data)
        classes = len(data.classes) if conditional else 0
        self.latent, self.n_critic, self.penalty, self.conditional = latent, n_critic, penalty, conditional
        self.generator = Generator(data.shape, latent, width, norm, classes)
        self.critic = Critic(data.shape, width, classes)
        self.register_buffer("bank", None, persistent=False)  # critic features of in-distribution images, for `knn`

    # ---- training

    def phases(self) -> list[Phase]:
        return [
            Phase("critic", list(self.critic.parameters())),
            Phase("generator", list(self.generator.parameters()), every=self.n_critic),
        ]

    def loss(self, batch: Batch, phase: str = "critic") -> dict[str, Tensor]:
        n, y = len(batch), batch.y if self.conditional else None
        z = batch.noise.randn(n, self.latent)
        if phase == "generator":
            return {"loss": -self.critic(self.generator(z, y), y).mean()}
        with torch.no_grad():
            fake = self.generator(z, y)
        both = None if y is None else torch.cat([y, y])
        real_f, fake_f = self.critic(torch.cat([batch.x, fake]), both).chunk(2)
        wasserstein = real_f.mean() - fake_f.mean()
        penalty = gradient_penalty(self.critic, batch.x, fake, batch.noise.rand(n), y).mean()
        return {
            "loss": self.penalty * penalty - wasserstein,
            "wasserstein": wasserstein.detach(),
            "penalty": penalty.detach(),
        }

    # ---- sampling and applications

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress,
        temperature: float = 1.0,
    ) -> Tensor:
        """G(z), z ~ N(0, temperature²)."""
        device = next(self.parameters()).device
        y = spread_labels(labels, n, self.data, device) if self.conditional else None
        x = self.generator(temperature * noise.randn(n, self.latent).to(device), y)
        progress(1, 1, x)
        return x

    def reconstruct(self, x: Tensor, *, noise: Noise, progress: Progress, steps: int = 100) -> Tensor:
        """The generator's nearest image to each x, found by `invert`: [B, C, H, W]."""
        z, y, _ = self.invert(x, noise, steps=steps, progress=progress)
        with torch.no_grad():
            return self.generator(z, y)

    def interpolate(self, x: Tensor, *, noise: Noise, progress: Progress, steps: int = 8, search: int = 100) -> Tensor:
        """The way from image 0 to 1, 2 to 3, … in latent space: [pairs · steps, C, H, W], pair by pair, ends included.

        The ends are the generator's nearest images, found in `search` steps; a conditional model changes
        the label half-way. Raises UsageError for fewer than two images.
        """
        if len(x) < 2:
            raise UsageError("`interpolate` needs pairs of images, got one", hint="give a folder of two or more images")
        z, y, _ = self.invert(x, noise, steps=search, progress=progress)
        pairs = len(x) // 2
        a, b = z[: 2 * pairs].unsqueeze(1).unflatten(0, (pairs, 2)).unbind(1)  # [pairs, 1, latent] each
        z = slerp(a, b, torch.linspace(0, 1, steps, device=x.device)[:, None]).flatten(0, 1)
        if y is not None:  # a way has the label of its nearer end
            end = 2 * torch.arange(pairs, device=x.device)[:, None] + (torch.arange(steps, device=x.device) * 2 >= steps)
            y = y[end.flatten()]
        with torch.no_grad():
            return self.generator(z, y)

    # ---- out-of-distribution scores

    def score_disc(self, x: Tensor, *, noise: Noise) -> Tensor:
        """−f(x): the critic rates real images high. A conditional critic's mean over the classes."""
        k = len(self.data.classes)
        y = torch.full((len(x), k), 1 / k, device=x.device) if self.conditional else None  # f is linear in the embedding
        return -self.critic(x, y)

    def score_inversion(
        self, x: Tensor, *, noise: Noise, steps: int = 100, lr: float = 0.05, starts: int = 8, feature: float = 0.1
    ) -> Tensor:
        """What of x the generator cannot reach (AnoGAN, Schlegl 2017, arXiv:1703.05921, eq. 4)."""
        return self.invert(x, noise, steps=steps, lr=lr, starts=starts, feature=feature)[2]

    def invert(
        self,
        x: Tensor,
        noise: Noise,
        *,
        steps: int,
        lr: float = 0.05,
        starts: int = 8,
        feature: float = 0.1,
        progress: Progress | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """z [B, latent], its labels and its distance [B]: Adam from the best of `starts` draws of z, image by image.

        A conditional model's draw i is of class i % K.
        distance = (1 − feature)·‖x − G(z)‖² + feature·‖φ(x) − φ(G(z))‖², φ the critic's last feature map.
        """
        n = len(x)
        with torch.inference_mode(False), torch.enable_grad():
            x, z = x.detach().clone(), noise.randn(n, starts * self.latent).to(x.device).clone()
            target = self.critic.maps(x).detach() if feature else None

            def distance(z: Tensor, y: Tensor | None) -> Tensor:
                fake = self.generator(z, y)
                d = (1 - feature) * (x - fake).double().square().flatten(1).sum(1)
                if feature:
                    d = d + feature * (target - self.critic.maps(fake)).double().square().flatten(1).sum(1)
                return d

            z = z.unflatten(1, (starts, self.latent))
            classes = spread_labels(None, starts, self.data, x.device) if self.conditional else None
            tries = [None if classes is None else classes[i].expand(n, *classes.shape[1:]) for i in range(starts)]
            with torch.no_grad():
                first = torch.stack([distance(z[:, i], tries[i]) for i in range(starts)], dim=1).argmin(1)
            y = None if classes is None else classes[first]
            z = z[torch.arange(n, device=z.device), first].requires_grad_()
            adam = torch.optim.Adam([z], lr=lr, eps=1e-3)
            best = torch.full((n,), torch.inf, dtype=torch.float64, device=x.device)
            best_z = z.detach().clone()
            for step in range(steps + 1):
                d = distance(z, y)
                better = d.detach() < best
                best = torch.where(better, d.detach(), best)
                best_z = torch.where(better[:, None], z.detach(), best_z)
                if step < steps:
                    (z.grad,) = torch.autograd.grad(d.sum(), z)
                    adam.step()
                    if progress is not None:
                        progress(step + 1, steps)
        return best_z, y, best.to(x.dtype)

    def unit_features(self, x: Tensor) -> Tensor:
        """The critic's features on a 2×2 grid, on the unit sphere: [B, 4·C']."""
        h = nn.functional.adaptive_avg_pool2d(full(self.critic.maps(x)), 2).flatten(1)
        return nn.functional.normalize(h, dim=1)

    @torch.no_grad()
    def fit_knn(self, batches) -> None:
        """Remembers the features of training images (`batches`: an iterable of Batch)."""
        self.bank = torch.cat([self.unit_features(batch.x) for batch in batches])

    def score_knn(self, x: Tensor, *, noise: Noise, k: int = 10) -> Tensor:
        """Distance to the k-th nearest training image in critic features (Sun 2022, arXiv:2204.06507).

        Raises UsageError before `fit_knn`, or where it saw fewer than k images.
        """
        if self.bank is None or len(self.bank) < k:
            raise UsageError(
                f"the `knn` score needs the features of at least {k} training images",
                hint="fit it first, or ask for fewer neighbours",
            )
        h = self.unit_features(x)
        near = (h @ self.bank.T).topk(k, dim=1).indices[:, -1]
        return (h - self.bank[near]).norm(dim=1)  # from the difference: exact also for near neighbours
