"""The kinds of bases, by the class in their `model_index.json`: Stable Diffusion 1.x and 2.x (Rombach et al.
2022, arXiv:2112.10752), XL (Podell et al. 2023, arXiv:2307.01952), and two that predict the velocity of a
flow, 3.x (Esser et al. 2024, arXiv:2403.03206) and FLUX.1 (Black Forest Labs 2024).

A kind defines how texts become conditions and how its net is called. The loss and the sampling are in `base`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from gzcli.core.errors import UsageError
from gzcli.core.types import moved_to

Config = dict[str, dict[str, Any]]  # part → its config.json; with `model_index`
FLUX_GUIDANCE = 3.5  # guidance given to the net in training, the default of diffusers' examples


class Kind:
    """Stable Diffusion 1.x and 2.x.

    label: name of the kind in messages.
    cls: diffusers' pipeline.
    encoders: the pipeline's text encoders with their classes.
    net: the denoising part of the pipeline, of the class `net_class`.
    scheduler_class: class of its schedule.
    scale_key: the pipeline's keyword for the scale of an adapter.
    multiple: the sides of latents are multiples of it.
    packing: number of latents that the net takes as one.
    flow: whether the net predicts the velocity ε − z_0 of z_t = (1 − t) z_0 + t ε.
    """

    label: ClassVar[str] = "Stable Diffusion 1.x and 2.x"
    cls: ClassVar[Any] = StableDiffusionPipeline
    encoders: ClassVar[dict[str, Any]] = {"text_encoder": CLIPTextModel}
    net: ClassVar[str] = "unet"
    net_class: ClassVar[Any] = UNet2DConditionModel
    scheduler_class: ClassVar[Any] = DDIMScheduler
    scale_key: ClassVar[str] = "cross_attention_kwargs"
    multiple: ClassVar[int] = 1
    packing: ClassVar[int] = 1
    flow: ClassVar[bool] = False
    absent: ClassVar[dict[str, Any]] = {  # parts of the pipeline that are not used
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    empty_is_zero: bool = False  # whether an empty text is embedded as zeros

    def __init__(self, pipe: Any):
        self.pipe = pipe

    @classmethod
    def built(cls, config: Config, tokenizer: Callable[[type, Any], Any]) -> Kind:
        """A base of these configs with new weights; `tokenizer` creates the tokenizer of a text encoder from
        its class and config."""
        parts: dict[str, Any] = {
            cls.net: cls.net_class.from_config(config[cls.net]),
            "vae": AutoencoderKL.from_config(config["vae"]),
            "scheduler": cls.scheduler_class.from_config(config["scheduler"]),
        }
        for part, encoder in cls.encoders.items():
            sizes, name = config.get(part), part.replace("text_encoder", "tokenizer")
            parts[part] = encoder(encoder.config_class(**sizes)) if sizes else None
            parts[name] = tokenizer(encoder, sizes) if sizes else None
        return cls(cls.cls(**parts, **cls.absent))

    def options(self) -> dict[str, Any]:
        """Options with which another pipeline of the same parts is built."""
        return {"requires_safety_checker": False}

    def embed(self, captions: list[str], device: torch.device) -> dict[str, Tensor]:
        """`text` [B, L, D] and, except for 1.x and 2.x, `pooled` [B, P]."""
        text, _ = self.pipe.encode_prompt(captions, device, 1, do_classifier_free_guidance=False)
        return {"text": text}

    def inputs(self, z_t: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        """The texts as keywords of the net, or of a ControlNet, for latents z_t [B, c, h, w]."""
        return {"encoder_hidden_states": conditions["text"]}

    def predict(self, net: Any, z_t: Tensor, t: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """The net's output for latents z_t [B, c, h, w] at times t [B]: 0 … 999, or in [0, 1] for a flow."""
        return net(z_t, timestep=t, **self.inputs(z_t, conditions)).sample

    def to_pipeline(self, z: Tensor, negative: list[str] | None, guidance: float) -> dict[str, Any]:
        """Noise and guidance as keywords of the pipeline."""
        return {"latents": z, "negative_prompt": negative, "guidance_scale": guidance}

    def from_pipeline(self, latents: Tensor, like: Tensor) -> Tensor:
        """The latents that a pipeline returns, in the shape of `like` [B, c, h, w]."""
        return latents


