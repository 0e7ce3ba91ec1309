"""InstructPix2Pix — Brooks, Holynski & Efros 2023, arXiv:2211.09800: an image edited as an instruction c
says.

    ε̂(z_t, t, c, y) = U-Net([z_t, E(y)], t, c),   y the image before, E the VAE's mean, not scaled
    ε̃ = ε̂(z_t, ∅, ∅) + s_y (ε̂(z_t, ∅, y) − ε̂(z_t, ∅, ∅)) + s_c (ε̂(z_t, c, y) − ε̂(z_t, ∅, y))
    (eq. 3)

The whole U-Net is trained, with new input channels that start at zero. The instruction, the image, or both
are dropped in 5 % of the cases each (section 3.2.1).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from torch import Tensor, nn

from gzcli.errors import UsageError
from gzcli.models.stable_diffusion.base import Dtype, StableDiffusion, resized, rows
from gzcli.types import Batch, DataInfo, Noise, Progress


class InstructPix2Pix(StableDiffusion):
    """Of SD 1.x and 2.x. dropout: the share of cases without instruction, of those without image, and of
    those without both. The rest: see `StableDiffusion`. Raises UsageError for XL.
    """

    paper = "Brooks et al. 2023, arXiv:2211.09800"
    needs: ClassVar = ("caption", "before")
    condition: ClassVar = "before"

    def __init__(
        self,
        data: DataInfo,
        *,
        base: str = "stable-diffusion-v1-5/stable-diffusion-v1-5",
        dropout: float = 0.05,
        dtype: Dtype = "fp32",
        cache: bool = True,
        checkpointing: bool = False,
        min_snr: float | None = None,
        noise_offset: float = 0.0,
        prompts: tuple[str, ...] = (),
    ):
        super().__init__(
            data,
            base=base,
            dtype=dtype,
            cache=cache,
            checkpointing=checkpointing,
            caption_dropout=0.0,
            min_snr=min_snr,
            noise_offset=noise_offset,
            prompts=prompts,
            train_unet=True,
        )
        if self.xl:
            raise UsageError(
                "`instructpix2pix` tunes Stable Diffusion 1.x and 2.x, not XL",
                hint="set `model.base` to another one",
            )
        self.dropout = dropout
        widen(self.unet, self.vae.config.latent_channels)

    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """The latent of the image before too."""
        found = super().prepare(batch)
        if found:
            found["before_latent"] = self.encode(batch.extra["before"])[0].half()
        return found

    def conditions(self, batch: Batch) -> dict[str, Tensor]:
        """One draw u decides: [0, p) without the instruction, [p, 2p) without both, [2p, 3p) without the
        image."""
        known = batch.extra.get("before_latent")
        before = self.encode(batch.extra["before"])[0] if known is None else known.to(batch.x)
        u, p = batch.noise.rand(len(batch)).to(batch.x.device), self.dropout
        blind = (u >= p) & (u < 3 * p)
        return self.texts(batch, u < 2 * p) | {"before": torch.where(rows(blind, before), 0.0, before)}

    def denoise(self, z_t: Tensor, t: Tensor, text: Tensor, before: Tensor) -> Tensor:
        return self.unet(torch.cat([z_t, before.to(z_t)], 1), t, encoder_hidden_states=text).sample

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress,
        before: Tensor | None = None,
        prompt: str | list[str] | None = None,
        negative: str = "",
        guidance: float = 7.5,
        image_guidance: float = 1.5,
        steps: int = 30,
        size: int | None = None,
    ) -> Tensor:
        """The images `before` [n, C, H, W] in [-1, 1] edited as the prompts say, alike; remembered ones
        without.

        guidance, image_guidance: s_c and s_y of eq. 3.
        """
        z, sides = self.start(n, noise, size)
        prompts, images = self.examples(n, noise, prompt, before)
        latents = self.encode(resized(images, sides))[0]
        return self.draw(
            self.pipeline(StableDiffusionInstructPix2PixPipeline),
            z,
            noise=noise,
            progress=progress,
            prompts=prompts,
            negative=negative,
            guidance=guidance,
            steps=steps,
            pictures={"image": latents},
            image_guidance_scale=image_guidance,
        )

    @torch.no_grad()
    def sources(
        self, n: int, *, noise: Noise, before: Tensor | None = None, size: int | None = None
    ) -> Tensor:
        """What `sample` edits, given the same noise: [n, 3, H, W]."""
        _, sides = self.start(n, noise, size)
        return resized(self.examples(n, noise, None, before)[1], sides)

    def to_diffusers(self) -> Any:
        """The whole pipeline of diffusers."""
        return self.pipeline(StableDiffusionInstructPix2PixPipeline)


def widen(unet: nn.Module, channels: int) -> None:
    """Gives the U-Net's first convolution so many more input channels, with weights of zero."""
    old = unet.conv_in
    new = nn.Conv2d(old.in_channels + channels, old.out_channels, old.kernel_size, old.stride, old.padding)
    with torch.no_grad():
        new.weight.zero_()[:, : old.in_channels] = old.weight
        new.bias.copy_(old.bias)
    unet.conv_in = new
    unet.register_to_config(in_channels=new.in_channels)
