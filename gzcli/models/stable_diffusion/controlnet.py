"""ControlNet — Zhang, Rao & Agrawala 2023, "Adding Conditional Control to Text-to-Image Diffusion Models",
arXiv:2302.05543.

    ε̂(z_t, t, c, map) = U-Net(z_t, t, c; skips + Z_i(h_i)),   h = encoder(z_t + Z_0(e(map)))

The encoder is a trained copy of the U-Net's; the U-Net itself is frozen. The convolutions Z start at zero, so
that the model starts as the base. e turns the map into features of the latents' size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline
from torch import Tensor, nn

from gzcli.core.errors import MissingError, install_line
from gzcli.core.types import Batch, DataInfo, Noise, Progress
from gzcli.core.units import Size
from gzcli.models.stable_diffusion.base import PromptOptions, StableDiffusion, TuningOptions, resize, to_rgb
from gzcli.models.stable_diffusion.kinds import XL, Kind


def canny(x: Tensor) -> Tensor:
    """White edges (1) of images in [-1, 1] on black (−1), [B, 3, H, W] (doi:10.1109/TPAMI.1986.4767851).
    Raises MissingError if scikit-image is missing."""
    try:
        from skimage.feature import canny as edges
    except ImportError as e:
        message = "Canny edges need the package `scikit-image`"
        raise MissingError(message, hint=install_line("gzcli[edges]")) from e
    grey = ((x.detach().float().mean(1) + 1) / 2).cpu().numpy()
    maps = np.stack([edges(image) for image in grey])
    return torch.from_numpy(maps).to(x).mul_(2).sub_(1)[:, None].expand(-1, 3, -1, -1)


HINT_WIDTHS = (16, 32, 96, 256)  # channels of e; the resolution is halved between two of them


class ControlNet(StableDiffusion):
    """A ControlNet for Stable Diffusion 1.x, 2.x or XL. It uses the maps of a set (`control`), or the Canny
    edges of its images."""

    paper = "Zhang et al. 2023, arXiv:2302.05543"
    needs: ClassVar[tuple[str, ...]] = ("caption",)
    condition: ClassVar[str] = "control"
    kinds: ClassVar[tuple[type[Kind], ...]] = (Kind, XL)

    def __init__(
        self, data: DataInfo, *, tuning: TuningOptions = TuningOptions(), caption_dropout: float = 0.5
    ):
        super().__init__(data, tuning, caption_dropout)
        halvings = self.pipe.vae_scale_factor.bit_length() - 1
        self.controlnet = ControlNetModel.from_unet(
            self.unet, conditioning_embedding_out_channels=HINT_WIDTHS[: halvings + 1]
        )
        nn.Module.to(self.controlnet, torch.get_default_dtype()).requires_grad_(True).train()
        if tuning.checkpointing:
            self.controlnet.enable_gradient_checkpointing()

    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """The outputs of `StableDiffusion`, and, if edges are the maps, the edges as bytes of one channel."""
        prepared = super().prepare(batch)
        if prepared and "control" not in batch.extra:
            prepared["edges"] = self.picture(batch)[:, :1].gt(0).byte()
        return prepared

    def picture(self, batch: Batch) -> Tensor:
        """Maps [B, C, H, W] in [-1, 1]: the set's maps, or edges."""
        if "control" in batch.extra:
            return batch.extra["control"]
        if "edges" in batch.extra:
            return to_rgb(batch.extra["edges"].to(batch.x) * 2 - 1)
        return canny(batch.x)

    def conditions(self, batch: Batch) -> dict[str, Tensor]:
        """The texts, and the maps `control` in [0, 1], as in diffusers."""
        return super().conditions(batch) | {"control": (to_rgb(self.picture(batch)) + 1) / 2}

    def denoise(self, z_t: Tensor, t: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        inputs, maps = self.kind.inputs(z_t, conditions), conditions["control"]
        skips, middle = self.controlnet(z_t, t, controlnet_cond=maps, return_dict=False, **inputs)
        added = {"down_block_additional_residuals": skips, "mid_block_additional_residual": middle}
        return self.unet(z_t, t, **inputs, **added).sample

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress,
        control: Tensor | None = None,
        prompting: PromptOptions = PromptOptions(),
        control_scale: float = 1.0,
        edges: bool = False,
    ) -> Tensor:
        """Draws n images [n, C, H, W] in [-1, 1] of the prompts that follow the maps `control` [n, C, H, W]
        in [-1, 1]. By default, these are stored maps.

        control_scale: factor of the ControlNet's outputs. 0: the base only.
        edges: whether the inputs are photographs, whose edges become the maps.
        """
        z, sides = self.initial_latents(n, noise, prompting.size)
        prompts, maps = self.maps(n, noise, sides, control, edges, prompting.prompt)
        cls = (
            StableDiffusionXLControlNetPipeline
            if isinstance(self.kind, XL)
            else StableDiffusionControlNetPipeline
        )
        pipe, pictures = self.pipeline(cls, controlnet=self.controlnet), {"image": (maps + 1) / 2}
        options = {"height": sides[0], "width": sides[1], "controlnet_conditioning_scale": control_scale}
        return self.draw(pipe, z, noise, progress, prompts, prompting, pictures, **options)

    def maps(
        self,
        n: int,
        noise: Noise,
        sides: tuple[int, int],
        control: Tensor | None,
        edges: bool,
        prompt: str | list[str] | None = None,
    ) -> tuple[list[str], Tensor]:
        """The prompts, and the maps [n, 3, *sides]; `initial_latents` must have drawn before."""
        if edges and control is not None:
            control = canny(resize(control, sides))
        prompts, maps = self.examples(n, noise, prompt, control)
        return prompts, resize(maps, sides)

    @torch.no_grad()
    def sources(
        self,
        n: int,
        *,
        noise: Noise,
        control: Tensor | None = None,
        size: Size | None = None,
        edges: bool = False,
    ) -> Tensor:
        """The maps that `sample` follows, given the same noise: [n, 3, H, W]."""
        _, sides = self.initial_latents(n, noise, size)
        return self.maps(n, noise, sides, control, edges)[1]

    def to_diffusers(self) -> Any:
        """diffusers' ControlNetModel, to use with the base."""
        return self.controlnet
