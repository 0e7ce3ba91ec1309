"""Options of the models that tune Stable Diffusion. No torch here: the memory plan reads them too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

Dtype = Literal["fp32", "bf16", "fp16"]

PIXELS = 2 * 512**2  # of images that the VAE is given at once, or one image that has more


@dataclass(frozen=True)
class TuningOptions:
    """How a base is tuned.

    base: the pretrained model, a folder in diffusers' format or an id on the hub.
    dtype: precision of the parts that are not trained; the VAE stays in fp32, because XL's overflows in fp16.
    cache: whether latents and text embeddings are made once, and not at every step.
    checkpointing: whether activations are computed again in the backward pass, which saves memory.
    min_snr: γ, the largest signal-to-noise ratio in the weight of a noise level, often 5; null: all levels
      weigh 1.
    noise_offset: scale of noise that is the same at all pixels; 0.05 … 0.1 makes very dark and very bright
      images possible.
    prompts: texts of the pictures that training shows; none: captions of the first batch.
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
    """Which layers a LoRA adapts, and by how much.

    rank: r, of the matrices B A that are added to a layer's weights.
    alpha: α; what is added is multiplied by α / r; null: r.
    targets: the adapted layers of the U-Net, by the ends of their names.
    text_lora: whether the attention of the text encoders is adapted too.
    """

    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    text_lora: bool = False


@dataclass(frozen=True)
class PromptOptions:
    """What is sampled.

    prompt: texts of the images, which are cycled through; null: captions remembered from training.
    negative: text of what the images should not show.
    guidance: scale of classifier-free guidance towards the text; 1: none.
    steps: of the base's own scheduler.
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
