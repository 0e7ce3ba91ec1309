"""Losses of a generator and a discriminator, and penalties on the discriminator's gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Objective = Literal["nonsaturating", "hinge", "wasserstein"]


class AdversarialLoss(NamedTuple):
    """The losses of both networks as functions of the discriminator's outputs f [B].

    critic: of f(x) for real images x, and f(G(z)).
    generator: of f(G(z)).
    """

    critic: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


OBJECTIVES: dict[Objective, AdversarialLoss] = {
    # −log σ(f(x)) − log σ(−f(G(z))) and −log σ(f(G(z))): Goodfellow 2014, arXiv:1406.2661, eq. 1, section 3
    "nonsaturating": AdversarialLoss(
        lambda real, fake: F.softplus(-real).mean() + F.softplus(fake).mean(),
        lambda fake: F.softplus(-fake).mean(),
    ),
    # Lim & Ye 2017, arXiv:1705.02894
    "hinge": AdversarialLoss(
        lambda real, fake: F.relu(1 - real).mean() + F.relu(1 + fake).mean(), lambda fake: -fake.mean()
    ),
    # f(G(z)) − f(x): Arjovsky 2017, arXiv:1701.07875
    "wasserstein": AdversarialLoss(lambda real, fake: fake.mean() - real.mean(), lambda fake: -fake.mean()),
}


def gradient_penalty(
    critic: nn.Module, real: Tensor, fake: Tensor, alpha: Tensor, y: Tensor | None = None
) -> Tensor:
    """(‖∇ f(x̂)‖₂ − 1)² of each sample, [B], in fp32 also under autocast (Gulrajani 2017, arXiv:1704.00028,
    eq. 3).

    alpha: uniform on [0, 1), [B]; x̂ = fake + alpha · (real − fake).
    """
    x_hat = torch.lerp(fake.detach().clone(), real.detach().clone(), alpha.clone().view(-1, 1, 1, 1))
    return (_gradient(critic, x_hat, y).norm(dim=1) - 1) ** 2


def r1_penalty(critic: nn.Module, real: Tensor, y: Tensor | None = None) -> Tensor:
    """½ ‖∇ f(x)‖₂² of each real image, [B], in fp32 also under autocast (Mescheder 2018, arXiv:1801.04406,
    eq. 9)."""
    return 0.5 * _gradient(critic, real.detach().clone(), y).square().sum(1)


def _gradient(critic: nn.Module, x: Tensor, y: Tensor | None) -> Tensor:
    """∂f/∂x [B, C·H·W]: the gradient of Σ f, as no output of the critic depends on another sample."""
    train = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        (gradient,) = torch.autograd.grad(critic(x.requires_grad_(), y).sum(), x, create_graph=train)
        return gradient.flatten(1)
