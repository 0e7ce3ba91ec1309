"""TarFlow, a transformer autoregressive flow — Zhai et al. 2024, "Normalizing Flows are Capable Generative
Models", arXiv:2412.06329.

An image is a sequence x_1 … x_T of patches. Each of `depth` flows maps it to

    z_1 = x_1,   z_i = (x_i − μ(x_<i)) · exp(−α(x_<i)),   log |det dz/dx| = −Σ α

μ and α come from a causal transformer that starts at zero. The order of the patches is reversed from flow to
flow. Images are encoded in one pass. They are decoded patch by patch, x_i = z_i · exp(α) + μ, with the keys
and values of earlier patches in a cache.

Jet (Kolesnikov et al. 2024, arXiv:2412.15129) has couplings instead of these flows. A coupling reads one half
of the numbers, x_1, and transforms the other, with one pass in either direction:

    z_1 = x_1,   z_2 = (x_2 + b(x_1)) · 2 sigmoid(s(x_1))
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gzcli.core.errors import UsageError
from gzcli.core.types import Applied, Batch, DataInfo, Noise, Progress, no_progress
from gzcli.models.labelled import ClusterOptions
from gzcli.models.nn import (
    ClassEmbedding,
    Labels,
    Modules,
    as_interpolations,
    bits_per_dim,
    complete_pairs,
    every_label,
    mix_codes,
    nearer,
    stacked,
    to_fp32,
    zero_init,
)
from gzcli.models.nn.dit import patch_side
from gzcli.models.nn.transformer import Position, TransformerOptions, Trunk, initial_std
from gzcli.models.normalizing_flow import layers
from gzcli.models.normalizing_flow.base import DequantOptions, ImageFlow, top_log_prob


class PatchNet(nn.Module):
    """A transformer over patches x [B, T, D] that returns two numbers, initially 0, for each number of a
    patch."""

    def __init__(self, grid: tuple[int, int], dim: int, options: TransformerOptions):
        super().__init__()
        self.embed = stacked(nn.Linear(dim, options.width), 0)
        self.position = Position(grid, options.width)
        self.trunk = Trunk(options)
        self.out = stacked(zero_init(nn.Linear(options.width, 2 * dim)), 0)


class PatchFlow(PatchNet):
    """The flow with this `index` over patches x [B, T, D]; odd ones run backwards. The condition c [B, 1,
    width] is added to every token."""

    def __init__(self, grid: tuple[int, int], dim: int, options: TransformerOptions, index: int):
        super().__init__(grid, dim, options)
        self.flip = index % 2 == 1

    def ordered(self, x: Tensor) -> Tensor:
        return x.flip(1) if self.flip else x

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """z [B, T, D] and the log-det [B]."""
        x = self.ordered(x)
        h = self.trunk(self.embed(x[:, :-1]) + self.position()[1:] + c, causal=True)
        mu, alpha = to_fp32(self.out(h)).chunk(2, -1)  # of patches 2 … T
        z = torch.cat([x[:, :1], (x[:, 1:] - mu) * (-alpha).exp()], 1)
        return self.ordered(z), -alpha.flatten(1).sum(1)

    def inverse(self, z: Tensor, c: Tensor, guidance: float = 1.0) -> Tensor:
        """x [B, T, D]. With guidance, c is [2B, 1, width], its second half being the null label's, and μ and
        α are extrapolated away from those of the null label."""
        x, position = self.ordered(z).clone(), self.position()
        passes = len(c) // len(z)
        caches = self.trunk.caches(len(c), len(position) - 1)
        for i in range(1, len(position)):
            h = self.embed(x[:, i - 1 : i]).repeat(passes, 1, 1) + position[i] + c
            out = self.out(self.trunk(h, caches=caches))
            if passes == 2:
                out = torch.lerp(out[len(z) :], out[: len(z)], guidance)
            mu, alpha = out.chunk(2, -1)
            x[:, i : i + 1] = x[:, i : i + 1] * alpha.exp() + mu
        return self.ordered(x)


class Coupling(PatchNet):
    """The coupling with this `index` over patches x [B, T, D]. It reads a random half of the numbers of every
    patch; every fifth coupling reads every other patch instead."""

    sees: Tensor  # [T, D], 1 or 0

    def __init__(self, grid: tuple[int, int], dim: int, options: TransformerOptions, index: int):
        super().__init__(grid, dim, options)
        place, draw = torch.arange(math.prod(grid)), torch.Generator().manual_seed(index // 2)
        sees = (torch.randperm(dim, generator=draw) < dim / 2).repeat(len(place), 1)
        if dim == 1 or index % 5 == 4:
            sees = ((place // grid[1] + place % grid[1]) % 2 == 0)[:, None].repeat(1, dim)
        self.register_buffer("sees", (sees ^ (index % 2 == 1)).float(), persistent=False)

    def shift_and_scale(self, x: Tensor, c: Tensor, guidance: float = 1.0) -> tuple[Tensor, Tensor]:
        """b and log(2 sigmoid(s)), [B, T, D], both 0 for the half that the coupling reads."""
        h = self.embed(self.sees * x).repeat(len(c) // len(x), 1, 1)
        out = to_fp32(self.out(self.trunk(h + self.position() + c)))
        if len(out) > len(x):
            out = torch.lerp(out[len(x) :], out[: len(x)], guidance)
        b, s = ((1 - self.sees) * part for part in out.chunk(2, -1))
        return b, F.logsigmoid(s) + math.log(2)

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        b, log_scale = self.shift_and_scale(x, c)
        return (x + b) * log_scale.exp(), log_scale.flatten(1).sum(1)

    def inverse(self, z: Tensor, c: Tensor, guidance: float = 1.0) -> Tensor:
        b, log_scale = self.shift_and_scale(z, c, guidance)
        return z * (-log_scale).exp() - b


FLOWS = {"autoregressive": PatchFlow, "jet": Coupling}


class TarFlow(ImageFlow):
    """A flow of causal transformers over patches.

    Raises UsageError for sizes that do not fit.

    coupling: autoregressive: flows in alternating directions. jet: couplings, which sample in one pass each.
    depth: number of flows or couplings, each with its own transformer. jet needs more of them.
    patch: patch size in pixels. Must divide the image's height and width. Default: the size that gives about
      `tokens` patches.
    tokens: approximate number of patches from which `patch` is derived if it is not set.
    noise_std: standard deviation σ of Gaussian noise in training, for images in [-1, 1], instead of
      dequantization. It reduces the likelihood. Sampling removes it by one step, x + σ² ∇ log p(x).
    """

    paper: ClassVar[str] = "Zhai et al. 2024, arXiv:2412.06329"

    def __init__(
        self,
        data: DataInfo,
        *,
        coupling: Annotated[str, FLOWS] = "autoregressive",
        depth: int = 4,
        patch: int | None = None,
        tokens: int = 64,
        noise_std: float = 0.0,
        net: TransformerOptions = TransformerOptions(layers=2),
        options: DequantOptions = DequantOptions(),
        labels: ClusterOptions = ClusterOptions(),
    ):
        super().__init__(data, options, labels=labels)
        if noise_std and (options.logit or options.dequant != "uniform"):
            hint = "set `model.logit` to 0 and `model.dequant` to uniform, or `model.noise_std` to 0"
            message = (
                "`model.noise_std` replaces dequantisation, and its noise leaves the range of `model.logit`"
            )
            raise UsageError(message, hint=hint)
        C, H, W = data.shape
        self.sigma = noise_std if data.levels is None else noise_std / 2  # for images in [0, 1)
        self.patch = patch_side(H, W, patch, tokens)
        grid, dim = (H // self.patch, W // self.patch), C * self.patch**2
        self.norm = layers.ActNorm(C)
        self.flows: Modules[PatchFlow | Coupling] = Modules(
            FLOWS[coupling](grid, dim, net, i) for i in range(depth)
        )
        self.label = ClassEmbedding(labels.kinds(data), net.width)
        self.label.init_weights(initial_std(net.width))
        self.build_top([(C, H, W)])

    # ---- the bijection

    def to_patches(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, T, D], in raster order."""
        return F.pixel_unshuffle(x, self.patch).flatten(2).mT

    def to_image(self, patches: Tensor) -> Tensor:
        grid = [side // self.patch for side in self.data.shape[1:]]
        return F.pixel_shuffle(patches.mT.unflatten(2, grid), self.patch)

    def embedding(self, y: Labels, n: int, drop: Tensor | None = None) -> Tensor:
        """The condition [n, 1, width] of labels or clusters y, or of the null label."""
        return self.label(y, n, drop)[:, None]

    def encode(self, v: Tensor, c: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        h, log_det = self.preprocess(v)
        h, norm_log_det = self.norm(h)
        x, log_det = self.to_patches(h), log_det + norm_log_det
        c = self.embedding(None, len(v)) if c is None else c
        for flow in self.flows:
            x, flow_log_det = flow(x, c)
            log_det = log_det + flow_log_det
        return [self.to_image(x)], log_det

    def decode(
        self,
        z: list[Tensor],
        progress: Progress = no_progress,
        c: Tensor | None = None,
        guidance: float = 1.0,
    ) -> Tensor:
        x, null = self.to_patches(z[0]), self.embedding(None, len(z[0]))
        c = null if c is None else c if guidance == 1 else torch.cat([c, null])
        # without autocast: an error in a patch grows in later ones
        with torch.autocast(x.device.type, enabled=False):
            for i, flow in enumerate(reversed(self.flows), 1):
                x = flow.inverse(x, c, guidance)
                progress(i, len(self.flows))
            return self.postprocess(self.norm.inverse(self.to_image(x)))

    # ---- likelihood

    def log_density(self, v: Tensor, c: Tensor) -> Tensor:
        """log p(v | c), [B] nats."""
        [z], log_det = self.encode(v, c)
        return log_det + top_log_prob(z, *self.top)

    def log_joint(self, x: Tensor, labels: Labels, noise: Noise, *, each_class: bool = False) -> Tensor:
        (v, constant), y = self.to_unit(x, noise), self.image_condition(x, labels)
        log_p = constant + self.log_density(v, self.embedding(y, len(x)))
        return log_p + self.condition_log_prob(y, labels)

    def middle(self, x: Tensor) -> Tensor:
        """x in [0, 1), at the middle of the bins of its grey levels."""
        levels = self.data.levels
        return x if levels is None else layers.dequantise(x, levels, torch.full_like(x, 0.5))[0]

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """−log p in nats of dequantised images, or of images with Gaussian noise."""
        x, (y, drop) = batch.x, self.training_labels(batch)
        c = self.embedding(y, len(x), drop)
        if self.sigma:
            v = self.middle(x) + self.sigma * batch.noise.randn(*x.shape)
            return {"loss": -self.log_density(v, c).mean()}
        v, constant = self.to_unit(x, batch.noise)
        nll = -(constant + self.log_density(v, c)).mean()
        return {"loss": nll, "bpd": bits_per_dim(nll, self.data)}

    # ---- sampling and applications

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Labels = None,
        noise: Noise,
        progress: Progress = no_progress,
        temperature: float = 1.0,
        guidance: float | None = None,
    ) -> Tensor:
        """Draws n images [n, C, H, W], patch by patch. If the model was trained on noisy images, they are
        denoised.

        temperature: factor of the standard deviation of every latent.
        guidance: guidance scale of μ and α, at twice the cost. 1: no guidance; above 1: sharper. Default: 1,
          or 1.3 for models with clusters.
        """
        guidance, y = self.guidance_scale(guidance), self.draw_labels(labels, n, noise)
        self.check_guidance(guidance, y)
        c, (mean, log_std) = self.embedding(y, n), self.top_prior(None, n)
        z = mean + log_std.exp() * temperature * noise.randn(n, *self.data.shape)
        v = self.decode([z], progress, c, guidance)
        return self.from_unit(self.denoised(v, c) if self.sigma else v)

    def denoised(self, v: Tensor, c: Tensor) -> Tensor:
        """E[v without noise | v, c] = v + σ² ∇ log p(v | c), by Tweedie's formula."""
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(v.device.type, enabled=False):
            v = v.clone().requires_grad_()
            (score,) = torch.autograd.grad(self.log_density(v, c.clone()).sum(), v)
        return v.detach() + self.sigma**2 * score

    @torch.no_grad()
    def interpolate(
        self,
        x: Tensor,
        *,
        labels: Labels = None,
        noise: Noise,
        progress: Progress = no_progress,
        frames: int = 8,
    ) -> Applied:
        """Interpolates between image 0 and 1, 2 and 3, … along straight lines of latents. Each frame has the
        label of the nearer image.

        frames: images of an interpolation, both ends included.
        """
        x = complete_pairs(x)
        ends = None if labels is None else labels[: len(x)]
        c = self.embedding(self.image_condition(x, ends), len(x))
        (z,), _ = self.encode(self.to_unit(x, noise.first(len(x)))[0], c)
        z = mix_codes(z.flatten(1), frames).unflatten(1, z.shape[1:])
        v = self.decode([z], progress, nearer(c, frames))
        return as_interpolations(self.from_unit(v), frames, nearer(ends, frames))

    @torch.no_grad()
    def edit(
        self,
        x: Tensor,
        *,
        labels: Labels = None,
        y: Labels = None,
        noise: Noise,
        progress: Progress = no_progress,
        strength: float = 1.0,
    ) -> Applied:
        """Encodes x as an image of its class, or of the most probable class (multi-label: none), and decodes
        it as an image of `labels`. Without labels, the images get all classes in turn. Raises UsageError for
        an unconditional model.

        strength: how far the class embedding is moved. 1: to the labels' embedding; below 0: away from it.
        """
        self.check_edit()
        if y is None and not self.data.multilabel:
            each = every_label(self.data, len(x), x.device)
            y = torch.stack([self.log_joint(x, label, noise) for label in each]).argmax(0)
        source = self.embedding(self.image_condition(x, y), len(x))
        labels = self.requested_labels(labels, len(x))
        target = self.embedding(self.draw_labels(labels, len(x), noise), len(x))
        z = self.encode(self.to_unit(x, noise)[0], source)[0]
        v = self.decode(z, progress, torch.lerp(source, target, strength))
        return Applied(self.from_unit(v), rows=("edited",), labels=labels)
