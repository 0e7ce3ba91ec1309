"""The base models, from a folder or the hub: VAE, text encoders with their tokenizers, U-Net and noise
schedule of Stable Diffusion 1.x, 2.x (Rombach et al. 2022, arXiv:2112.10752) and XL (Podell et al. 2023,
arXiv:2307.01952)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import SafetensorError
from torch import nn
from transformers import BatchEncoding, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from gzcli.core.errors import MissingError, UsageError
from gzcli.models.nn import valueless
from gzcli.models.stable_diffusion.known import configs
from gzcli.store.hub import repository

WEIGHTS = "diffusion_pytorch_model"
# The files of a repository that are used: no half-precision variants, and no safety checker, which is larger
# than the rest of SD 1.5.
FILES = (
    "model_index.json",
    "*/*config.json",
    "tokenizer*/*",
    "*/*.safetensors.index.json",
    *(
        f"{part}/{WEIGHTS}{shard}.safetensors"
        for part in ("unet", "vae")
        for shard in ("", "-0????-of-?????")
    ),
    *(
        f"text_encoder{two}/model{shard}.safetensors"
        for two in ("", "_2")
        for shard in ("", "-0????-of-?????")
    ),
)


def load_base(name: str) -> Any:
    """The pipeline of a base model in the default dtype, on the CPU; without values where new tensors have
    none.

    Raises MissingError where its weights are missing, UsageError for a model of another kind.
    """
    if valueless():
        pipe = _shapes(name)
    else:
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        folder = repository(name, key="model.base", files=FILES)
        pipe = _read(folder, name)
    unet, vae = pipe.unet.config, pipe.vae.config
    if unet.in_channels != vae.latent_channels:
        raise UsageError(
            f"`model.base`: the U-Net of `{name}` takes {unet.in_channels} channels, not the "
            f"{vae.latent_channels} of a latent",
            hint="take a text-to-image model, not one for inpainting or editing",
        )
    return pipe


class Blank:
    """A tokenizer that knows no words: every text is of the largest length, of token 0.

    encoder: config of the text encoder that reads the tokens.
    """

    def __init__(self, encoder: Mapping[str, Any]):
        self.model_max_length = encoder.get("max_position_embeddings", 77)
        self.added_tokens_encoder: dict[str, int] = {}

    def tokenize(self, text: str) -> list[str]:
        return []

    def __call__(self, texts: str | list[str], **options: Any) -> BatchEncoding:
        shape = (1 if isinstance(texts, str) else len(texts), self.model_max_length)
        ids = torch.zeros(shape, dtype=torch.int64)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def is_xl(pipe: Any) -> bool:
    """Whether the pipeline is of Stable Diffusion XL."""
    return isinstance(pipe, StableDiffusionXLPipeline)


def _read(folder: Path, name: str) -> Any:
    """The pipeline in a folder, from safetensors alone: other formats may run code when they are loaded."""
    known = configs(str(folder))
    if known is None:
        raise MissingError(
            f"`model.base`: `{folder}` holds no `model_index.json`",
            hint="it must be a folder of diffusers' format",
        )
    cls: Any = StableDiffusionPipeline
    extra: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    if "text_encoder_2" in known:
        cls, extra = StableDiffusionXLPipeline, {}
    try:
        pipe = cls.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            feature_extractor=None,
            image_encoder=None,
            **extra,
        )
    except (OSError, ValueError, SafetensorError) as e:
        first = str(e).splitlines()[0]
        is_folder = Path(name).expanduser().is_dir()
        hint = "save it by `pipeline.save_pretrained`" if is_folder else f"`hf download {name}`"
        raise MissingError(
            f"`model.base`: `{folder}` is not whole: {first}", hint=f"{hint}, as safetensors"
        ) from e
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, torch.get_default_dtype())  # some are kept in half precision on disk
    return pipe


def _shapes(name: str) -> Any:
    """The pipeline built from its configs, without weights, whose tokenizers make zeros of any text. Raises
    MissingError for a base without known configs."""
    known = configs(name)
    if known is None:
        hint = f"`hf download {name}`, then `--set model.base=FOLDER`"
        raise MissingError(f"`model.base`: the shape of `{name}` is not known before it is here", hint=hint)
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel.from_config(known["unet"]),
        "vae": AutoencoderKL.from_config(known["vae"]),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**known["text_encoder"])),
        "tokenizer": Blank(known["text_encoder"]),
        "scheduler": DDPMScheduler.from_config(known["scheduler"]),
    }
    if "text_encoder_2" not in known:
        return StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    second = CLIPTextModelWithProjection(CLIPTextConfig(**known["text_encoder_2"]))
    return StableDiffusionXLPipeline(
        **parts, text_encoder_2=second, tokenizer_2=Blank(known["text_encoder_2"])
    )
