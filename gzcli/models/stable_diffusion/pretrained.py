"""The parts of a pretrained base, which compute latents of images and embeddings of texts."""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from gzcli.core.errors import UsageError
from gzcli.core.types import DataInfo, moved
from gzcli.models.base import Model
from gzcli.models.stable_diffusion.bases import is_xl, load_base
from gzcli.models.stable_diffusion.images import colours, parts_of
from gzcli.models.stable_diffusion.options import PIXELS, TuningOptions

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Pretrained(Model):
    """A pipeline of diffusers. Its frozen parts are attached, so that no checkpoint holds them.

    Raises UsageError for a base that predicts neither the noise nor v, or for a size of images that it does
    not support.
    """

    trains_unet: ClassVar[bool] = False  # whether the U-Net is trained and saved in checkpoints

    # the types are not known: diffusers adds the parts of a pipeline at run time
    pipe: Any
    vae: Any
    unet: Any

    def __init__(self, data: DataInfo, tuning: TuningOptions):
        super().__init__(data)
        self.pipe = load_base(tuning.base)
        self.xl, self.dtype = is_xl(self.pipe), tuning.dtype
        self.text_trains = False  # whether a text encoder has weights that are trained
        self.no_text: dict[str, Tensor] | None = None  # the cached embedding of no text
        self.schedule: Any = DDPMScheduler.from_config(self.pipe.scheduler.config)
        if (kind := self.schedule.config.prediction_type) not in ("epsilon", "v_prediction"):
            raise UsageError(
                f"`model.base`: `{tuning.base}` predicts `{kind}`",
                hint="take one that predicts `epsilon` or `v_prediction`",
            )
        self.check_size(data.shape[1], data.shape[2], key="data.size")
        self.attach("vae", self.pipe.vae)
        for name in ("text_encoder", "text_encoder_2")[: 1 + self.xl]:
            self.attach(name, self.lowered(getattr(self.pipe, name)))
        if self.trains_unet:
            self.unet = self.pipe.unet.train()
        else:
            self.attach("unet", self.lowered(self.pipe.unet))
        if tuning.checkpointing:
            self.unet.enable_gradient_checkpointing()

    def lowered(self, part: nn.Module) -> nn.Module:
        """A frozen part in its dtype; diffusers' own `to` would warn without need."""
        return nn.Module.to(part, DTYPES.get(self.dtype))

    def check_size(self, height: int, width: int, key: str) -> None:
        """Raises UsageError for sides that the latents cannot have; `key` names the option of the size."""
        step = max(8, self.pipe.vae_scale_factor)  # diffusers' pipelines want 8 at least
        if height % step or width % step:
            near = max(1, round(height / step)) * step
            raise UsageError(
                f"`{key}`: sides of images must be multiples of {step}, not {height}", hint=f"take {near}"
            )

    @property
    def device(self) -> torch.device:
        return self.vae.device

    def in_dtype(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast to the dtype of the parts that are not trained; none where that is fp32."""
        if self.dtype == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.dtype])

    # ---- images

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation [B, c, h, w] of the VAE's posterior of images [B, C, H, W] in [-1, 1], not
        scaled."""
        with torch.autocast(x.device.type, enabled=False):
            images = parts_of(colours(x).to(self.vae.dtype), PIXELS)
            found = [self.vae.encode(part).latent_dist for part in images]
        return torch.cat([d.mean for d in found]), torch.cat([d.std for d in found])

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] of scaled latents [B, c, h, w]."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(self.vae.dtype) / self.vae.config.scaling_factor
            parts = parts_of(z, PIXELS // self.pipe.vae_scale_factor**2)
            x = torch.cat([self.vae.decode(part).sample.clamp(-1, 1) for part in parts])
        return x.mean(1, keepdim=True) if self.data.shape[0] == 1 else x

    # ---- texts

    def embed(self, captions: list[str]) -> dict[str, Tensor]:
        """`text` [B, L, D] and, for XL, `pooled` [B, P]; with a gradient where a text encoder is trained."""
        with torch.set_grad_enabled(self.text_trains and torch.is_grad_enabled()), self.in_dtype():
            text, _, *more = self.pipe.encode_prompt(
                prompt=captions,
                device=self.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )
        return {"text": text, "pooled": more[0]} if self.xl else {"text": text}

    def embed_nothing(self) -> dict[str, Tensor]:
        """The embedding of no text, one row: of the empty text, or zeros where XL's pipeline wants them."""
        if self.no_text is not None:
            return self.no_text
        # tensors made in inference mode could not be kept for training
        with torch.inference_mode(self.text_trains and torch.is_inference_mode_enabled()):
            found = self.embed([""])
            if self.xl and self.pipe.config.force_zeros_for_empty_prompt:
                found = {key: torch.zeros_like(value) for key, value in found.items()}
        if not self.text_trains:
            self.no_text = found
        return found

    def added(self, z_t: Tensor, pooled: Tensor | None) -> dict[str, Tensor] | None:
        """The conditions of XL's U-Net beside the text: the pooled text, and the sizes of an image that was
        neither resized nor cropped."""
        if pooled is None:
            return None
        height, width = (side * self.pipe.vae_scale_factor for side in z_t.shape[2:])
        ids = moved(torch.tensor([height, width, 0, 0, height, width]), z_t.device).expand(len(z_t), -1)
        return {"text_embeds": pooled, "time_ids": ids.to(pooled)}

    # ---- pipelines

    def pipeline(self, cls: Any, **parts: Any) -> Any:
        """A pipeline of the class `cls` from the parts of the base and `parts`. It has no safety checker,
        which is for photographs alone."""
        if self.xl:
            options = {"force_zeros_for_empty_prompt": self.pipe.config.force_zeros_for_empty_prompt}
        else:
            options = {"requires_safety_checker": False}
        return cls(**self.pipe.components, **parts, **options)