class XL(Kind):
    """Stable Diffusion XL: two text encoders, and the sizes of an uncropped image."""

    label = "XL"
    absent: ClassVar = {}
    cls = StableDiffusionXLPipeline
    encoders: ClassVar = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}

    def __init__(self, pipe: Any):
        super().__init__(pipe)
        self.empty_is_zero = pipe.config.force_zeros_for_empty_prompt

    def options(self) -> dict[str, Any]:
        return {"force_zeros_for_empty_prompt": self.empty_is_zero}

    def embed(self, captions: list[str], device: torch.device) -> dict[str, Tensor]:
        text, _, pooled, _ = self.pipe.encode_prompt(
            captions, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"text": text, "pooled": pooled}

    def inputs(self, z_t: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        height, width = (side * self.pipe.vae_scale_factor for side in z_t.shape[2:])
        sizes = moved_to(torch.tensor([height, width, 0, 0, height, width]), z_t.device).expand(len(z_t), -1)
        pooled = conditions["pooled"]
        added = {"text_embeds": pooled, "time_ids": sizes.to(pooled)}
        return super().inputs(z_t, conditions) | {"added_cond_kwargs": added}


class SD3(Kind):
    """Stable Diffusion 3.x: a transformer over texts and patches, two CLIPs and a T5, which may be absent."""

    label = "3.x"
    absent: ClassVar = {}
    cls: ClassVar[Any] = StableDiffusion3Pipeline
    encoders: ClassVar = {
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
    }
    net = "transformer"
    net_class: ClassVar[Any] = SD3Transformer2DModel
    scheduler_class = FlowMatchEulerDiscreteScheduler
    scale_key = "joint_attention_kwargs"
    multiple = 2
    flow = True
    tokenizer: ClassVar[str] = "tokenizer_3"  # of T5
    length: ClassVar[int] = 256  # most tokens of a text for T5

    def options(self) -> dict[str, Any]:
        return {}

    def max_length(self) -> int:
        """Tokens to which the texts for T5 are padded."""
        tokenizer = getattr(self.pipe, self.tokenizer)
        return min(self.length, tokenizer.model_max_length) if tokenizer else self.length

    def embed(self, captions: list[str], device: torch.device) -> dict[str, Tensor]:
        text, _, pooled, _ = self.pipe.encode_prompt(
            captions,
            None,
            None,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_length(),
        )
        return {"text": text, "pooled": pooled}

    def inputs(self, z_t: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        return super().inputs(z_t, conditions) | {"pooled_projections": conditions["pooled"]}

    def predict(self, net: Any, z_t: Tensor, t: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        steps = self.pipe.scheduler.config.num_train_timesteps
        return super().predict(net, z_t, t * steps, conditions)

    def to_pipeline(self, z: Tensor, negative: list[str] | None, guidance: float) -> dict[str, Any]:
        return super().to_pipeline(z, negative, guidance) | {"max_sequence_length": self.max_length()}


class Flux(SD3):
    """FLUX.1: a transformer over blocks of 2×2 latents, a CLIP for the pooled text and a T5."""

    label = "FLUX.1"
    cls = FluxPipeline
    encoders: ClassVar = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
    net_class = FluxTransformer2DModel
    packing = 4
    tokenizer = "tokenizer_2"
    length = 512

    def embed(self, captions: list[str], device: torch.device) -> dict[str, Tensor]:
        text, pooled, _ = self.pipe.encode_prompt(
            captions, None, device=device, max_sequence_length=self.max_length()
        )
        return {"text": text, "pooled": pooled}

    def inputs(self, z_t: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        text = conditions["text"]
        rows, columns = (side // 2 for side in z_t.shape[2:])
        places = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns))
        guided = self.pipe.transformer.config.guidance_embeds
        return super().inputs(z_t, conditions) | {
            "img_ids": moved_to(places, z_t.device).to(text),
            "txt_ids": text.new_zeros(text.shape[1], 3),
            "guidance": z_t.new_full((len(z_t),), FLUX_GUIDANCE) if guided else None,
        }

    def predict(self, net: Any, z_t: Tensor, t: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        out = net(packed(z_t), timestep=t, **self.inputs(z_t, conditions)).sample
        return self.from_pipeline(out, z_t)

    def to_pipeline(self, z: Tensor, negative: list[str] | None, guidance: float) -> dict[str, Any]:
        # with a negative text the guidance is that of two predictions, as of the other kinds
        keywords = super().to_pipeline(packed(z), negative, FLUX_GUIDANCE if negative else guidance)
        return keywords | {"true_cfg_scale": guidance if negative else 1.0}

    def from_pipeline(self, latents: Tensor, like: Tensor) -> Tensor:
        n, c, h, w = like.shape
        blocks = latents.view(n, h // 2, w // 2, c, 2, 2)
        return blocks.permute(0, 3, 1, 4, 2, 5).reshape(like.shape)


def packed(z: Tensor) -> Tensor:
    """Latents [B, c, h, w] as a row of blocks of 2×2, [B, h/2 · w/2, 4 c]."""
    n, c, h, w = z.shape
    return z.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, 4 * c)


PIPELINE_KINDS: tuple[type[Kind], ...] = (Kind, XL, SD3, Flux)


def kind_of(config: Config, name: str) -> type[Kind]:
    """The kind of the base `name`, recognised by its configs. Raises UsageError for one that no model can
    tune."""
    cls = config["model_index"].get("_class_name")
    kind = next((kind for kind in PIPELINE_KINDS if kind.cls.__name__ == cls), None)
    if kind is None:
        able = ", ".join(f"{kind.label} (`{kind.cls.__name__}`)" for kind in PIPELINE_KINDS)
        raise UsageError(
            f"`model.base`: `{name}` is a `{cls}`, which gz does not support", hint=f"choose one of {able}"
        )
    return kind
