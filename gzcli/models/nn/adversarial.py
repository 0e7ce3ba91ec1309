"""Discriminators of images, the losses of a generator and a discriminator, and penalties on the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from gzcli.core.errors import UsageError
from gzcli.models.nn import ClassEmbedding, pyramid, to_fp32
from gzcli.models.nn.layers import group_norm

Norm = Literal["none", "group", "batch"]
LabelAs = Literal["channel", "projection"]


@dataclass(frozen=True)
class CriticOptions:
    """The network of the discriminator.

    disc_norm: normalisation after every convolution of the discriminator but the first.
    kernel: side of the discriminator's strided convolutions, in pixels.
    spectral: whether each weight of the discriminator is divided by its largest singular value (Miyato 2018,
      arXiv:1802.05957).
    """

    disc_norm: Norm = "none"
    kernel: int = 3
    spectral: bool = False


def widths(width: int, scales: int) -> list[int]:
    """Channels of the scales below the image, finest first: width, 2·width, 4·width, then 8·width."""
    return [width * 2 ** min(i, 3) for i in range(scales)]


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda width: nn.Identity(),
    "group": group_norm,
    "batch": nn.BatchNorm2d,
    "instance": lambda width: nn.GroupNorm(width, width, affine=False),  # each channel is a group of its own
}


class Discriminator(nn.Module):
    """Images [B, C, H, W] → an unbounded number for each, [B], fp32: a linear function of the coarsest map of
    features, plus its projection on an embedding of the label (Miyato 2018, arXiv:1802.05637, eq. 3)."""

    independent = True  # whether in training each output depends on its own image alone

    def maps(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The coarsest feature map [B, C', h, w]."""
        raise NotImplementedError

    def add_head(self, features: int, classes: int = 0) -> None:
        """Adds the last layer, of maps of so many features C'·h·w, and the embedding of labels, if any."""
        self.features, self.head = features, nn.Linear(features, 1)
        self.embed = ClassEmbedding(classes, features) if classes else None
        self.scale = features**-0.5  # the norm of an embedding is about √features

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.maps(x, y).flatten(1)
        f = to_fp32(self.head(h)).squeeze(1)
        if self.embed is not None:
            f = f + self.scale * (to_fp32(self.embed(y, len(x))) * to_fp32(h)).sum(1)
        return f


class Critic(Discriminator):
    """Strided convolutions, after DCGAN (arXiv:1511.06434).

    A label enters by `projection`, or as a `channel`, an embedding of the size of the image beside it (after
    Mirza 2014). `width` are the channels of the finest scale.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        width: int,
        classes: int = 0,
        options: CriticOptions = CriticOptions(),
        label_as: LabelAs = "projection",
    ):
        super().__init__()
        sizes = pyramid(shape)
        channels = widths(width, len(sizes) - 1)
        self.kernel, norm = options.kernel, options.disc_norm
        self.independent = norm != "batch"
        as_channel = classes and label_as == "channel"
        self.channel = ClassEmbedding(classes, shape[1] * shape[2]) if as_channel else None
        inputs = (shape[0] + (self.channel is not None), *channels)
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, self.kernel, stride=2, padding=(self.kernel - 1) // 2)
            for i, o in zip(inputs, channels, strict=False)
        )
        self.norms = nn.ModuleList(NORMS[norm if i else "none"](w) for i, w in enumerate(channels))
        self.add_head(channels[-1] * math.prod(sizes[-1]), classes if label_as == "projection" else 0)
        if options.spectral:
            self.scale = 1.0  # spectral norm gives each embedding the norm 1
            for layer in (*self.convs, self.head, *([self.embed.table] if self.embed else [])):
                spectral_norm(layer)

    def maps(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if self.channel is not None:
            x = torch.cat([x, self.channel(y, len(x)).view(-1, 1, *x.shape[2:])], 1)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            if self.kernel % 2 == 0:  # an even kernel would round the half of an odd side down
                x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
            x = F.leaky_relu(norm(conv(x)), 0.2)
        return x


class PatchGAN(nn.Module):
    """Images [B, C, H, W] → a map of logits [B, 1, h', w'], fp32, one a patch: 70×70 pixels for 3 layers
    (Isola et al. 2016, arXiv:1611.07004, section 3.2.2). Raises UsageError for images that are too small.

    `layers` convolutions of stride 2 begin with `width` channels, doubled by each, at most 8-fold. The norm
    is `none`, `group`, or `instance` without learned scales; `batch` would mix the images of a batch.
    """

    def __init__(self, shape: tuple[int, ...], width: int = 64, layers: int = 3, norm: str = "group"):
        super().__init__()
        if min(shape[1:]) // 2**layers < 3:  # two convolutions of stride 1 take a pixel each
            small = f"images of {shape[1]}×{shape[2]} are too small for a discriminator of {layers} halvings"
            raise UsageError(small, hint="set fewer `layers` of the discriminator")
        widths = [shape[0], *(width * min(2**i, 8) for i in range(layers + 1))]
        strides = [2] * layers + [1]
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 4, stride=s, padding=1, bias=k == 0 or norm == "none")
            for k, (i, o, s) in enumerate(zip(widths[:-1], widths[1:], strides, strict=True))
        )
        self.norms = nn.ModuleList(NORMS[norm if k else "none"](o) for k, o in enumerate(widths[1:]))
        self.head = nn.Conv2d(widths[-1], 1, 4, padding=1)
        for conv in (*self.convs, self.head):
            nn.init.normal_(conv.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.2)
        return to_fp32(self.head(x))


def critic_outputs(disc: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> tuple[Tensor, ...]:
    """A discriminator's outputs for real and for generated inputs, by one pass."""
    return disc(torch.cat([real, fake])).chunk(2)


