"""Latent diffusion with text — Rombach et al. 2022, arXiv:2112.10752 — fine-tuned on captioned images (x, c).

    z_0 = s · E(x),  z_t = α_t z_0 + σ_t ε,  E_t w_t ‖v̂(z_t, t, τ(c)) − v‖²

E is a draw of the VAE's posterior, s its scale, and τ the text encoder(s). The target v is ε or
α_t ε − σ_t z_0, as the base was trained. The weight is 1 or, with SNR = α²/σ² (min-SNR: Hang et al. 2023,
arXiv:2303.09556),

    w_t = min(SNR_t, γ) / SNR_t of ε,    w_t = min(SNR_t, γ) / (SNR_t + 1) of the v-prediction

Bases that are flows (Esser et al. 2024, arXiv:2403.03206) have α_t = 1 − t, σ_t = t, v = ε − z_0 and w_t = 1.
Their times are logit-normal, shifted as the base's own schedule is: with u ~ N(0, 1) and the shift s,

    t = s τ / (1 + (s − 1) τ),   τ = 1 / (1 + e^−u)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

from gzcli.core import ranks
from gzcli.core.errors import UsageError
from gzcli.core.types import Batch, DataInfo, Noise, Progress, from_rows, moved_to, to_rows
from gzcli.core.units import Size, sides
from gzcli.models.base import Model
from gzcli.models.nn import from_levels, to_fp32, to_levels, within
from gzcli.models.stable_diffusion.kinds import PIPELINE_KINDS, Kind
from gzcli.models.stable_diffusion.pretrained import load_base

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_VAE_PIXELS = 2 * 512**2  # most pixels in one pass of the VAE, unless a single image has more
LATENTS = 8 * 64**2  # positions of latents in one pass of the U-Net without gradients
EXAMPLES = 8  # most training images with stored captions and conditions
MAX_CAPTION_BYTES = 300  # most bytes of a stored caption


@dataclass(frozen=True)
class TuningOptions:
    """How a base is fine-tuned.

    base: pretrained model: a folder in the diffusers format, a hub id, or a tiny base of gz (`tiny`,
      `tiny-xl`, `tiny-sd3`, `tiny-flux`).
    dtype: precision of the frozen parts. The VAE stays in fp32, because XL's overflows in fp16.
    cache: whether latents and text embeddings are computed once instead of at every step.
    checkpointing: whether activations are recomputed in the backward pass, which saves memory.
    min_snr: γ of min-SNR-γ loss weights, often 5. Flows ignore it. Default: unweighted.
    noise_offset: scale of a noise offset shared by all pixels. 0.05 … 0.1 allows very dark and very bright
      images.
    prompts: prompts of the samples during training. Default: captions of the first batch.
    """

    base: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    dtype: Annotated[str, DTYPES] = "fp32"
    cache: bool = True
    checkpointing: bool = False
    min_snr: float | None = None
    noise_offset: float = 0.0
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class PromptOptions:
    """The text of images, and the sampling steps.

    prompt: prompts of the images, used in turn. Default: captions stored during training.
    negative: text that the images should not show.
    guidance: classifier-free guidance scale. 1: no guidance.
    steps: steps of the base's own scheduler.
    size: side of the images in pixels, or width and height, such as `768x512`. Default: the size of the
      training images.
    """

    prompt: str | list[str] | None = None
    negative: str = ""
    guidance: float = 7.5
    steps: int = 30
    size: Size | None = None


def to_rgb(x: Tensor) -> Tensor:
    """Grey images as three equal channels, [B, 3, H, W]."""
    return x.expand(-1, 3, -1, -1)


def slices(x: Tensor, positions: int) -> list[slice]:
    """Slices of the rows of x [B, C, H, W]. A slice has at most `positions` pixels per channel, or one
    row."""
    size = max(1, positions // x[0, 0].numel())
    return [slice(i, min(i + size, len(x))) for i in range(0, len(x), size)]


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Images in [-1, 1] resized to (height, width), [B, C, *size]."""
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", antialias=True).clamp(-1, 1)


