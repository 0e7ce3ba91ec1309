"""CycleGAN — Zhu, Park, Isola & Efros 2017, "Unpaired Image-to-Image Translation using Cycle-Consistent
Adversarial Networks", arXiv:1703.10593.

    generator:     E (D_B(G(a)) − 1)² + E (D_A(F(b)) − 1)²
                   + λ (E ‖F(G(a)) − a‖₁ + E ‖G(F(b)) − b‖₁) + λ·ι (E ‖G(b) − b‖₁ + E ‖F(a) − a‖₁)       (eq.
                   1–3, section 5.2)
    discriminator: E (D(real) − 1)² / 2 + E D(fake)² / 2, of both domains
    (section 4)

G: A → B and F: B → A are learned from images a and b that have nothing to do with each other; all norms are
means.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli import ranks
from gzcli.errors import UsageError
from gzcli.models.base import Model, Phase
from gzcli.models.gan.pool import ImagePool
from gzcli.models.nn import PatchGAN, from_levels, to_fp32, to_levels
from gzcli.models.vae.ssim import gaussian_window, ssim_parts
from gzcli.types import Applied, Batch, DataInfo, Noise, Progress

MEMORY = 32  # images of each domain that `sample` starts from

Direction = Literal["auto", "AtoB", "BtoA"]


class ResBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(
            reflecting(width, width, 3),
            nn.InstanceNorm2d(width),
            nn.ReLU(),
            reflecting(width, width, 3),
            nn.InstanceNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


def reflecting(inputs: int, outputs: int, kernel: int, bias: bool = False) -> nn.Conv2d:
    """A convolution that keeps the size. What instance norm follows needs no bias."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, padding_mode="reflect", bias=bias)


