"""ControlNet — Zhang, Rao & Agrawala 2023, "Adding Conditional Control to Text-to-Image Diffusion Models",
arXiv:2302.05543.

    ε̂(z_t, t, c, map) = U-Net(z_t, t, c; skips + Z_i(h_i)),   h = a copy of the U-Net's encoder at z_t +
    Z_0(e(map))

The copy is trained, the U-Net stays; the convolutions Z start at zero, so that nothing changes at first. e
makes features of the map at the latents' size.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline
from torch import Tensor, nn

from gzcli.models.stable_diffusion.base import Dtype, StableDiffusion, colours, resized
from gzcli.models.stable_diffusion.canny import canny
from gzcli.types import Batch, DataInfo, Noise, Progress

WIDTHS = (16, 32, 96, 256)  # of e, one more halving each


class ControlNet(StableDiffusion):
    """Of SD 1.x, 2.x and XL, for the maps of a set (`control`), or else for the Canny edges of its images.

    edge_sigma: of the Gaussian before the edges, in pixels. The rest: see `StableDiffusion`.
    """

    paper = "Zhang et al. 2023, arXiv:2302.05543"
    needs: ClassVar = ("caption",)
    condition: ClassVar = "control"

    def __init__(
        self,
        data: DataInfo,
        *,
        base: str = "stable-diffusion-v1-5/stable-diffusion-v1-5",
        edge_sigma: float = 1.0,
        dtype: Dtype = "fp32",
        cache: bool = True,
        checkpointing: bool = False,
        caption_dropout: float = 0.5,
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
            caption_dropout=caption_dropout,
            min_snr=min_snr,
            noise_offset=noise_offset,
            prompts=prompts,
        )
        self.edge_sigma = edge_sigma
        halvings = self.pipe.vae_scale_factor.bit_length() - 1
        self.controlnet = ControlNetModel.from_unet(
            self.unet, conditioning_embedding_out_channels=WIDTHS[: halvings + 1]
        )
        nn.Module.to(self.controlnet, torch.get_default_dtype()).requires_grad_(True).train()
        if checkpointing:
            self.controlnet.enable_gradient_checkpointing()

    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """The map too, as bytes of one channel, where it is made of the image's edges."""
        found = super().prepare(batch)
        if found and "control" not in batch.extra:
            found["edges"] = self.picture(batch)[:, :1].gt(0).byte()
        return found

    def picture(self, batch: Batch) -> Tensor:
        """Maps [B, C, H, W] in [-1, 1]: the set's own, else edges."""
        if "control" in batch.extra:
            return batch.extra["control"]
        if "edges" in batch.extra:
            return colours(batch.extra["edges"].to(batch.x) * 2 - 1)
        return canny(batch.x, self.edge_sigma)

    def conditions(self, batch: Batch) -> dict[str, Tensor]:
        return super().conditions(batch) | {
            "control": (colours(self.picture(batch)) + 1) / 2
        }  # maps are in [0, 1] in diffusers

    def denoise(
        self, z_t: Tensor, t: Tensor, text: Tensor, control: Tensor, pooled: Tensor | None = None
    ) -> Tensor:
        added = self.added(z_t, pooled)
        skips, middle = self.controlnet(
            z_t,
            t,
            encoder_hidden_states=text,
            controlnet_cond=control,
            added_cond_kwargs=added,
            return_dict=False,
        )
        return self.unet(
            z_t,
            t,
            encoder_hidden_states=text,
            added_cond_kwargs=added,
            down_block_additional_residuals=skips,
            mid_block_additional_residual=middle,
        ).sample

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress,
        control: Tensor | None = None,
        prompt: str | list[str] | None = None,
        negative: str = "",
        guidance: float = 7.5,
        steps: int = 30,
        size: int | None = None,
        control_scale: float = 1.0,
        edges: bool = False,
    ) -> Tensor:
        """n images [n, C, H, W] in [-1, 1] of the prompts along the maps `control` [n, C, H, W] in [-1, 1];
        of remembered captions and maps without.

        edges: `control` are photographs, of which the edges are to be taken. control_scale: of the maps'
        share.
        """
        z, sides = self.start(n, noise, size)
        prompts, maps = self.followed(n, noise, sides, control, edges, prompt)
        cls = StableDiffusionXLControlNetPipeline if self.xl else StableDiffusionControlNetPipeline
        return self.draw(
            self.pipeline(cls, controlnet=self.controlnet),
            z,
            noise=noise,
            progress=progress,
            prompts=prompts,
            negative=negative,
            guidance=guidance,
            steps=steps,
            pictures={"image": (maps + 1) / 2},
            height=sides[0],
            width=sides[1],
            controlnet_conditioning_scale=control_scale,
        )

    def followed(
        self,
        n: int,
        noise: Noise,
        sides: tuple[int, int],
        control: Tensor | None,
        edges: bool,
        prompt: str | list[str] | None = None,
    ) -> tuple[list[str], Tensor]:
        """The prompts and the maps [n, 3, *sides] of images, once their noise is drawn."""
        if edges and control is not None:
            control = canny(resized(control, sides), self.edge_sigma)
        prompts, maps = self.examples(n, noise, prompt, control)
        return prompts, resized(maps, sides)

    @torch.no_grad()
    def sources(
        self,
        n: int,
        *,
        noise: Noise,
        control: Tensor | None = None,
        size: int | None = None,
        edges: bool = False,
    ) -> Tensor:
        """The maps that `sample` follows, given the same noise: [n, 3, H, W]."""
        _, sides = self.start(n, noise, size)
        return self.followed(n, noise, sides, control, edges)[1]

    def to_diffusers(self) -> Any:
        """diffusers' ControlNetModel, which goes with the base."""
        return self.controlnet
