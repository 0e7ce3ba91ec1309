"""Latent diffusion with text — Rombach et al. 2022, arXiv:2112.10752 — as it is tuned on captioned images (x,
c).

    z_0 = s · E(x),  z_t = α_t z_0 + σ_t ε,  E_t w_t ‖v̂(z_t, t, τ(c)) − v‖²,  v = ε, or α_t ε − σ_t z_0 as
    the base was trained

E is the VAE's posterior, s its scale, τ the text encoder(s). w_t = min(SNR_t, γ) / SNR_t, of the v-prediction
min(SNR_t, γ) / (SNR_t + 1), with SNR = α²/σ² (min-SNR: Hang et al. 2023, arXiv:2303.09556); 1 without γ. The
caption is dropped now and then, for guidance. Parts that are not tuned are attached: no checkpoint holds
them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

from gzcli import ranks
from gzcli.errors import UsageError
from gzcli.models.base import Model
from gzcli.models.nn import from_levels, to_fp32, to_levels
from gzcli.models.stable_diffusion.bases import is_xl, load_base
from gzcli.models.stable_diffusion.plan import PIXELS
from gzcli.types import Batch, DataInfo, Noise, Progress, moved

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
LATENTS = (
    8 * 64**2
)  # positions of latents at a time wherever no gradient is needed, whatever the engine's batches are
EXAMPLES = 8  # training images whose captions and conditions are remembered, for samples without any
CAPTION = 300  # bytes of a remembered caption

Dtype = Literal["fp32", "bf16", "fp16"]


class StableDiffusion(Model):
    """What the three have in common: parts of the base, latents, texts, the loss, pipelines of diffusers that
    sample.

    base: a folder or an id on the hub. dtype: of the parts that are not trained, but the VAE, whose fp16
    overflows in XL.
    cache: prepare latents and text embeddings once. checkpointing: recompute activations. min_snr: γ, often
    5. noise_offset: of the colours of the whole image (0.05 … 0.1 makes dark and bright ones possible).
    prompts: of the pictures that training shows; the first captions without.
    """

    best: ClassVar = "loss"
    condition: ClassVar[str | None] = None  # the picture that it takes beside the text

    def __init__(
        self,
        data: DataInfo,
        *,
        base: str,
        dtype: Dtype,
        cache: bool,
        checkpointing: bool,
        caption_dropout: float,
        min_snr: float | None,
        noise_offset: float,
        prompts: tuple[str, ...],
        train_unet: bool = False,
    ):
        super().__init__(data)
        self.pipe = load_base(base)
        self.xl = is_xl(self.pipe)
        self.dtype, self.cache, self.caption_dropout = dtype, cache, caption_dropout
        self.min_snr, self.noise_offset, self.prompts = min_snr, noise_offset, prompts
        self.text_trains, self.no_text = False, None
        self.schedule = DDPMScheduler.from_config(self.pipe.scheduler.config)
        if (kind := self.schedule.config.prediction_type) not in ("epsilon", "v_prediction"):
            raise UsageError(
                f"`model.base`: `{base}` predicts `{kind}`",
                hint="take one that predicts `epsilon` or `v_prediction`",
            )
        self.check_size(*data.shape[1:], key="data.size")
        self.attach("vae", self.pipe.vae)
        for name in ("text_encoder", "text_encoder_2")[: 1 + self.xl]:
            self.attach(name, nn.Module.to(getattr(self.pipe, name), HALF.get(dtype)))
        if train_unet:
            self.unet = self.pipe.unet.train()
        else:
            self.attach(
                "unet", nn.Module.to(self.pipe.unet, HALF.get(dtype))
            )  # diffusers' own `to` warns for nothing
        if checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.register_buffer("captions", torch.zeros(EXAMPLES, CAPTION, dtype=torch.uint8))
        if self.condition:
            self.register_buffer("pictures", torch.zeros(EXAMPLES, 3, *data.shape[1:], dtype=torch.uint8))

    def check_size(self, height: int, width: int, key: str) -> None:
        """Raises UsageError for a size that is none of images of latents."""
        step = max(8, self.pipe.vae_scale_factor)  # diffusers' pipelines want 8 at least
        if height % step or width % step:
            near = max(1, round(height / step)) * step
            raise UsageError(
                f"`{key}`: sides of images must be multiples of {step}, not {height}", hint=f"take {near}"
            )

    @property
    def device(self) -> torch.device:
        return self.captions.device

    def in_dtype(self) -> contextlib.AbstractContextManager:
        """Autocast to the precision of the parts that are not trained; as it is where that is fp32."""
        return (
            contextlib.nullcontext()
            if self.dtype == "fp32"
            else torch.autocast(self.device.type, HALF[self.dtype])
        )

    # ---- images and texts

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the VAE's posterior of images [B, C, H, W] in [-1, 1], [B, c, h, w] each, not
        yet scaled."""
        with torch.autocast(x.device.type, enabled=False):
            found = [self.vae.encode(part).latent_dist for part in few(colours(x).to(self.vae.dtype), PIXELS)]
        return torch.cat([d.mean for d in found]), torch.cat([d.std for d in found])

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] of scaled latents."""
        with torch.autocast(z.device.type, enabled=False):
            parts = few(
                z.to(self.vae.dtype) / self.vae.config.scaling_factor, PIXELS // self.pipe.vae_scale_factor**2
            )
            x = torch.cat([self.vae.decode(part).sample.clamp(-1, 1) for part in parts])
        return x.mean(1, keepdim=True) if self.data.shape[0] == 1 else x

    def embed(self, captions: list[str]) -> dict[str, Tensor]:
        """text [B, L, D], of XL also pooled [B, P]; with a gradient where a text encoder is trained."""
        with torch.set_grad_enabled(self.text_trains and torch.is_grad_enabled()), self.in_dtype():
            text, _, *more = self.pipe.encode_prompt(
                prompt=captions,
                device=self.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )
        return {"text": text, "pooled": more[0]} if self.xl else {"text": text}

    def nothing(self) -> dict[str, Tensor]:
        """The embedding of no text, one row: of the empty one or, as XL's pipeline has it, zeros."""
        if self.no_text is not None:
            return self.no_text
        with torch.inference_mode(
            self.text_trains and torch.is_inference_mode_enabled()
        ):  # where it is kept, it is for training
            found = self.embed([""])
            if self.xl and self.pipe.config.force_zeros_for_empty_prompt:
                found = {key: torch.zeros_like(value) for key, value in found.items()}
        if not self.text_trains:
            self.no_text = found
        return found

    def texts(self, batch: Batch, dropped: Tensor) -> dict[str, Tensor]:
        """The captions' embeddings, those of the rows `dropped` [B] without text."""
        known = {key: batch.extra[key].to(batch.x) for key in ("text", "pooled") if key in batch.extra}
        found = known or self.embed(batch.extra["caption"])
        none = self.nothing()
        return {
            key: torch.where(rows(dropped, value), none[key].to(value), value) for key, value in found.items()
        }

    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """What the frozen parts make of each image, once: the latent's distribution, of which each step takes
        a fresh draw, and the text's embedding. In half precision, which adds to a latent less than a
        hundredth of its deviation."""
        if not self.cache:
            return {}
        mean, std = self.encode(batch.x)
        found = {"latent_mean": mean, "latent_std": std}
        found |= {} if self.text_trains else self.embed(batch.extra["caption"])
        return {key: value.half() for key, value in found.items()}

    # ---- training

    def conditions(self, batch: Batch) -> dict[str, Tensor]:
        """What `denoise` is told, by keywords with rows for each image: `text` and, of XL, `pooled`."""
        return self.texts(batch, batch.noise.rand(len(batch)).to(batch.x.device) < self.caption_dropout)

    def denoise(self, z_t: Tensor, t: Tensor, text: Tensor, **conditions: Tensor) -> Tensor:
        """The base's prediction, ε or v, for latents [B, c, h, w] at times t [B]."""
        raise NotImplementedError

    def added(self, z_t: Tensor, pooled: Tensor | None) -> dict[str, Tensor] | None:
        """What XL is told besides: the pooled text, and that the image was neither resized nor cropped."""
        if pooled is None:
            return None
        height, width = (side * self.pipe.vae_scale_factor for side in z_t.shape[2:])
        ids = moved(torch.tensor([height, width, 0, 0, height, width]), z_t.device).expand(len(z_t), -1)
        return {"text_embeds": pooled, "time_ids": ids.to(pooled)}

    def latents(self, batch: Batch) -> Tensor:
        """A draw of the scaled latents, [B, c, h, w]."""
        if "latent_mean" in batch.extra:
            mean, std = (batch.extra[f"latent_{key}"].to(batch.x) for key in ("mean", "std"))
        else:
            mean, std = self.encode(batch.x)
        return (mean + std * batch.noise.randn(*mean.shape).to(mean)) * self.vae.config.scaling_factor

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        n, noise = len(batch), batch.noise
        z = self.latents(batch)
        eps = noise.randn(*z.shape).to(z)
        t = noise.randint(self.schedule.config.num_train_timesteps, n).to(z.device)
        if self.noise_offset:
            eps = eps + self.noise_offset * noise.randn(n, z.shape[1], 1, 1).to(z)
        conditions = self.conditions(batch)
        v = self.schedule.config.prediction_type == "v_prediction"
        target, z_t = self.schedule.get_velocity(z, eps, t) if v else eps, self.schedule.add_noise(z, eps, t)
        out = []
        with self.in_dtype():
            for part in slices(z, n * z[0].numel() if torch.is_grad_enabled() else LATENTS):
                out.append(
                    self.denoise(
                        z_t[part], t[part], **{key: value[part] for key, value in conditions.items()}
                    )
                )
        error = (to_fp32(torch.cat(out)) - to_fp32(target)).square().flatten(1).mean(1)
        return {"loss": (self.weight(t, v) * error).mean()} | (
            {"mse": error.detach().mean()} if self.min_snr else {}
        )

    def weight(self, t: Tensor, v: bool) -> Tensor | float:
        """w_t [B]."""
        if self.min_snr is None:
            return 1.0
        alpha_bar = moved(self.schedule.alphas_cumprod, t.device)[t]
        snr = alpha_bar / (1 - alpha_bar)
        # at zero SNR, where ε is all there is and 0/0 would stand, the weight of ε is 1
        return snr.clamp(max=self.min_snr) / (snr + 1) if v else (self.min_snr / snr).clamp(max=1)

    # ---- examples

    def on_start(self, batch: Batch) -> None:
        """The first batch's captions and conditions are remembered, those of all ranks, over and over."""
        if self.captions.any():
            return
        known = torch.stack([to_bytes(caption) for caption in batch.extra["caption"]]).to(self.device)
        order = torch.arange(EXAMPLES, device=self.device)
        found = ranks.rows(known, self)
        self.captions.copy_(found[order % len(found)])
        if self.condition:
            found = ranks.rows(to_levels(colours(self.picture(batch)), 256).byte(), self)
            self.pictures.copy_(found[order % len(found)])

    def picture(self, batch: Batch) -> Tensor:
        """The condition of each image, [B, C, H, W] in [-1, 1]."""
        return batch.extra[self.condition]

    def examples(
        self, n: int, noise: Noise, prompt: str | list[str] | None, picture: Tensor | None
    ) -> tuple[list[str], Tensor]:
        """n prompts and, where it takes any, pictures: as given, else drawn from `prompts` and what is
        remembered."""
        pick = noise.randint(EXAMPLES * max(1, len(self.prompts)), n).tolist()
        if prompt is None:
            known = self.prompts or [to_text(row) for row in self.captions.cpu()]
            prompt = [known[i % len(known)] for i in pick]
        prompts = [prompt] * n if isinstance(prompt, str) else [prompt[i % len(prompt)] for i in range(n)]
        if self.condition and picture is None:
            picture = from_levels(self.pictures[[i % EXAMPLES for i in pick]], 256)
        return prompts, None if picture is None else colours(picture).to(self.device)

    # ---- sampling

    def start(self, n: int, noise: Noise, size: int | None) -> tuple[Tensor, tuple[int, int]]:
        """Latents of pure noise [n, c, h, w], and the (H, W) of their images: of a square of `size`, else of
        the training images. What a seed draws first, so that it starts an image alike whatever else is given.
        Raises UsageError."""
        sides = (size, size) if size else tuple(self.data.shape[1:])
        self.check_size(*sides, key="size")
        shape = [side // self.pipe.vae_scale_factor for side in sides]
        return noise.randn(n, self.vae.config.latent_channels, *shape).to(self.device), sides

    @torch.no_grad()
    def draw(
        self,
        pipe: Any,
        z: Tensor,
        *,
        noise: Noise,
        progress: Progress,
        prompts: list[str],
        negative: str,
        guidance: float,
        steps: int,
        pictures: Mapping[str, Tensor],
        **options: Any,
    ) -> Tensor:
        """Images [n, C, H, W] by a pipeline of diffusers from the noise z, a few at a time, in `steps` of the
        base's own scheduler. pictures: keywords with rows for each image. Raises UsageError for no steps."""
        if steps < 1:
            raise UsageError(f"{steps} sampling steps", hint="set `steps` to 1 or more")
        pipe.set_progress_bar_config(disable=True)
        n, seeds = len(z), noise.randint(2**31, len(z)).tolist()  # for schedulers that draw
        images = []
        for part in slices(z, LATENTS):
            count = len(prompts[part])

            def report(pipe, step, t, kept, start=part.start, count=count):
                progress(start + count * (step + 1) / pipe.num_timesteps, n)
                return {}

            with self.in_dtype():
                found = pipe(
                    prompt=prompts[part],
                    negative_prompt=[negative] * count if negative else None,
                    latents=z[part],
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                    guidance_scale=guidance,
                    num_inference_steps=steps,
                    output_type="latent",
                    callback_on_step_end=report,
                    **{key: value[part] for key, value in pictures.items()},
                    **options,
                )
            images.append(self.decode(found.images))
        return torch.cat(images)

    def pipeline(self, cls: Any, **parts: Any) -> Any:
        """A pipeline of the class with the base's parts and `parts`; without the filter that knows
        photographs only."""
        options = (
            {"force_zeros_for_empty_prompt": self.pipe.config.force_zeros_for_empty_prompt} if self.xl else {}
        )
        return cls(**self.pipe.components, **parts, **(options or {"requires_safety_checker": False}))


def colours(x: Tensor) -> Tensor:
    """Grey images as three equal channels, [B, 3, H, W]."""
    return x.expand(-1, 3, -1, -1)


def slices(x: Tensor, positions: int) -> list[slice]:
    """Rows of x [B, C, H, W] that together have at most so many positions, one row at least."""
    size = max(1, positions // x[0, 0].numel())
    return [slice(i, min(i + size, len(x))) for i in range(0, len(x), size)]


def few(x: Tensor, positions: int) -> list[Tensor]:
    return [x[part] for part in slices(x, positions)]


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Images in [-1, 1] at this size, [B, C, *size]."""
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", antialias=True).clamp(-1, 1)


def rows(mask: Tensor, like: Tensor) -> Tensor:
    """mask [B] in the shape [B, 1, …] of as many dimensions as `like`."""
    return mask.view(-1, *[1] * (like.ndim - 1))


def to_bytes(caption: str) -> Tensor:
    """A caption's first bytes in UTF-8 and an end mark, uint8 [CAPTION]."""
    text = caption.encode()[: CAPTION - 1] + b"\n"
    return torch.frombuffer(bytearray(text.ljust(CAPTION, b"\0")), dtype=torch.uint8)


def to_text(row: Tensor) -> str:
    return bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore").removesuffix("\n")
