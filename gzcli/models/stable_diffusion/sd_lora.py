"""LoRA of Stable Diffusion and FLUX — Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models",
arXiv:2106.09685.

    W x + (α / r) · B A x,   A [r, in] ~ N(0, 1/r²),  B [out, r] = 0 at first

W are the frozen linear maps in the attention of the net and, with `text_lora`, of CLIP's text encoders. A
checkpoint contains only A and B; `gz runs export` writes the file that `load_lora_weights` of diffusers
reads.

From a few photos of one dog, the model learns that all dogs look like it. Prior preservation (Ruiz et al.
2022, DreamBooth, arXiv:2208.12242, eq. 2) adds the loss on images of `a dog` that the base has drawn before
training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import T5EncoderModel

from gzcli.core.types import Batch, DataInfo, ImageNoise, Noise, Progress, no_progress
from gzcli.models.nn import at_least
from gzcli.models.stable_diffusion.base import PromptOptions, StableDiffusion, TuningOptions

PRIOR_SEED = 0  # seed of the images drawn by the base
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class PriorOptions:
    """Prior preservation.

    prior: text of the class that the subject belongs to, such as `a dog` (DreamBooth prior preservation).
      Default: none.
    prior_images: number of images that the base draws of the class in `prior`, with guidance 7.5 in 30 steps.
    prior_weight: weight λ of the loss of the prior images.
    """

    prior: str | None = None
    prior_images: int = 64
    prior_weight: float = 1.0


class SDLoRA(StableDiffusion):
    """A LoRA for Stable Diffusion 1.x, 2.x, XL or 3.x, or for FLUX.1.

    rank: rank r of the product B A that is added to a layer's weights.
    alpha: α. The product is scaled by α / r. Default: r.
    targets: adapted layers of the network, by the ends of their names.
    text_lora: whether to adapt the attention of CLIP's text encoders, too.
    """

    paper = "Hu et al. 2021, arXiv:2106.09685"
    needs: ClassVar[tuple[str, ...]] = ("caption",)
    aspects: ClassVar[bool] = True
    prior_latents: Tensor  # [prior_images, c, h, w]

    def __init__(
        self,
        data: DataInfo,
        *,
        rank: int = 16,
        alpha: float | None = None,
        targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0"),
        text_lora: bool = False,
        prior: PriorOptions = PriorOptions(),
        tuning: TuningOptions = TuningOptions(),
        caption_dropout: float = 0.0,
    ):
        super().__init__(data, tuning, caption_dropout)
        self.text_trains = text_lora
        self.adapted = {self.kind.net: targets}
        if text_lora:
            clips = [name for name, cls in self.kind.encoders.items() if cls is not T5EncoderModel]
            self.adapted |= dict.fromkeys(clips, TEXT_TARGETS)
        self.adapter = nn.ModuleDict()  # the trained layers of the attached parts, in full precision
        for part, names in self.adapted.items():
            module = getattr(self, part)
            config = LoraConfig(
                r=rank,
                lora_alpha=alpha or rank,  # type: ignore[arg-type]  # any number will do
                init_lora_weights="gaussian",
                target_modules=list(names),
            )
            inject_adapter_in_model(config, module)
            for name, layer in module.named_modules():
                if isinstance(layer, BaseTunerLayer):
                    for kind in ("lora_A", "lora_B"):
                        key = f"{part}.{name}.{kind}".replace(".", "/")
                        self.adapter[key] = getattr(layer, kind)["default"]
        self.adapter.to(torch.get_default_dtype()).requires_grad_(True)
        self.prior = prior
        if prior.prior is not None:
            at_least(1, prior_images=prior.prior_images)
            latents = torch.zeros(prior.prior_images, *self.latent_shape(*data.shape[1:]))
            self.register_buffer("prior_latents", latents)

    # ---- prior preservation

    def on_start(self, batch: Batch) -> None:
        super().on_start(batch)
        if self.prior.prior is not None and not self.prior_latents.any():
            noise = ImageNoise(PRIOR_SEED, range(self.prior.prior_images), self.device)
            prompting = PromptOptions(self.prior.prior)
            with torch.no_grad():  # B is still 0, so this is the base
                images = self.sample(
                    self.prior.prior_images, noise=noise, progress=no_progress, prompting=prompting
                )
                self.prior_latents.copy_(self.scaled(self.encode(images)[0]))

    def loss(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        losses, n = super().loss(batch, phase), len(batch)
        if self.prior.prior is None or not self.training:
            return losses
        z = self.prior_latents[batch.noise.randint(self.prior.prior_images, n)]
        rows = {key: v.expand(n, *v.shape[1:]) for key, v in self.embed_once(self.prior.prior).items()}
        prior = self.denoising_loss(z, batch.noise, lambda: rows)["loss"]
        return losses | {"loss": losses["loss"] + self.prior.prior_weight * prior, "prior": prior.detach()}

    # ---- sampling

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        labels: Tensor | None = None,
        noise: Noise,
        progress: Progress,
        prompting: PromptOptions = PromptOptions(),
        lora_scale: float = 1.0,
    ) -> Tensor:
        """Draws n images [n, C, H, W] in [-1, 1] of the prompts.

        lora_scale: factor of the adapter's output. 0: the base only.
        """
        z, (height, width) = self.initial_latents(n, noise, prompting.size)
        prompts, _ = self.examples(n, noise, prompting.prompt)
        options = {"height": height, "width": width, self.kind.scale_key: {"scale": lora_scale}}
        return self.draw(self.pipe, z, noise, progress, prompts, prompting, pictures={}, **options)

    def to_diffusers(self) -> Any:
        """The adapter as `pytorch_lora_weights.safetensors`."""
        return Adapter(self)


class Adapter:
    """The adapter of a model, saved in diffusers' format."""

    loaded_by = "pipeline.load_lora_weights"

    def __init__(self, model: SDLoRA):
        self.model = model

    def save_pretrained(self, folder: str) -> None:
        layers = {}
        for part in self.model.adapted:
            module = getattr(self.model, part)
            config = module.peft_config["default"]
            scale = {"A": 1.0, "B": config.lora_alpha / config.r}
            state = get_peft_model_state_dict(module)
            layers[f"{part}_lora_layers"] = {
                key: scale[key.split(".lora_")[1][0]] * value for key, value in state.items()
            }
        type(self.model.pipe).save_lora_weights(folder, **layers)