def per_row(mask: Tensor, value: Tensor) -> Tensor:
    """The mask [B], reshaped to [B, 1, …] with as many dimensions as `value`."""
    return mask.view(-1, *[1] * (value.ndim - 1))


class StableDiffusion(Model):
    """The loss, the examples stored in training, and sampling by a diffusers pipeline with frozen parts.

    Raises UsageError for an unsupported kind of base, for a base that predicts neither the noise nor v, and
    for an unsupported image size.

    caption_dropout: probability of hiding a caption in training, which guidance needs.
    """

    best: ClassVar[str] = "loss"
    shares: ClassVar[bool] = True
    takes: ClassVar[str] = "pictures"
    condition: ClassVar[str] = ""  # key of the image that the model takes besides the text; "": none
    trains_unet: ClassVar[bool] = False  # whether the U-Net is trained and saved in checkpoints
    kinds: ClassVar[tuple[type[Kind], ...]] = PIPELINE_KINDS  # kinds of bases that it tunes
    captions: Tensor  # uint8 [EXAMPLES, MAX_CAPTION_BYTES]
    pictures: Tensor  # uint8 [EXAMPLES, 3, H, W], if there is a condition
    # types unknown: diffusers adds the parts of a pipeline at run time
    pipe: Any
    vae: Any
    unet: Any

    def __init__(self, data: DataInfo, tuning: TuningOptions, caption_dropout: float = 0.0):
        super().__init__(data)
        self.tuning, self.caption_dropout = tuning, caption_dropout
        self.kind, self.dtype = load_base(tuning.base), tuning.dtype
        self.pipe = self.kind.pipe
        if type(self.kind) not in self.kinds:
            able = ", ".join(kind.label for kind in self.kinds)
            message = f"`model.base`: `{tuning.base}` is {self.kind.label}, which this model cannot tune"
            raise UsageError(message, hint=f"choose one of {able}")
        self.text_trains = False  # whether a text encoder has weights that are trained
        self.embedded: dict[str, dict[str, Tensor]] = {}  # the embeddings of `embed_once`
        self.schedule: Any = self.pipe.scheduler
        if not self.kind.flow:
            self.schedule = DDPMScheduler.from_config(self.pipe.scheduler.config)
            if (target := self.schedule.config.prediction_type) not in ("epsilon", "v_prediction"):
                hint = "choose one that predicts `epsilon` or `v_prediction`"
                raise UsageError(f"`model.base`: `{tuning.base}` predicts `{target}`", hint=hint)
        self.check_size(data.shape[1], data.shape[2], key="data.size")
        self.attach("vae", self.pipe.vae)
        for name in self.kind.encoders:
            if getattr(self.pipe, name) is not None:  # the T5 of 3.x may be absent
                self.attach(name, self.frozen(getattr(self.pipe, name)))
        net = getattr(self.pipe, self.kind.net)
        if self.trains_unet:
            setattr(self, self.kind.net, net.train())
        else:
            self.attach(self.kind.net, self.frozen(net))
        if tuning.checkpointing:
            net.enable_gradient_checkpointing()
        self.register_buffer("captions", torch.zeros(EXAMPLES, MAX_CAPTION_BYTES, dtype=torch.uint8))
        if self.condition:
            self.register_buffer("pictures", torch.zeros(EXAMPLES, 3, *data.shape[1:], dtype=torch.uint8))

    def frozen(self, part: nn.Module) -> nn.Module:
        """A frozen part in its dtype. The `to` of diffusers would print a needless warning."""
        return nn.Module.to(part, DTYPES[self.dtype])

    def check_size(self, height: int, width: int, key: str) -> None:
        """Raises UsageError for sides that the latents cannot have; `key` names the option of the size."""
        # diffusers' pipelines require 8 at least
        step = max(8, self.pipe.vae_scale_factor * self.kind.multiple)
        if height % step or width % step:
            nearest, rule = max(1, round(height / step)) * step, f"multiples of {step}, not {height}"
            raise UsageError(f"`{key}`: the sides of images must be {rule}", hint=f"use {nearest}")

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """The shape (c, h, w) of the latents of images of these sides."""
        factor = self.pipe.vae_scale_factor
        return self.vae.config.latent_channels, height // factor, width // factor

    @property
    def device(self) -> torch.device:
        return self.vae.device

    def in_dtype(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast to the dtype of the parts that are not trained; none if that is fp32."""
        if self.dtype == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.dtype])

    # ---- images

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and standard deviation [B, c, h, w] of the VAE's posterior for images [B, C, H, W],
        unscaled."""
        with torch.autocast(x.device.type, enabled=False):
            x = to_rgb(x).to(self.vae.dtype)
            posteriors = [self.vae.encode(x[part]).latent_dist for part in slices(x, MAX_VAE_PIXELS)]
        return torch.cat([d.mean for d in posteriors]), torch.cat([d.std for d in posteriors])

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] of scaled latents [B, c, h, w]."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(self.vae.dtype) / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0)
            parts = slices(z, MAX_VAE_PIXELS // self.pipe.vae_scale_factor**2)
            x = torch.cat([within(self.vae.decode(z[part]).sample) for part in parts])
        return x.mean(1, keepdim=True) if self.data.shape[0] == 1 else x

    # ---- texts

    def embed(self, captions: list[str]) -> dict[str, Tensor]:
        """The conditions of `Kind.embed`, with a gradient if a text encoder is trained."""
        with torch.set_grad_enabled(self.text_trains and torch.is_grad_enabled()), self.in_dtype():
            return self.kind.embed(captions, self.device)

    def embed_once(self, text: str) -> dict[str, Tensor]:
        """The embedding of a text, one row, which is cached unless a text encoder is trained. The embedding
        of an empty text is zero if XL's pipeline requires that."""
        if text in self.embedded:
            return self.embedded[text]
        # tensors made in inference mode could not be kept for training
        with torch.inference_mode(self.text_trains and torch.is_inference_mode_enabled()):
            embedding = self.embed([text])
            if not text and self.kind.empty_is_zero:
                embedding = {key: torch.zeros_like(value) for key, value in embedding.items()}
        if not self.text_trains:
            self.embedded[text] = embedding
        return embedding

    # ---- pipelines

    def pipeline(self, cls: Any, **parts: Any) -> Any:
        """A pipeline of the class `cls`, built from the base's parts and `parts`, without a safety
        checker."""
        return cls(**self.pipe.components, **parts, **self.kind.options())

    # ---- training

    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """The outputs of the frozen parts for each image, computed once: the distribution of its latent, from
        which each step draws, and the embedding of its caption."""
        # half precision moves a latent by less than a hundredth of its deviation
        if not self.tuning.cache:
            return {}
        shape = self.latent_shape(*self.data.shape[1:])  # latents of other shapes do not have more values
        mean, std = self.encode(batch.x)
        prepared = {"latent_mean": to_rows(mean, shape), "latent_std": to_rows(std, shape)}
        prepared |= {} if self.text_trains else self.embed(batch.extra["caption"])
        return {key: value.half() for key, value in prepared.items()}

    def conditions(self, batch: Batch) -> dict[str, Tensor]:
        """The conditions of each image for `denoise`, see `Kind.embed`."""
        return self.embed_captions(batch, batch.noise.rand(len(batch)) < self.caption_dropout)

    def embed_captions(self, batch: Batch, hidden: Tensor) -> dict[str, Tensor]:
        """The embeddings of the captions. In the rows `hidden` [B], they are those of an empty text."""
        cached = {key: batch.extra[key].to(batch.x) for key in ("text", "pooled") if key in batch.extra}
        embedded = cached or self.embed(batch.extra["caption"])
        none = self.embed_once("")
        return {
            key: torch.where(per_row(hidden, value), none[key].to(value), value)
            for key, value in embedded.items()
        }

    def denoise(self, z_t: Tensor, t: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """The prediction, ε or v, for latents [B, c, h, w] at times t [B]."""
        return self.kind.predict(getattr(self, self.kind.net), z_t, t, conditions)

    def draw_latents(self, batch: Batch) -> Tensor:
        """A draw of the scaled latents of the batch, [B, c, h, w]."""
        if "latent_mean" in batch.extra:
            shape = self.latent_shape(*batch.x.shape[2:])
            rows = (batch.extra[f"latent_{key}"].to(batch.x) for key in ("mean", "std"))
            mean, std = (from_rows(values, shape) for values in rows)
        else:
            mean, std = self.encode(batch.x)
        return self.scaled(mean + std * batch.noise.randn(*mean.shape))

    def scaled(self, z: Tensor) -> Tensor:
        """The VAE's latents, [B, c, h, w], scaled for the net."""
        return (z - (self.vae.config.shift_factor or 0)) * self.vae.config.scaling_factor

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        return self.denoising_loss(self.draw_latents(batch), batch.noise, lambda: self.conditions(batch))

    def denoising_loss(
        self, z: Tensor, noise: Noise, conditions: Callable[[], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The mean of w_t (v̂ − v)² over the elements of latents z [n, c, h, w]."""
        n, eps = len(z), noise.randn(*z.shape)
        t = self.times(n, noise)
        if self.tuning.noise_offset:
            eps = eps + self.tuning.noise_offset * noise.randn(n, z.shape[1], 1, 1)
        embedded = conditions()
        z_t, target, weight = self.path(z, eps, t)
        out = []
        with self.in_dtype():
            for part in slices(z, n * z[0].numel() if torch.is_grad_enabled() else LATENTS):
                condition = {key: value[part] for key, value in embedded.items()}
                out.append(self.denoise(z_t[part], t[part], condition))
        error = (to_fp32(torch.cat(out)) - to_fp32(target)).square().flatten(1).mean(1)
        parts = {"mse": error.detach().mean()} if isinstance(weight, Tensor) else {}
        return {"loss": (weight * error).mean()} | parts

    def times(self, n: int, noise: Noise) -> Tensor:
        """Times [n] of training: integers of the base's schedule; for a flow, logit-normal in (0, 1)."""
        if not self.kind.flow:
            return noise.randint(self.schedule.config.num_train_timesteps, n)
        tau, config = noise.randn(n).sigmoid(), self.schedule.config
        # the shift of a dynamic schedule depends on the size of an image, and is not that of its training
        shift = 1.0 if config.use_dynamic_shifting else config.shift
        return shift * tau / (1 + (shift - 1) * tau)

    def path(self, z: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """z_t and the target [B, c, h, w] at times t [B], and the weights, [B] or 1."""
        if self.kind.flow:
            return torch.lerp(z, eps, per_row(t, z)), eps - z, 1.0
        v = self.schedule.config.prediction_type == "v_prediction"
        target = self.schedule.get_velocity(z, eps, t) if v else eps
        return self.schedule.add_noise(z, eps, t), target, self.weight(t, v)

    def weight(self, t: Tensor, v: bool) -> Tensor | float:
        gamma = self.tuning.min_snr
        if gamma is None:
            return 1.0
        alpha_bar = moved_to(self.schedule.alphas_cumprod, t.device)[t]
        snr = alpha_bar / (1 - alpha_bar)
        # γ / SNR and not min(SNR, γ) / SNR, which is 0/0 at zero SNR
        return snr.clamp(max=gamma) / (snr + 1) if v else (gamma / snr).clamp(max=1)

    # ---- examples

    def on_start(self, batch: Batch) -> None:
        """Stores captions and conditions of the first batch of all ranks, repeated if they are few."""
        if self.captions.any():
            return
        captions = torch.stack([to_bytes(caption) for caption in batch.extra["caption"]]).to(self.device)
        order = torch.arange(EXAMPLES, device=self.device)
        gathered = ranks.rows(captions, self)
        self.captions.copy_(gathered[order % len(gathered)])
        if self.condition:
            gathered = ranks.rows(to_levels(to_rgb(self.picture(batch)), 256).byte(), self)
            self.pictures.copy_(gathered[order % len(gathered)])

    def picture(self, batch: Batch) -> Tensor:
        """The condition of each image, [B, C, H, W] in [-1, 1]."""
        return batch.extra[self.condition]

    def examples(
        self, n: int, noise: Noise, prompt: str | list[str] | None, pictures: Tensor | None = None
    ) -> tuple[list[str], Any]:
        """n prompts, by default those of the option `prompts` or stored ones; and images [n, 3, H, W], by
        default stored ones, None for a model without a condition."""
        prompts = self.tuning.prompts
        pick = noise.randint(EXAMPLES * max(1, len(prompts)), n).tolist()
        if prompt is None:
            captions = prompts or [to_text(row) for row in self.captions.cpu()]
            prompt = [captions[i % len(captions)] for i in pick]
        texts = [prompt] * n if isinstance(prompt, str) else [prompt[i % len(prompt)] for i in range(n)]
        if self.condition:
            remembered = from_levels(self.pictures[[i % EXAMPLES for i in pick]], 256)
            pictures = to_rgb(remembered if pictures is None else pictures).to(self.device)
        return texts, pictures

    # ---- sampling

    def initial_latents(self, n: int, noise: Noise, size: Size | None) -> tuple[Tensor, tuple[int, int]]:
        """Latents of pure noise [n, c, h, w], and the size (H, W) of their images. This must be the first
        draw, so that a seed leads to the same latents with all options."""
        height, width = sides(size) if size else self.data.shape[1:]
        self.check_size(height, width, key="size")
        return noise.randn(n, *self.latent_shape(height, width)), (height, width)

    @torch.no_grad()
    def draw(
        self,
        pipe: Any,
        z: Tensor,
        noise: Noise,
        progress: Progress,
        prompts: list[str],
        prompting: PromptOptions,
        pictures: Mapping[str, Tensor],
        **options: Any,
    ) -> Tensor:
        """Images [n, C, H, W], drawn by a diffusers pipeline from the noise z [n, c, h, w], a few at a time.
        `images` has a row for each."""
        if prompting.steps < 1:
            raise UsageError(f"{prompting.steps} sampling steps are too few", hint="set `steps` to 1 or more")
        pipe.set_progress_bar_config(disable=True)
        n, seeds = len(z), noise.randint(2**31, len(z)).tolist()  # for schedulers that draw noise
        images = []
        for part in slices(z, LATENTS):
            count = len(prompts[part])
            negative = [prompting.negative] * count if prompting.negative else None

            def report(pipe: Any, step: int, *_: Any, first: int = part.start, count: int = count) -> Any:
                progress(first + count * (step + 1) / pipe.num_timesteps, n)
                return {}

            with self.in_dtype():
                output = pipe(
                    prompt=prompts[part],
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                    num_inference_steps=prompting.steps,
                    output_type="latent",
                    callback_on_step_end=report,
                    **{key: value[part] for key, value in pictures.items()},
                    **self.kind.to_pipeline(z[part], negative, prompting.guidance),
                    **options,
                )
            images.append(self.decode(self.kind.from_pipeline(output.images, z[part])))
        return torch.cat(images)


def to_bytes(caption: str) -> Tensor:
    """A caption's first bytes in UTF-8, followed by an end mark, uint8 [MAX_CAPTION_BYTES]."""
    text = caption.encode()[: MAX_CAPTION_BYTES - 1] + b"\n"
    return torch.frombuffer(bytearray(text.ljust(MAX_CAPTION_BYTES, b"\0")), dtype=torch.uint8)


def to_text(row: Tensor) -> str:
    """The caption of a row of `to_bytes`, without an incomplete last character."""
    return bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore").removesuffix("\n")