class Translator(nn.Module):
    """Images [B, C, H, W] of one domain → of the other, in [-1, 1], fp32: the residual net of Johnson et al.
    2016 (arXiv:1603.08155), with instance norm, so that no image sees its batch. Any size; halves are rounded
    up."""

    def __init__(self, channels: int, width: int, halvings: int, blocks: int):
        super().__init__()
        widths = [width * 2**i for i in range(halvings + 1)]
        self.stem = nn.Sequential(reflecting(channels, width, 7), nn.InstanceNorm2d(width), nn.ReLU())
        self.downs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False), nn.InstanceNorm2d(o), nn.ReLU()
            )
            for i, o in pairwise(widths)
        )
        self.blocks = nn.Sequential(*(ResBlock(widths[-1]) for _ in range(blocks)))
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(i, o, 3, stride=2, padding=1, bias=False)
            for i, o in pairwise(reversed(widths))
        )
        self.head = reflecting(width, channels, 7, bias=True)
        for m in self.modules():
            if isinstance(m, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.normal_(m.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        h, sizes = self.stem(x), []
        for down in self.downs:
            sizes.append(h.shape[2:])
            h = down(h)
        h = self.blocks(h)
        for up, size in zip(self.ups, reversed(sizes), strict=True):
            h = F.relu(F.instance_norm(up(h, output_size=size)))
        return torch.tanh(to_fp32(self.head(h)))


class CycleGAN(Model):
    """Two translators and two discriminators, for a set of two classes: A is the first, B the second.

    width: channels of the translators' finest scale, doubled by each of `halvings`; blocks: residual blocks
    of the coarsest.
    disc_width, disc_layers: of the PatchGANs. cycle: λ; identity: ι, for colours that should stay. pool: how
    many earlier fakes a discriminator may be shown again.
    A step takes a batch of each domain. The discriminators' fakes are made anew, by the generators that were
    just updated.
    """

    paper = "Zhu et al. 2017, arXiv:1703.10593"
    needs: ClassVar = ("b",)

    def __init__(
        self,
        data: DataInfo,
        *,
        width: int = 32,
        halvings: int = 2,
        blocks: int = 4,
        disc_width: int = 32,
        disc_layers: int = 2,
        cycle: float = 10.0,
        identity: float = 0.5,
        pool: int = 50,
    ):
        super().__init__(data)
        c, *sides = data.shape
        if (
            min(sides) < 4 or math.ceil(min(sides) / 2**halvings) < 2
        ):  # the padding mirrors 3 pixels here, 1 there
            small = f"images of {sides[0]}×{sides[1]} are too small for translators of {halvings} halvings"
            raise UsageError(small, hint="lower `model.halvings`")
        self.a_to_b, self.b_to_a = (Translator(c, width, halvings, blocks) for _ in "AB")
        self.disc_a, self.disc_b = (
            PatchGAN(data.shape, disc_width, disc_layers, norm="instance") for _ in "AB"
        )
        self.pool_a, self.pool_b = ImagePool(pool), ImagePool(pool)
        self.cycle, self.identity, self.step = cycle, identity, 0
        self.register_buffer("memory", torch.zeros(2, MEMORY, *data.shape, dtype=torch.uint8))

    # ---- training

    def phases(self) -> list[Phase]:
        return [
            Phase("generator", [*self.a_to_b.parameters(), *self.b_to_a.parameters()]),
            Phase("discriminator", [*self.disc_a.parameters(), *self.disc_b.parameters()]),
        ]

    def on_start(self, batch: Batch) -> None:
        """The memory is the first batch, over and over; after a resume what it was. No host sync."""
        first = self.seen(batch.x, batch.extra["b"])
        over = first[:, torch.arange(MEMORY, device=first.device) % first.shape[1]]
        self.memory.copy_(torch.where((self.memory > 0).any(), self.memory, over))

    def on_step(self, step: int) -> None:
        self.step = step + 1

    @torch.compiler.disable  # which would compile anew for every step
    @torch.no_grad()
    def remember(self, a: Tensor, b: Tensor) -> None:
        """The memory is filled with the training images of the first steps, those of all ranks."""
        if self.step >= MEMORY:  # it is full: a step brings one at least
            return
        images = self.seen(a, b)
        first = self.step * images.shape[1]
        place = self.memory[:, first : first + images.shape[1]]
        place.copy_(images[:, : place.shape[1]])

    def seen(self, a: Tensor, b: Tensor) -> Tensor:
        """Images of both domains, of all ranks, as bytes [2, B, C, H, W]."""
        return to_levels(torch.stack([ranks.rows(a, self), ranks.rows(b, self)]), 256).byte()

    def loss(self, batch: Batch, phase: str = "generator") -> dict[str, Tensor]:
        """In evaluation, of images of either domain by their label, the generators' loss is that of the
        cycle."""
        if "b" not in batch.extra:
            return {"loss": self.cycle * self.cycle_error(batch.x, batch.y == 0).mean()}
        a, b = batch.x, batch.extra["b"]
        if phase == "discriminator":
            return self.discriminator_loss(a, b, batch.noise)
        if self.training:
            self.remember(a, b)
        fake_b, same_b = self.a_to_b(torch.cat([a, b])).chunk(2)
        fake_a, same_a = self.b_to_a(torch.cat([b, a])).chunk(2)
        gan = (self.disc_a(fake_a) - 1).square().mean() + (self.disc_b(fake_b) - 1).square().mean()
        cycle = F.l1_loss(self.b_to_a(fake_b), a) + F.l1_loss(self.a_to_b(fake_a), b)
        identity = F.l1_loss(same_a, a) + F.l1_loss(same_b, b)
        loss = gan + self.cycle * (cycle + self.identity * identity)
        return {"loss": loss, "gan": gan.detach(), "cycle": cycle.detach(), "identity": identity.detach()}

    def discriminator_loss(self, a: Tensor, b: Tensor, noise: Noise) -> dict[str, Tensor]:
        with torch.no_grad():
            fake_a, fake_b = self.pool_a(self.b_to_a(b), noise), self.pool_b(self.a_to_b(a), noise)
        loss_a, loss_b = lsgan(self.disc_a, a, fake_a), lsgan(self.disc_b, b, fake_b)
        return {"loss": loss_a + loss_b, "a": loss_a.detach(), "b": loss_b.detach()}

    # ---- translation

    def translated(self, x: Tensor, from_a: Tensor | bool) -> Tensor:
        """Each image to the other domain; from_a: whether all are of A, or each [B], at the price of both
        nets and without a host sync."""
        if isinstance(from_a, bool):
            return self.a_to_b(x) if from_a else self.b_to_a(x)
        return torch.where(from_a[:, None, None, None], self.a_to_b(x), self.b_to_a(x))

    def returned(self, x: Tensor, from_a: Tensor | bool) -> Tensor:
        """Each image to the other domain and back."""
        back = not from_a if isinstance(from_a, bool) else ~from_a
        return self.translated(self.translated(x, from_a), back)

    def cycle_error(self, x: Tensor, from_a: Tensor | bool) -> Tensor:
        """Mean absolute difference of each image and its return from the other domain, [B]."""
        return (self.returned(x, from_a) - x).abs().flatten(1).mean(1)

    def looks_like_a(self, x: Tensor) -> Tensor:
        """Whether each image [B] is taken for one of A: by which translator changes it less."""
        to_a, to_b = ((net(x) - x).abs().flatten(1).mean(1) for net in (self.b_to_a, self.a_to_b))
        return to_a < to_b

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress,
        direction: Literal["both", "AtoB", "BtoA"] = "both",
    ) -> Tensor:
        """Translations of training images, drawn from the few that the model remembers; `both`: of either
        domain."""
        known, pick = self.remembered(n, noise, direction)
        from_a = pick < MEMORY if direction == "both" else direction == "AtoB"
        x = self.translated(from_levels(known[pick], 256), from_a)
        progress(1, 1, x)
        return x

    def remembered(self, n: int, noise: Noise, direction: str) -> tuple[Tensor, Tensor]:
        """The memory's images that can go in a direction, as bytes, and which of them samples are made from
        [n]."""
        domains = {"both": slice(0, 2), "AtoB": slice(0, 1), "BtoA": slice(1, 2)}[direction]
        known = self.memory[domains].flatten(0, 1)
        return known, noise.randint(len(known), n).to(known.device)

    def sources(self, n: int, *, noise: Noise, direction: Literal["both", "AtoB", "BtoA"] = "both") -> Tensor:
        """What `sample` translates, given the same noise: [n, C, H, W]."""
        known, pick = self.remembered(n, noise, direction)
        return from_levels(known[pick], 256)

    @torch.no_grad()
    def translate(
        self,
        x: Tensor,
        *,
        y: Tensor | None = None,
        noise: Noise,
        progress: Progress,
        direction: Direction = "auto",
    ) -> Applied:
        """Each image to the other domain; in one direction those alone that are of its domain, where their
        labels y [B] tell. With `auto` and without y an image is taken for one of the domain whose own
        translator would change it less. Raises UsageError where there is none.
        """
        rows, from_a = self.suited(x, direction, y)
        x = self.translated(x[rows], from_a)
        progress(1, 1, x)
        labels = torch.zeros_like(rows) + from_a  # of B, where it came from A
        return Applied(x, rows=("translation",), of=tuple((i,) for i in rows.tolist()), labels=labels)

    @torch.no_grad()
    def reconstruct(
        self,
        x: Tensor,
        *,
        y: Tensor | None = None,
        noise: Noise,
        progress: Progress,
        direction: Direction = "auto",
    ) -> Applied:
        """Each image to the other domain and back; which, as in `translate`."""
        rows, from_a = self.suited(x, direction, y)
        x = self.returned(x[rows], from_a)
        progress(1, 1, x)
        labels = 1 - (torch.zeros_like(rows) + from_a)
        return Applied(x, rows=("there and back",), of=tuple((i,) for i in rows.tolist()), labels=labels)

    def suited(self, x: Tensor, direction: Direction, y: Tensor | None) -> tuple[Tensor, Tensor | bool]:
        """The numbers of the images that can go in a direction, and whether all of them are of A, or each
        is."""
        rows = torch.arange(len(x), device=x.device)
        if direction == "auto":
            return rows, self.looks_like_a(x) if y is None else y == 0
        from_a = direction == "AtoB"
        rows = rows if y is None else rows[(y == 0) == from_a]
        if not len(rows):
            hint = "`--direction auto` takes images of either domain"
            raise UsageError(f"none of these images can go {direction}", hint=hint)
        return rows, from_a

    def measure(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Of images of either domain by their label: the cycle's and the identity's L1 as shares of the
        pixels' range, and the SSIM of images and their translations."""
        sums, n = torch.zeros(3, dtype=torch.float64), 0
        window = gaussian_window(min(11, *self.data.shape[1:]), 1.5)
        for batch in batches:
            x, from_a = batch.x, batch.y == 0
            same = (self.translated(x, ~from_a) - x).abs()
            like = ssim_parts((x + 1) / 2, (self.translated(x, from_a) + 1) / 2, window)[0]
            found = (self.cycle_error(x, from_a) / 2, same.flatten(1).mean(1) / 2, like.mean(1))
            sums += torch.stack([value.cpu().double().sum() for value in found])
            n += len(batch)
        return dict(zip(("cycle_l1", "identity_l1", "ssim"), (sums / n).tolist(), strict=True))

    # ---- out-of-distribution scores

    def score_disc(self, x: Tensor, *, noise: Noise) -> Tensor:
        """−max(D_A(x), D_B(x)), each the mean over its patches: neither takes x for its own."""
        return -torch.maximum(*(net(x).flatten(1).mean(1) for net in (self.disc_a, self.disc_b)))

    def score_cycle(self, x: Tensor, *, noise: Noise) -> Tensor:
        """The error of the cycle, of the direction that suits x better."""
        return torch.minimum(*(self.cycle_error(x, from_a) for from_a in (True, False)))


def lsgan(disc: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """Least squares instead of log-likelihoods (Mao et al. 2016, arXiv:1611.04076)."""
    on_real, on_fake = disc(torch.cat([real, fake])).chunk(2)
    return 0.5 * ((on_real - 1).square().mean() + on_fake.square().mean())
