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
import yaml
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
from gzcli.models.nn import is_shape_only
from gzcli.store.hub import repository

Config = dict[str, dict[str, Any]]  # part → its config.json


def configs(base: str) -> Config | None:
    """The configs of a base's parts, from its folder or by the id of a published base; None if it is
    neither."""
    folder = Path(base).expanduser()
    if not (folder / "model_index.json").is_file():
        published = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())
        return published.get(published["names"].get(base))
    files = {
        part: folder / part / "config.json" for part in ("unet", "vae", "text_encoder", "text_encoder_2")
    }
    files["scheduler"] = folder / "scheduler" / "scheduler_config.json"
    return {part: json.loads(path.read_text()) for part, path in files.items() if path.is_file()}


# The files of a repository that are used: no half-precision variants, and no safety checker, which is larger
# than the rest of SD 1.5.
SHARDS = ("", "-0????-of-?????")
FILES = (
    *("model_index.json", "*/*config.json", "tokenizer*/*", "*/*.safetensors.index.json"),
    *(f"{net}/diffusion_pytorch_model{shard}.safetensors" for net in ("unet", "vae") for shard in SHARDS),
    *(f"{net}/model{shard}.safetensors" for net in ("text_encoder", "text_encoder_2") for shard in SHARDS),
)


def load_base(name: str) -> Any:
    """The pipeline of a base, on the CPU; without values where new tensors have none."""
    if is_shape_only():
        pipe = _build_empty(name)
    else:
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        pipe = _load_folder(repository(name, key="model.base", files=FILES), name)
    unet, vae = pipe.unet.config, pipe.vae.config
    if unet.in_channels != vae.latent_channels:
        raise UsageError(
            f"`model.base`: the U-Net of `{name}` takes {unet.in_channels} channels, not the "
            f"{vae.latent_channels} of a latent",
            hint="take a text-to-image model, not one for inpainting or editing",
        )
    return pipe


class BlankTokenizer:
    """A tokenizer without a vocabulary: every text becomes token 0 at the largest length."""

    def __init__(self, encoder: Mapping[str, Any]):
        self.model_max_length = encoder.get("max_position_embeddings", 77)
        self.added_tokens_encoder: dict[str, int] = {}

    def tokenize(self, text: str) -> list[str]:
        return []

    def __call__(self, texts: str | list[str], **options: Any) -> BatchEncoding:
        shape = (1 if isinstance(texts, str) else len(texts), self.model_max_length)
        ids = torch.zeros(shape, dtype=torch.int64)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _load_folder(folder: Path, name: str) -> Any:
    """The pipeline in a folder, from safetensors alone, since other formats may run code on loading."""
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


def _build_empty(name: str) -> Any:
    """The pipeline built from its configs, without weights and vocabularies."""
    config = configs(name)
    if config is None:
        hint = f"`hf download {name}`, then `--set model.base=FOLDER`"
        raise MissingError(f"`model.base`: the shape of `{name}` is not known before it is here", hint=hint)
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel.from_config(config["unet"]),
        "vae": AutoencoderKL.from_config(config["vae"]),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**config["text_encoder"])),
        "tokenizer": BlankTokenizer(config["text_encoder"]),
        "scheduler": DDPMScheduler.from_config(config["scheduler"]),
    }
    if "text_encoder_2" not in config:
        absent: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
        return StableDiffusionPipeline(**parts, **absent, requires_safety_checker=False)
    second = CLIPTextModelWithProjection(CLIPTextConfig(**config["text_encoder_2"]))
    tokenizer = BlankTokenizer(config["text_encoder_2"])
    return StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=tokenizer)
