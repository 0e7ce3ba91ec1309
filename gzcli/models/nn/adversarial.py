"""Discriminators of images, the losses of a generator and a discriminator, and penalties on the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from gzcli.core import ranks
from gzcli.core.errors import UsageError
from gzcli.models.nn import ClassEmbedding, pyramid, to_fp32
from gzcli.models.nn.layers import ResBlock, group_norm

Norm = Literal["none", "group", "batch"]
LabelAs = Literal["channel", "projection"]


@dataclass(frozen=True)
class CriticOptions:
    """The network of the discriminator.

    disc_norm: normalization in the discriminator: after every convolution except the first, or before it in
      residual networks.
    kernel: side of the discriminator's strided convolutions, in pixels.
    spectral: whether each weight of the discriminator is divided by its largest singular value (Miyato 2018,
      arXiv:1802.05957).
    """

    disc_norm: Norm = "none"
    kernel: int = 3
    spectral: bool = False


def widths(width: int, scales: int) -> list[int]:
    """The channels of the scales below the image, finest first: width, 2·width, 4·width, then 8·width."""
    return [width * 2 ** min(i, 3) for i in range(scales)]


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda width: nn.Identity(),
    "group": group_norm,
    "batch": nn.BatchNorm2d,
    "instance": lambda width: nn.GroupNorm(width, width, affine=False),  # each channel is its own group
}


class Discriminator(nn.Module):
    """Images [B, C, H, W] → an unbounded number for each, [B], fp32: a linear function of the coarsest map of
    features, plus its projection on an embedding of the label (Miyato 2018, arXiv:1802.05637, eq. 3)."""

    independent = True  # whether in training each output depends on its own image alone
    channel: ClassEmbedding | None  # embedding of labels, as a channel of the input

    def maps(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The coarsest feature map [B, C', h, w]."""
        raise NotImplementedError

    def add_head(self, features: int, classes: int = 0) -> None:
        """Adds the last layer, with `features` = C'·h·w inputs, and the embedding of labels, if any."""
        self.features, self.head = features, nn.Linear(features, 1)
        self.embed = ClassEmbedding(classes, features) if classes else None
        self.scale = features**-0.5  # the norm of an embedding is about √features

    def pooled(self, h: Tensor) -> Tensor:
        """The features [B, C] of a map [B, C', h, w]."""
        return h.flatten(1)

    def with_channel(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Images [B, C, H, W] with the channel of their labels, if there is one."""
        if self.channel is None:
            return x
        return torch.cat([x, self.channel(y, len(x)).view(-1, 1, *x.shape[2:])], 1)

    def normalise(self) -> None:
        """Divides every weight by its largest singular value (Miyato 2018, arXiv:1802.05957), except for a
        channel of labels."""
        self.scale = 1.0  # each embedding gets the norm 1
        for name, layer in list(self.named_modules()):
            if isinstance(layer, nn.Conv2d | nn.Linear | nn.Embedding) and not name.startswith("channel"):
                spectral_norm(layer)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.pooled(self.maps(x, y))
        f = to_fp32(self.head(h)).squeeze(1)
        if self.embed is not None:
            f = f + self.scale * (to_fp32(self.embed(y, len(x))) * to_fp32(h)).sum(1)
        return f


class Critic(Discriminator):
    """Strided convolutions, after DCGAN (arXiv:1511.06434).

    A label enters by `projection`, or as a `channel` beside the image: an embedding of the image's size
    (after Mirza 2014). `width` is the number of channels of the finest scale.
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
            self.normalise()

    def maps(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x = self.with_channel(x, y)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            if self.kernel % 2 == 0:  # an even kernel would round down half of an odd side
                x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
            x = F.leaky_relu(norm(conv(x)), 0.2)
        return x


def patch_sizes(shape: tuple[int, ...], patch: int) -> list[tuple[int, int]]:
    """The (height, width) of the feature maps of images (C, H, W), finest first. A position of the finest map
    is a square of `patch` pixels."""
    return pyramid((shape[0], *(-(-side // patch) for side in shape[1:])))


def to_patches(x: Tensor, patch: int) -> Tensor:
    """Images [B, C, H, W], padded with 0 to whole patches, as [B, C · patch², H / patch, W / patch]."""
    x = F.pad(x, (0, -x.shape[3] % patch, 0, -x.shape[2] % patch))
    return F.pixel_unshuffle(x, patch)


class ResidualCritic(Discriminator):
    """Pre-activated residual blocks, each followed by average pooling, and the sum over the last positions,
    after Miyato 2018 (arXiv:1802.05957, appendix B.4). A label enters as in `Critic`."""

    def __init__(
        self,
        shape: tuple[int, ...],
        width: int,
        classes: int = 0,
        options: CriticOptions = CriticOptions(),
        label_as: LabelAs = "projection",
        patch: int = 1,
    ):
        super().__init__()
        self.patch, self.sizes = patch, patch_sizes(shape, patch)[1:]
        channels, norm = widths(width, 1 + len(self.sizes)), options.disc_norm
        self.independent = norm != "batch"
        as_channel = classes and label_as == "channel"
        self.channel = ClassEmbedding(classes, shape[1] * shape[2]) if as_channel else None
        colours = (shape[0] + (self.channel is not None)) * patch**2
        self.image = nn.Conv2d(colours, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList(
            ResBlock(i, o, NORMS[norm], F.relu, hidden=i) for i, o in pairwise(channels)
        )
        self.add_head(channels[-1], 0 if as_channel else classes)
        if options.spectral:
            self.normalise()

    def maps(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.image(to_patches(self.with_channel(x, y), self.patch))
        for block, size in zip(self.blocks, self.sizes, strict=True):
            h = F.interpolate(block(h), size, mode="area")
        return F.relu(h)

    def pooled(self, h: Tensor) -> Tensor:
        return h.sum((2, 3))


class PatchGAN(nn.Module):
    """Images [B, C, H, W] → a map of logits [B, 1, h', w'], fp32, one per patch: 70×70 pixels for 3 layers
    (Isola et al. 2016, arXiv:1611.07004, section 3.2.2). Raises UsageError for images that are too small.

    `layers` convolutions of stride 2 begin with `width` channels, doubled by each, at most 8-fold. The norm
    is `none`, `group`, or `instance` without learned scales; `batch` would mix the images of a batch.
    """

    def __init__(self, shape: tuple[int, ...], width: int = 64, layers: int = 3, norm: str = "group"):
        super().__init__()
        if min(shape[1:]) // 2**layers < 3:  # two convolutions of stride 1 take a pixel each
            small = f"images of {shape[1]}×{shape[2]} are too small for a discriminator of {layers} halvings"
            raise UsageError(small, hint="use fewer `layers` in the discriminator")
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
    """A discriminator's outputs for real and for generated inputs, computed in one pass."""
    return disc(torch.cat([real, fake])).chunk(2)


class AdversarialLoss(NamedTuple):
    """The losses of the critic, from f(x) and f(G(z)), and of the generator, from f(G(z)). All are means.

    relative: whether the generator's loss depends on f(G(z)) − f(x).
    signed: whether f(x) > 0 means that x is real. Otherwise the losses determine f only up to a constant.
    """

    critic: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]
    relative: bool = False
    signed: bool = True


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
    "wasserstein": AdversarialLoss(
        lambda real, fake: fake.mean() - real.mean(), lambda fake: -fake.mean(), signed=False
    ),
    # −log σ(f(x) − f(G(z))) and −log σ(f(G(z)) − f(x)): Jolicoeur-Martineau 2018, arXiv:1807.00734, as in
    # Huang 2025, arXiv:2501.05441, eq. 2
    "relativistic": AdversarialLoss(
        lambda real, fake: F.softplus(fake - real).mean(),
        lambda gap: F.softplus(-gap).mean(),
        relative=True,
        signed=False,
    ),
}
Objective = Annotated[str, OBJECTIVES]
# of cyclegan: Mao et al. 2016, arXiv:1611.04076
LEAST_SQUARES = AdversarialLoss(
    lambda real, fake: (real - 1).square().mean() + fake.square().mean(),
    lambda fake: (fake - 1).square().mean(),
)


Outputs = Callable[[Tensor, Tensor | None], Tensor]  # f(x) of images and labels


def gradient_penalty(
    critic: Outputs, real: Tensor, fake: Tensor, alpha: Tensor, y: Tensor | None = None
) -> Tensor:
    """(‖∇ f(x̂)‖₂ − 1)² of each sample, [B], x̂ = fake + alpha · (real − fake), alpha uniform [B], in fp32
    also under autocast (Gulrajani 2017, arXiv:1704.00028, eq. 3)."""
    x_hat = torch.lerp(fake.detach().clone(), real.detach().clone(), alpha.clone().view(-1, 1, 1, 1))
    return (_gradient(critic, x_hat, y)[1].norm(dim=1) - 1) ** 2


def penalised(critic: Outputs, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """f(x) and ½ ‖∇ f(x)‖₂² of each image, [B] each, in fp32. The mean of the latter is R1 for real images
    and R2 for generated ones (Mescheder 2018, arXiv:1801.04406, eq. 9 and 10)."""
    f, gradient = _gradient(critic, x.detach().clone(), y)
    return f, 0.5 * gradient.square().sum(1)


LECAM_DECAY = 0.99  # decay of the averages at each step


class LeCam(nn.Module):
    """E ‖f(x) − α_F‖² + E ‖f(G(z)) − α_R‖², where α_R and α_F are moving averages of f(x) and f(G(z)) (Tseng
    2021, arXiv:2104.03310, section 3). It restrains a critic that memorizes a small data set."""

    averages: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("averages", torch.zeros(2))  # α_R, α_F, the same on all ranks

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        means = ranks.mean_over_ranks(torch.stack([real.mean(), fake.mean()]).detach(), self)
        self.averages = torch.lerp(means, self.averages, LECAM_DECAY)
        return (real - self.averages[1]).square().mean() + (fake - self.averages[0]).square().mean()


def _gradient(critic: Outputs, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """f(x) [B] and ∂f/∂x [B, C·H·W], computed as the gradient of Σ f, because no output depends on another
    sample."""
    train = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        f = critic(x.requires_grad_(), y)
        (gradient,) = torch.autograd.grad(f.sum(), x, create_graph=train)
        return f, gradient.flatten(1)
