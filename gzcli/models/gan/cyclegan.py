"""CycleGAN — Zhu, Park, Isola & Efros 2017, "Unpaired Image-to-Image Translation using Cycle-Consistent
Adversarial Networks", arXiv:1703.10593.

    generator:     E (D_B(G(a)) − 1)² + E (D_A(F(b)) − 1)²                          (eq. 1, section 4)
                   + λ (E ‖F(G(a)) − a‖₁ + E ‖G(F(b)) − b‖₁)                        (eq. 2)
                   + λ·ι (E ‖G(b) − b‖₁ + E ‖F(a) − a‖₁)                            (section 5.2)
    discriminator: E (D(real) − 1)² / 2 + E D(fake)² / 2, of both domains           (section 4)

G: A → B and F: B → A are learned from unpaired images a and b. All norms are means over the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gzcli.core import ranks
from gzcli.core.errors import UsageError
from gzcli.core.hints import Option, advice
from gzcli.core.types import Applied, Batch, DataInfo, Noise, Progress, moved_to
from gzcli.models.base import Model, Phase
from gzcli.models.nn import Labels, from_levels, to_fp32, to_levels
from gzcli.models.nn.adversarial import LEAST_SQUARES, PatchGAN, critic_outputs
from gzcli.models.nn.perceptual import gaussian_window, ssim_parts


class ImagePool(nn.Module):
    """Up to `size` earlier fakes of all ranks, for the discriminator (Shrivastava et al. 2016,
    arXiv:1612.07828, section 2.3). Once the pool is full, it returns a new image, or stores it and returns an
    earlier one instead."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.count = size, 0
        self.images: Tensor | None = None  # [size, C, H, W]

    @torch.compiler.disable  # it would recompile for every count
    @torch.no_grad()
    def forward(self, images: Tensor, noise: Noise) -> Tensor:
        """The discriminator's images, which replace images [B, C, H, W]. The host never waits for the
        device."""
        if not self.size:
            return images
        n = len(images)
        from_pool, slot = ranks.rows(noise.rand(n), self) < 0.5, ranks.rows(noise.randint(self.size, n), self)
        images = ranks.rows(images, self)
        pool = images.new_zeros(self.size, *images.shape[1:]) if self.images is None else self.images
        self.images = pool = pool.to(images)
        out = images.clone()
        for i in range(len(images)):
            if self.count < self.size:
                pool[self.count] = images[i]
                self.count += 1
                continue
            stored = pool.index_select(0, slot[i : i + 1])
            out[i] = torch.where(from_pool[i], stored[0], images[i])
            pool.index_copy_(0, slot[i : i + 1], torch.where(from_pool[i], images[i : i + 1], stored))
        return ranks.own_rows(out, self)

    def get_extra_state(self) -> dict[str, Any]:
        return {"count": self.count, "images": None if self.images is None else self.images.cpu()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.count, self.images = state["count"], state["images"]


class Translator(nn.Module):
    """Images [B, C, H, W] of one domain, of any size → the other domain, in [-1, 1], fp32 (section 4)."""

    def __init__(self, channels: int, width: int = 32, halvings: int = 2, blocks: int = 4):
        super().__init__()
        widths = [width * 2**i for i in range(halvings + 1)]
        strides: dict[str, Any] = {"stride": 2, "padding": 1, "bias": False}
        self.stem = norm_relu(reflect_conv(channels, width, 7))
        self.downs = nn.ModuleList(norm_relu(nn.Conv2d(i, o, 3, **strides)) for i, o in pairwise(widths))
        self.blocks = nn.Sequential(*(CycleBlock(widths[-1]) for _ in range(blocks)))
        ups = (nn.ConvTranspose2d(i, o, 3, **strides) for i, o in pairwise(reversed(widths)))
        self.ups = nn.ModuleList(ups)
        self.head = reflect_conv(width, channels, 7, bias=True)
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


class CycleBlock(nn.Module):
    """A residual block: two convolutions with instance norm."""

    def __init__(self, width: int):
        super().__init__()
        first, second = (reflect_conv(width, width, 3) for _ in range(2))
        self.net = nn.Sequential(*norm_relu(first), second, nn.InstanceNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


def norm_relu(conv: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(conv, nn.InstanceNorm2d(conv.out_channels), nn.ReLU())


def reflect_conv(inputs: int, outputs: int, kernel: int, bias: bool = False) -> nn.Conv2d:
    """A convolution that keeps the size, with reflection at the borders."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, padding_mode="reflect", bias=bias)


MEMORY_IMAGES = 32  # training images of each domain in the memory, which `sample` translates
SampleDirection = Literal["both", "AtoB", "BtoA"]
Direction = Literal["auto", "AtoB", "BtoA"]


class CycleGAN(Model):
    """Two translators and two discriminators, for a set of two classes: A is the first, B the second.

    A step takes a batch of each domain. The just updated generators draw the discriminators' fakes. Raises
    UsageError for images that are too small.

    width: channels of a translator at full resolution, doubled at each halving.
    halvings: number of times that a translator halves the resolution.
    blocks: residual blocks of a translator at the smallest size.
    disc_width: channels of a discriminator's first layer, doubled by each further one.
    disc_layers: number of stride-2 convolutions in a discriminator.
    cycle: weight λ of the L1 error of the cycle.
    identity: weight ι, as a fraction of λ, of the L1 change of images that are already in the target domain.
      It preserves colours.
    pool: number of earlier generated images that each discriminator may see again.
    """

    paper = "Zhu et al. 2017, arXiv:1703.10593"
    needs: ClassVar = ("second_domain",)
    memory: Tensor  # the kept training images as bytes, [2, MEMORY_IMAGES, C, H, W]; 0 until the first step

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
        # reflection takes 3 pixels of the image itself, and 1 at the smallest size
        if min(sides) < 4 or math.ceil(min(sides) / 2**halvings) < 2:
            message = (
                f"images of {sides[0]}×{sides[1]} are too small for translators with {halvings} halvings"
            )
            raise UsageError(message, hint="lower `model.halvings`")
        self.a_to_b, self.b_to_a = (Translator(c, width, halvings, blocks) for _ in "AB")
        self.disc_a, self.disc_b = (
            PatchGAN(data.shape, disc_width, disc_layers, norm="instance") for _ in "AB"
        )
        self.pool_a, self.pool_b = ImagePool(pool), ImagePool(pool)
        self.cycle, self.identity, self.step = cycle, identity, 0
        self.register_buffer("memory", torch.zeros(2, MEMORY_IMAGES, *data.shape, dtype=torch.uint8))

    # ---- training

    def phases(self) -> list[Phase]:
        return [
            Phase("generator", [*self.a_to_b.parameters(), *self.b_to_a.parameters()]),
            Phase("discriminator", [*self.disc_a.parameters(), *self.disc_b.parameters()]),
        ]

    def on_start(self, batch: Batch) -> None:
        """Fills the memory with the first batch, repeated, unless it was loaded."""
        first = self.domain_bytes(batch.x, batch.extra["second_domain"])
        repeated = first[:, torch.arange(MEMORY_IMAGES, device=first.device) % first.shape[1]]
        self.memory.copy_(torch.where((self.memory > 0).any(), self.memory, repeated))

    def on_step(self, step: int) -> None:
        self.step = step + 1

    @torch.compiler.disable  # it would recompile for every step
    @torch.no_grad()
    def remember(self, a: Tensor, b: Tensor) -> None:
        """Fills the memory with the training images of the first steps on all ranks."""
        if self.step >= MEMORY_IMAGES:  # every step adds at least one image, so the memory is full
            return
        images = self.domain_bytes(a, b)
        first = self.step * images.shape[1]
        target = self.memory[:, first : first + images.shape[1]]
        target.copy_(images[:, : target.shape[1]])

    def domain_bytes(self, a: Tensor, b: Tensor) -> Tensor:
        """Images of both domains from all ranks, as bytes [2, B, C, H, W]."""
        return to_levels(torch.stack([ranks.rows(a, self), ranks.rows(b, self)]), 256).byte()

    def loss(self, batch: Batch, phase: str = "generator") -> dict[str, Tensor]:
        """The loss of a phase. For a held-out batch, which mixes both domains, it is the generators' cycle
        loss."""
        if "second_domain" not in batch.extra:
            return {"loss": self.cycle * self.cycle_error(batch.x, self.is_from_a(batch.x, batch.y)).mean()}
        a, b = batch.x, batch.extra["second_domain"]
        if phase == "discriminator":
            return self.discriminator_loss(a, b, batch.noise)
        if self.training:
            self.remember(a, b)
        fake_b, same_b = self.a_to_b(torch.cat([a, b])).chunk(2)
        fake_a, same_a = self.b_to_a(torch.cat([b, a])).chunk(2)
        fooled = LEAST_SQUARES.generator
        gan = fooled(self.disc_a(fake_a)) + fooled(self.disc_b(fake_b))
        cycle = F.l1_loss(self.b_to_a(fake_b), a) + F.l1_loss(self.a_to_b(fake_a), b)
        identity = F.l1_loss(same_a, a) + F.l1_loss(same_b, b)
        loss = gan + self.cycle * (cycle + self.identity * identity)
        return {"loss": loss, "gan": gan.detach(), "cycle": cycle.detach(), "identity": identity.detach()}

    def discriminator_loss(self, a: Tensor, b: Tensor, noise: Noise) -> dict[str, Tensor]:
        with torch.no_grad():
            fake_a, fake_b = self.pool_a(self.b_to_a(b), noise), self.pool_b(self.a_to_b(a), noise)
        loss_a = 0.5 * LEAST_SQUARES.critic(*critic_outputs(self.disc_a, a, fake_a))
        loss_b = 0.5 * LEAST_SQUARES.critic(*critic_outputs(self.disc_b, b, fake_b))
        return {"loss": loss_a + loss_b, "a": loss_a.detach(), "b": loss_b.detach()}

    # ---- translation

    def to_other_domain(self, x: Tensor, from_a: Tensor | bool) -> Tensor:
        """Each image translated to the other domain, [B, C, H, W]. from_a: whether all images, or each image
        [B], are from A."""
        # with [B] both networks translate every image: selecting rows would make the host wait
        if isinstance(from_a, bool):
            return self.a_to_b(x) if from_a else self.b_to_a(x)
        return torch.where(from_a[:, None, None, None], self.a_to_b(x), self.b_to_a(x))

    def there_and_back(self, x: Tensor, from_a: Tensor | bool) -> Tensor:
        """Each image translated to the other domain and back, [B, C, H, W]."""
        back = not from_a if isinstance(from_a, bool) else ~from_a
        return self.to_other_domain(self.to_other_domain(x, from_a), back)

    def cycle_error(self, x: Tensor, from_a: Tensor | bool) -> Tensor:
        """The mean absolute difference between each image and its translation there and back, [B]."""
        return (self.there_and_back(x, from_a) - x).abs().flatten(1).mean(1)

    def is_from_a(self, x: Tensor, y: Labels) -> Tensor:
        """Whether each image is from A, [B], by its label y. Without labels, an image is from A if the
        translator to A changes it less than the translator to B."""
        if y is not None:
            return y.eq(0)
        to_a, to_b = ((net(x) - x).abs().flatten(1).mean(1) for net in (self.b_to_a, self.a_to_b))
        return to_a < to_b

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Labels = None,
        noise: Noise,
        progress: Progress,
        direction: SampleDirection = "both",
    ) -> Tensor:
        """Translates training images that are drawn at random from those that the model keeps.

        direction: direction of translation. `AtoB` and `BtoA` use images of one domain, `both` uses either.
        """
        x, from_a = self.draw_memory(n, noise, direction)
        x = self.to_other_domain(x, from_a)
        progress(1, 1, x)
        return x

    def sources(self, n: int, *, noise: Noise, direction: SampleDirection = "both") -> Tensor:
        """The images [n, C, H, W] that `sample` translates, given the same noise."""
        return self.draw_memory(n, noise, direction)[0]

    def draw_memory(self, n: int, noise: Noise, direction: SampleDirection) -> tuple[Tensor, Tensor | bool]:
        """n images drawn from the memory for a direction, and whether they are from A."""
        domains = {"both": slice(0, 2), "AtoB": slice(0, 1), "BtoA": slice(1, 2)}[direction]
        images = self.memory[domains].flatten(0, 1)
        pick = noise.randint(len(images), n)
        return from_levels(
            images[pick], 256
        ), pick < MEMORY_IMAGES if direction == "both" else direction == "AtoB"

    @torch.no_grad()
    def translate(
        self, x: Tensor, *, y: Labels = None, noise: Noise, progress: Progress, direction: Direction = "auto"
    ) -> Applied:
        """Translates images to the other domain.

        direction: direction of translation. `AtoB` and `BtoA` use the images labelled with one domain, or all
          if there are no labels. `auto` translates every image from its domain; without labels, by the
          translator that changes it less.
        """
        return self.translation(x, y, direction, progress, back=False)

    @torch.no_grad()
    def reconstruct(
        self, x: Tensor, *, y: Labels = None, noise: Noise, progress: Progress, direction: Direction = "auto"
    ) -> Applied:
        """Translates images to the other domain and back.

        direction: images and domain to start from, see `translate`.
        """
        return self.translation(x, y, direction, progress, back=True)

    def translation(
        self, x: Tensor, y: Labels, direction: Direction, progress: Progress, back: bool
    ) -> Applied:
        """The translations of the images that can be translated in a direction; with `back`, translated
        back."""
        rows = torch.arange(len(x), device=x.device)
        from_a: Tensor | bool = direction == "AtoB"
        if direction == "auto":
            from_a = self.is_from_a(x, y)
        elif y is not None:
            rows = rows[(y == 0) == from_a]
        if not len(rows):
            raise UsageError(
                f"none of these images can be translated {direction}",
                hint=advice("use {}", Option("direction", "auto")),
            )
        x = (self.there_and_back if back else self.to_other_domain)(x[rows], from_a)
        progress(1, 1, x)
        to_b = torch.zeros_like(rows) + from_a  # class 1, which is B, for an image of A
        name, labels = ("there and back", 1 - to_b) if back else ("translation", to_b)
        return Applied(x, rows=(name,), of=tuple((i,) for i in rows.tolist()), labels=labels)

    def measure(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Metrics of held-out images, whose domains are their labels. Errors are shares of the pixels' range.

        cycle_l1: L1 error of the cycle.
        identity_l1: L1 error of the identity.
        ssim: SSIM of images and their translations.
        """
        sums, n = torch.zeros(3, dtype=torch.float64), 0
        window = gaussian_window(min(11, *self.data.shape[1:]), 1.5)
        for batch in batches:
            x, from_a = batch.x, self.is_from_a(batch.x, batch.y)
            window = moved_to(window, x.device)
            identity = (self.to_other_domain(x, ~from_a) - x).abs().flatten(1).mean(1)
            ssim = ssim_parts((x + 1) / 2, (self.to_other_domain(x, from_a) + 1) / 2, window)[0].mean(1)
            for i, value in enumerate((self.cycle_error(x, from_a) / 2, identity / 2, ssim)):
                sums[i] += value.cpu().double().sum()
            n += len(batch)
        return dict(zip(("cycle_l1", "identity_l1", "ssim"), (sums / n).tolist(), strict=True))

    # ---- out-of-distribution scores

    def score_disc(self, x: Tensor, *, noise: Noise) -> Tensor:
        """−max(D_A(x), D_B(x)), each a mean over patches. It is large if both discriminators consider x
        fake."""
        return -torch.maximum(*(net(x).flatten(1).mean(1) for net in (self.disc_a, self.disc_b)))

    def score_cycle(self, x: Tensor, *, noise: Noise) -> Tensor:
        """The cycle error in the direction in which it is smaller."""
        return torch.minimum(*(self.cycle_error(x, from_a) for from_a in (True, False)))

    def map_cycle(self, x: Tensor, *, noise: Noise) -> Tensor:
        """The cycle error at each pixel [B, H, W], averaged over channels, in the same direction."""
        a, b = ((self.there_and_back(x, from_a) - x).abs().mean(1) for from_a in (True, False))
        return torch.where((a.mean((1, 2)) < b.mean((1, 2)))[:, None, None], a, b)
