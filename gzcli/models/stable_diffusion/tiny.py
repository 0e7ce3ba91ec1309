"""Tiny bases that gz itself makes, one of each kind, so that a first minute needs no download.

The VAE is exact by construction, and the text encoders tell words apart without training. The nets have
random weights: tuning teaches them all that they know. A base is saved once, in the user's cache.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn
from transformers import CLIPTextConfig, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from gzcli.models.stable_diffusion.kinds import KINDS, SD3, XL, Flux, Kind
from gzcli.store.files import part_path
from gzcli.store.hub import TINY
from gzcli.store.paths import cache_dir

KIND_OF = dict(zip(TINY, KINDS, strict=True))
EDITION = 1  # of the weights that `made` makes; the next one where any of them changes
# The words in the captions of the embedded sets; each is one token. All else is spelt by letters.
WORDS = (
    "a handwritten zero one two three four five six seven eight nine "
    "invert the colours mirror it turn upside down make bold thin smaller"
)
LENGTH = 32  # tokens of a text
WIDTH = 32  # of a text encoder
START, END = "<|startoftext|>", "<|endoftext|>"
LARGE = 1e3  # constant beside which GroupNorm sees nothing of an image
UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": (2, 4),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
TRANSFORMER: dict[str, Any] = {
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
}
NETS: dict[type[Kind], dict[str, Any]] = {
    Kind: UNET,
    XL: UNET
    | {
        "cross_attention_dim": 2 * WIDTH,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": WIDTH + 6 * 4,
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
    },
    SD3: TRANSFORMER
    | {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "joint_attention_dim": 2 * WIDTH,
        "caption_projection_dim": 64,
        "pooled_projection_dim": 2 * WIDTH,
        "pos_embed_max_size": 96,
    },
    Flux: TRANSFORMER
    | {
        "in_channels": 4 * 4,
        "num_single_layers": 2,
        "joint_attention_dim": WIDTH,
        "pooled_projection_dim": WIDTH,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    },
}


def folder(name: str) -> Path:
    """The folder of the tiny base of this name, made when first asked for."""
    place = cache_dir("bases", f"{name}-{EDITION}")
    if not place.is_dir():
        part = part_path(place)
        made(name).pipe.save_pretrained(part)
        try:
            os.replace(part, place)
        except OSError:  # another process was first
            shutil.rmtree(part)
    return place


def made(name: str) -> Kind:
    """A tiny base, with the same weights on every machine."""
    kind = KIND_OF[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = {kind.net: kind.net_class(**NETS[kind]), "vae": autoencoder(kind.flow)}
        for part, cls in kind.encoders.items():
            parts[part] = text_encoder(cls, 2 * WIDTH if part == "text_encoder_3" else WIDTH)
            make = t5_tokenizer if cls is T5EncoderModel else tokenizer
            parts[part.replace("text_encoder", "tokenizer")] = make()
        for name, module in parts[kind.net].named_modules():
            if name.endswith("conv2"):  # a residual block begins as its shortcut
                nn.init.zeros_(module.weight)
    if kind.flow:
        parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=3.0)
    else:
        parts["scheduler"] = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            clip_sample=False,
            set_alpha_to_one=False,
            prediction_type="v_prediction",
        )
    return kind(kind.cls(**parts, **kind.absent))


@torch.no_grad()
def autoencoder(shifted: bool) -> Any:
    """A VAE whose latents are the mean colours of blocks of 2×2 pixels, and of these the mean. It draws the
    blocks again; diffusers' InstructPix2Pix requires four channels.

    h = (x, −x, ±LARGE) passes all residual blocks unchanged. As LARGE alone makes the variance of h,
    GroupNorm is a constant factor, and SiLU(x) − SiLU(−x) = x.
    """
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=1,
        latent_channels=4,
        layers_per_block=1,
        sample_size=16,
        scaling_factor=1.5,
        shift_factor=-0.5 if shifted else None,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d):
            weight, bias = (module.get_parameter(name).zero_() for name in ("weight", "bias"))
            eye = torch.eye(8)
            if name.endswith("downsamplers.0.conv"):
                weight[:, :, :2, :2] = eye[:, :, None, None] / 4
            elif name.endswith("upsamplers.0.conv"):
                weight[:, :, 1, 1] = eye
            elif name.endswith("conv_in"):
                weight[:3, :3, 1, 1], weight[3:6, :3, 1, 1] = eye[:3, :3], -eye[:3, :3]
                bias[6], bias[7] = LARGE, -LARGE
            elif name.endswith("conv_out"):
                weight[:3, :3, 1, 1], weight[:3, 3:6, 1, 1] = eye[:3, :3], -eye[:3, :3]
    outputs, logs = vae.encoder.conv_out.weight, vae.encoder.conv_out.bias
    outputs[3] = outputs[:3].mean(0)
    logs[4:] = -30.0  # log-variance of the posterior
    for part in (vae.encoder, vae.decoder):
        part.conv_norm_out.weight.fill_(LARGE / 2)  # the deviation of h
    return vae


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens of a byte-pair encoding and its merges: every word grows from its letters, left to right."""
    letters = [chr(c) for c in range(33, 127)]
    tokens = dict.fromkeys([*letters, *(f"{c}</w>" for c in letters)])
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS.split():
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges[parts[0], parts[1]] = None
            parts = [parts[0] + parts[1], *parts[2:]]
            tokens[parts[0]] = None
    tokens |= dict.fromkeys([START, END])
    return {token: i for i, token in enumerate(tokens)}, list(merges)


def tokenizer() -> Any:
    vocab, merges = vocabulary()
    cls: Any = CLIPTokenizer
    return cls(vocab=vocab, merges=merges, model_max_length=LENGTH, pad_token=END)


def t5_tokenizer() -> Any:
    """Words, and the pieces of a word from which it is made otherwise, the longest first."""
    pieces = [f"▁{word}" for word in WORDS.split()] + ["▁", *(chr(c) for c in range(33, 127))]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -100.0), *((piece, -1.0) for piece in pieces)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=LENGTH)


def text_encoder(cls: Any, width: int) -> nn.Module:
    if cls is T5EncoderModel:
        sizes: dict[str, Any] = {"vocab_size": 256, "d_model": width, "d_ff": 2 * width, "d_kv": 16}
        return cls(T5Config(**sizes, num_layers=2, num_heads=2))
    vocab, _ = vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=vocab[START],
        eos_token_id=vocab[END],
        pad_token_id=vocab[END],
    )
    return cls(config)
