"""InstructPix2Pix — Brooks, Holynski & Efros 2023, arXiv:2211.09800: edits images by instructions.

    ε̂(z_t, t, c, y) = U-Net([z_t, E(y)], t, c)
    ε̃ = ε̂(z_t, ∅, ∅) + s_y (ε̂(z_t, ∅, y) − ε̂(z_t, ∅, ∅)) + s_c (ε̂(z_t, c, y) − ε̂(z_t, ∅, y))          (eq. 3)

c is the instruction, y the image before the edit, and E(y) the unscaled mean of the VAE's posterior. The
whole U-Net is trained, with new input channels that start at zero. The instruction, the image, and both are
each hidden in 5 % of the cases (section 3.2.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from torch import Tensor, nn

from gzcli.core.types import Batch, DataInfo, Noise, Progress
from gzcli.core.units import Size
from gzcli.models.stable_diffusion.base import PromptOptions, StableDiffusion, TuningOptions, per_row, resize
from gzcli.models.stable_diffusion.kinds import Kind


class InstructPix2Pix(StableDiffusion):
    """An image editor based on Stable Diffusion 1.x or 2.x.

    dropout: probability of hiding the instruction in training. The same applies to the image, and to both.
    """

    paper = "Brooks et al. 2023, arXiv:2211.09800"
    needs: ClassVar[tuple[str, ...]] = ("caption", "before")
    condition: ClassVar[str] = "before"
    kinds: ClassVar[tuple[type[Kind], ...]] = (Kind,)
    trains_unet: ClassVar[bool] = True

    def __init__(self, data: DataInfo, *, dropout: float = 0.05, tuning: TuningOptions = TuningOptions()):
        super().__init__(data, tuning)
        self.dropout = dropout
        widen(self.unet, self.vae.config.latent_channels)

    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        prepared = super().prepare(batch)
        if prepared:
            prepared["before_latent"] = self.encode(batch.extra["before"])[0].half()
        return prepared

    def conditions(self, batch: Batch) -> dict[str, Tensor]:
        """The texts, and `before`: the latents of the images before the edit."""
        # one draw u an image: in [0, p) the instruction is hidden, in [p, 2p) both, in [2p, 3p) the image
        latent = batch.extra.get("before_latent")
        before = self.encode(batch.extra["before"])[0] if latent is None else latent.to(batch.x)
        u, p = batch.noise.rand(len(batch)), self.dropout
        blind = (u >= p) & (u < 3 * p)
        before = torch.where(per_row(blind, before), 0.0, before)
        return self.embed_captions(batch, u < 2 * p) | {"before": before}

    def denoise(self, z_t: Tensor, t: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        return super().denoise(torch.cat([z_t, conditions["before"].to(z_t)], 1), t, conditions)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress,
        before: Tensor | None = None,
        prompting: PromptOptions = PromptOptions(),
        image_guidance: float = 1.5,
    ) -> Tensor:
        """Edits the images `before` [n, C, H, W] in [-1, 1] (by default, stored ones) by the prompts.
        `guidance` is s_c of eq. 3.

        image_guidance: image guidance scale, s_I of eq. 3. 1: no guidance.
        """
        z, sides = self.initial_latents(n, noise, prompting.size)
        prompts, images = self.examples(n, noise, prompting.prompt, before)
        pipe = self.pipeline(StableDiffusionInstructPix2PixPipeline)
        latents = {"image": self.encode(resize(images, sides))[0]}
        return self.draw(
            pipe, z, noise, progress, prompts, prompting, latents, image_guidance_scale=image_guidance
        )

    @torch.no_grad()
    def sources(
        self, n: int, *, noise: Noise, before: Tensor | None = None, size: Size | None = None
    ) -> Tensor:
        """The images that `sample` edits, given the same noise: [n, 3, H, W]."""
        _, sides = self.initial_latents(n, noise, size)
        return resize(self.examples(n, noise, None, before)[1], sides)

    def to_diffusers(self) -> Any:
        """The whole pipeline of diffusers."""
        return self.pipeline(StableDiffusionInstructPix2PixPipeline)


def widen(unet: Any, channels: int) -> None:
    """Gives the first convolution of diffusers' U-Net `channels` more inputs, whose weights are zero."""
    old = unet.conv_in
    inputs = old.in_channels + channels
    new = nn.Conv2d(inputs, old.out_channels, old.kernel_size, old.stride, old.padding)
    weight, bias = new.get_parameter("weight"), new.get_parameter("bias")
    with torch.no_grad():
        weight.zero_()[:, : old.in_channels] = old.weight
        bias.copy_(old.bias)
    unet.conv_in = new
    unet.register_to_config(in_channels=new.in_channels)
