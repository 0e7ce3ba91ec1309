"""What discriminator and generator of a GAN minimise, and the penalties on the discriminator's gradient."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Objective = Literal["nonsaturating", "hinge", "wasserstein"]


def critic_loss(objective: Objective, real: Tensor, fake: Tensor) -> Tensor:
    """Of the discriminator's outputs f [B] on real images and fakes; σ(f) is the probability of real.

    nonsaturating: −log σ(f(x)) − log σ(−f(G(z)))  (Goodfellow 2014, arXiv:1406.2661, eq. 1) · hinge: Lim & Ye
    2017,
    arXiv:1705.02894 · wasserstein: f(G(z)) − f(x)  (Arjovsky 2017, arXiv:1701.07875).
    """
    if objective == "nonsaturating":
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    if objective == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return fake.mean() - real.mean()


def generator_loss(objective: Objective, fake: Tensor) -> Tensor:
    """Of f [B] on fakes: −log σ(f), else −f."""
    return F.softplus(-fake).mean() if objective == "nonsaturating" else -fake.mean()


def gradient_penalty(
    critic: nn.Module, real: Tensor, fake: Tensor, alpha: Tensor, y: Tensor | None = None
) -> Tensor:
    """(‖∇ f(x̂)‖₂ − 1)² of each sample, [B], in fp32 also under autocast; x̂ between fake and real at alpha
    [B], uniform on [0, 1) (Gulrajani 2017, arXiv:1704.00028, eq. 3)."""
    x_hat = torch.lerp(fake.detach().clone(), real.detach().clone(), alpha.clone().view(-1, 1, 1, 1))
    return (_gradient(critic, x_hat, y).norm(dim=1) - 1) ** 2


def r1_penalty(critic: nn.Module, real: Tensor, y: Tensor | None = None) -> Tensor:
    """½ ‖∇ f(x)‖₂² of each real image, [B], in fp32 also under autocast (Mescheder 2018, arXiv:1801.04406,
    eq. 9)."""
    return 0.5 * _gradient(critic, real.detach().clone(), y).square().sum(1)


def _gradient(critic: nn.Module, x: Tensor, y: Tensor | None) -> Tensor:
    """∂f/∂x [B, C·H·W]; samples do not meet in the critic, so the gradient of the sum holds each one's
    own."""
    train = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        (gradient,) = torch.autograd.grad(critic(x.requires_grad_(), y).sum(), x, create_graph=train)
        return gradient.flatten(1)