class AdversarialLoss(NamedTuple):
    """Losses of the critic, of f(x) and f(G(z)), and of the generator, of f(G(z)), all means.

    relative: whether the generator's is of f(G(z)) − f(x).
    """

    critic: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]
    relative: bool = False


OBJECTIVES: dict[str, AdversarialLoss] = {
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
    # −log σ(f(x) − f(G(z))) and −log σ(f(G(z)) − f(x)): Jolicoeur-Martineau 2018, arXiv:1807.00734, as in
    # Huang 2025, arXiv:2501.05441, eq. 2
    "relativistic": AdversarialLoss(
        lambda real, fake: F.softplus(fake - real).mean(), lambda gap: F.softplus(-gap).mean(), relative=True
    ),
}
Objective = Annotated[str, OBJECTIVES]
# of cyclegan: Mao et al. 2016, arXiv:1611.04076
LEAST_SQUARES = AdversarialLoss(
    lambda real, fake: (real - 1).square().mean() + fake.square().mean(),
    lambda fake: (fake - 1).square().mean(),
)


def gradient_penalty(
    critic: nn.Module, real: Tensor, fake: Tensor, alpha: Tensor, y: Tensor | None = None
) -> Tensor:
    """(‖∇ f(x̂)‖₂ − 1)² of each sample, [B], x̂ = fake + alpha · (real − fake), alpha uniform [B], in fp32
    also under autocast (Gulrajani 2017, arXiv:1704.00028, eq. 3)."""
    x_hat = torch.lerp(fake.detach().clone(), real.detach().clone(), alpha.clone().view(-1, 1, 1, 1))
    return (_gradient(critic, x_hat, y)[1].norm(dim=1) - 1) ** 2


def penalised(critic: nn.Module, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """f(x) and ½ ‖∇ f(x)‖₂² of each image, [B] each, in fp32. Their means are R1 of real images and R2 of
    generated ones (Mescheder 2018, arXiv:1801.04406, eq. 9 and 10)."""
    f, gradient = _gradient(critic, x.detach().clone(), y)
    return f, 0.5 * gradient.square().sum(1)


def _gradient(critic: nn.Module, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """f(x) [B] and ∂f/∂x [B, C·H·W]: the gradient of Σ f, as no output depends on another sample."""
    train = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        f = critic(x.requires_grad_(), y)
        (gradient,) = torch.autograd.grad(f.sum(), x, create_graph=train)
        return f, gradient.flatten(1)
