"""Latent diffusion with text — Rombach et al. 2022, arXiv:2112.10752 — fine-tuned on captioned images (x, c).

    z_0 = s · E(x),  z_t = α_t z_0 + σ_t ε,  E_t w_t ‖v̂(z_t, t, τ(c)) − v‖²

E is a draw of the VAE's posterior, s its scale, and τ the text encoder(s). The target v is ε or
α_t ε − σ_t z_0, as the base was trained. The weight is 1 or, with SNR = α²/σ² (min-SNR: Hang et al. 2023,
arXiv:2303.09556),

    w_t = min(SNR_t, γ) / SNR_t of ε,    w_t = min(SNR_t, γ) / (SNR_t + 1) of the v-prediction
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from gzcli.core import ranks
from gzcli.core.errors import UsageError
from gzcli.core.types import Batch, DataInfo, Noise, Progress, moved
from gzcli.models.nn import from_levels, to_fp32, to_levels
from gzcli.models.stable_diffusion.images import colours, rows, slices
from gzcli.models.stable_diffusion.options import PromptOptions, TuningOptions
from gzcli.models.stable_diffusion.pretrained import Pretrained

LATENTS = 8 * 64**2  # positions of the latents that pass the U-Net at once where no gradient is needed
EXAMPLES = 8  # training images whose captions and conditions are remembered
CAPTION = 300  # bytes of a remembered caption


class StableDiffusion(Pretrained):
    """The loss, examples remembered from training, and sampling by a pipeline of diffusers.

    caption_dropout: share of the training images whose caption is hidden, which guidance needs.
    """

    best: ClassVar[str] = "loss"
    shares: ClassVar[bool] = True
    condition: ClassVar[str] = ""  # the key of the picture that the model takes beside the text; "": none
    captions: Tensor  # uint8 [EXAMPLES, CAPTION]
    pictures: Tensor  # uint8 [EXAMPLES, 3, H, W], where there is a condition

    def __init__(self, data: DataInfo, tuning: TuningOptions, caption_dropout: float = 0.0):
        super().__init__(data, tuning)
        self.tuning, self.caption_dropout = tuning, caption_dropout
        self.register_buffer("captions", torch.zeros(EXAMPLES, CAPTION, dtype=torch.uint8))
        if self.condition:
            self.register_buffer("pictures", torch.zeros(EXAMPLES, 3, *data.shape[1:], dtype=torch.uint8))

    def prepare(self, batch: Batch) -> dict[str, Tensor]:
        """The outputs of the frozen parts for each image, computed once: the distribution of its latent, of
        which each step takes a new draw, and the embedding of its caption.

        Half precision moves a latent by less than a hundredth of its deviation.
        """
        if not self.tuning.cache:
            return {}
        mean, std = self.encode(batch.x)
        found = {"latent_mean": mean, "latent_std": std}
        found |= {} if self.text_trains else self.embed(batch.extra["caption"])
        return {key: value.half() for key, value in found.items()}

    # ---- training

    def conditions(self, batch: Batch) -> dict[str, Tensor]:
        """The conditions of each image for `denoise`: `text` and, for XL, `pooled`."""
        return self.texts(batch, batch.noise.rand(len(batch)) < self.caption_dropout)

    def texts(self, batch: Batch, hidden: Tensor) -> dict[str, Tensor]:
        """The embeddings of the captions; in the rows `hidden` [B], those of no text."""
        known = {key: batch.extra[key].to(batch.x) for key in ("text", "pooled") if key in batch.extra}
        found = known or self.embed(batch.extra["caption"])
        none = self.embed_nothing()
        return {
            key: torch.where(rows(hidden, value), none[key].to(value), value) for key, value in found.items()
        }

    def denoise(self, z_t: Tensor, t: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """The base's prediction, ε or v, for latents [B, c, h, w] at times t [B]."""
        raise NotImplementedError

    def draw_latents(self, batch: Batch) -> Tensor:
        """A draw of the scaled latents of the batch, [B, c, h, w]."""
        if "latent_mean" in batch.extra:
            mean, std = (batch.extra[f"latent_{key}"].to(batch.x) for key in ("mean", "std"))
        else:
            mean, std = self.encode(batch.x)
        return (mean + std * batch.noise.randn(*mean.shape)) * self.vae.config.scaling_factor

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The mean of w_t (v̂ − v)² over the elements of latents. With min-SNR weights it also logs `mse`,
        the mean without weights."""
        n, noise = len(batch), batch.noise
        z = self.draw_latents(batch)
        eps = noise.randn(*z.shape)
        t = noise.randint(self.schedule.config.num_train_timesteps, n)
        if self.tuning.noise_offset:
            eps = eps + self.tuning.noise_offset * noise.randn(n, z.shape[1], 1, 1)
        conditions = self.conditions(batch)
        v = self.schedule.config.prediction_type == "v_prediction"
        target, z_t = self.schedule.get_velocity(z, eps, t) if v else eps, self.schedule.add_noise(z, eps, t)
        out = []
        with self.in_dtype():
            for part in slices(z, n * z[0].numel() if torch.is_grad_enabled() else LATENTS):
                own = {key: value[part] for key, value in conditions.items()}
                out.append(self.denoise(z_t[part], t[part], own))
        error = (to_fp32(torch.cat(out)) - to_fp32(target)).square().flatten(1).mean(1)
        parts = {"mse": error.detach().mean()} if self.tuning.min_snr else {}
        return {"loss": (self.weight(t, v) * error).mean()} | parts

    def weight(self, t: Tensor, v: bool) -> Tensor | float:
        """w_t [B]."""
        gamma = self.tuning.min_snr
        if gamma is None:
            return 1.0
        alpha_bar = moved(self.schedule.alphas_cumprod, t.device)[t]
        snr = alpha_bar / (1 - alpha_bar)
        # γ / SNR and not min(SNR, γ) / SNR, which is 0/0 at zero SNR
        return snr.clamp(max=gamma) / (snr + 1) if v else (gamma / snr).clamp(max=1)

    # ---- examples

    def on_start(self, batch: Batch) -> None:
        """Stores captions and conditions of the first batch of all ranks, repeated if they are few."""
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

    def examples(self, n: int, noise: Noise, prompt: str | list[str] | None) -> tuple[list[str], list[int]]:
        """n prompts, and n indices of remembered examples.

        Without a prompt, prompts are drawn from the option `prompts`, or else from the remembered captions.
        """
        prompts = self.tuning.prompts
        pick = noise.randint(EXAMPLES * max(1, len(prompts)), n).tolist()
        if prompt is None:
            known = prompts or [to_text(row) for row in self.captions.cpu()]
            prompt = [known[i % len(known)] for i in pick]
        texts = [prompt] * n if isinstance(prompt, str) else [prompt[i % len(prompt)] for i in range(n)]
        return texts, [i % EXAMPLES for i in pick]

    def examples_with_pictures(
        self, n: int, noise: Noise, prompt: str | list[str] | None, given: Tensor | None
    ) -> tuple[list[str], Tensor]:
        """n prompts, see `examples`, and n pictures [n, 3, H, W], the given ones or else remembered ones."""
        prompts, pick = self.examples(n, noise, prompt)
        pictures = from_levels(self.pictures[pick], 256) if given is None else given
        return prompts, colours(pictures).to(self.device)

    # ---- sampling

    def start(self, n: int, noise: Noise, size: int | None) -> tuple[Tensor, tuple[int, int]]:
        """Latents of pure noise [n, c, h, w], and the size (H, W) of their images.

        This must be the first draw, so that a seed has the same latents under all options. Raises UsageError
        for a size that the latents cannot have.

        size: side of square images in pixels; None: the size of the training images.
        """
        height, width = (size, size) if size else self.data.shape[1:]
        self.check_size(height, width, key="size")
        shape = [side // self.pipe.vae_scale_factor for side in (height, width)]
        return noise.randn(n, self.vae.config.latent_channels, *shape), (height, width)

    @torch.no_grad()
    def draw(
        self,
        pipe: Any,
        z: Tensor,
        noise: Noise,
        progress: Progress,
        prompts: list[str],
        how: PromptOptions,
        pictures: Mapping[str, Tensor],
        **options: Any,
    ) -> Tensor:
        """Images [n, C, H, W] by a pipeline of diffusers from the noise z [n, c, h, w] and n prompts, a few
        at a time.

        Raises UsageError for less than one step.

        pictures: keywords of the pipeline with a row for each image.
        options: other keywords of the pipeline.
        """
        if how.steps < 1:
            raise UsageError(f"{how.steps} sampling steps", hint="set `steps` to 1 or more")
        pipe.set_progress_bar_config(disable=True)
        n, seeds = len(z), noise.randint(2**31, len(z)).tolist()  # for schedulers that draw
        images = []
        for part in slices(z, LATENTS):
            count = len(prompts[part])

            def report(pipe: Any, step: int, *_: Any, first: int = part.start, count: int = count) -> Any:
                progress(first + count * (step + 1) / pipe.num_timesteps, n)
                return {}

            with self.in_dtype():
                found = pipe(
                    prompt=prompts[part],
                    negative_prompt=[how.negative] * count if how.negative else None,
                    latents=z[part],
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                    guidance_scale=how.guidance,
                    num_inference_steps=how.steps,
                    output_type="latent",
                    callback_on_step_end=report,
                    **{key: value[part] for key, value in pictures.items()},
                    **options,
                )
            images.append(self.decode(found.images))
        return torch.cat(images)


def to_bytes(caption: str) -> Tensor:
    """A caption's first bytes in UTF-8 and an end mark, uint8 [CAPTION]."""
    text = caption.encode()[: CAPTION - 1] + b"\n"
    return torch.frombuffer(bytearray(text.ljust(CAPTION, b"\0")), dtype=torch.uint8)


def to_text(row: Tensor) -> str:
    """The caption of a row of `to_bytes`, without a last letter that was cut."""
    return bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore").removesuffix("\n")
