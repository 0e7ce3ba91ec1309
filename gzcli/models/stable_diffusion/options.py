"""Options of the models that fine-tune Stable Diffusion. This module imports no torch, as the memory plan
uses it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

Dtype = Literal["fp32", "bf16", "fp16"]

PIXELS = 2 * 512**2  # most pixels that pass the VAE at once, unless a single image has more


@dataclass(frozen=True)
class TuningOptions:
    """How a base is fine-tuned.

    base: the pretrained model, a folder in diffusers' format or an id on the hub.
    dtype: precision of the frozen parts; the VAE stays in fp32, because XL's overflows in fp16.
    cache: whether latents and text embeddings are computed once, in place of at every step.
    checkpointing: whether activations are recomputed in the backward pass, which saves memory.
    min_snr: γ, the largest signal-to-noise ratio in the weight of a noise level, often 5; null: all weights
      are 1.
    noise_offset: scale of noise that is equal at all pixels; 0.05 … 0.1 makes very dark and very bright
      images possible.
    prompts: texts of the pictures that training shows; empty: captions of the first batch.
    """

    base: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    dtype: Dtype = "fp32"
    cache: bool = True
    checkpointing: bool = False
    min_snr: float | None = None
    noise_offset: float = 0.0
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoRAOptions:
    """The adapted layers of a LoRA, and the size of the adapter.

    rank: rank r of the product B A that is added to a layer's weights.
    alpha: α; the product is scaled by α / r; null: r.
    targets: the adapted layers of the U-Net, by the ends of their names.
    text_lora: whether the attention of the text encoders is adapted too.
    """

    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    text_lora: bool = False


@dataclass(frozen=True)
class PromptOptions:
    """The text of images, and the sampling steps.

    prompt: texts of the images, used in turn; null: captions remembered from training.
    negative: text that the images should not show.
    guidance: scale of classifier-free guidance towards the text; 1: none.
    steps: steps of the base's own scheduler.
    size: side of the images in pixels; null: as in training.
    """

    prompt: str | list[str] | None = None
    negative: str = ""
    guidance: float = 7.5
    steps: int = 30
    size: int | None = None


Options = TypeVar("Options", TuningOptions, LoRAOptions)


def taken(kind: type[Options], options: Mapping[str, Any]) -> Options:
    """The options of one kind among the flat options of a recipe."""
    return kind(**{f.name: options[f.name] for f in fields(kind) if f.name in options})
