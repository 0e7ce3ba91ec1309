"""Tiny bases made by gz, one of each kind, so that the first steps need no download.

By construction, the VAE is exact, a U-Net's output is linear in its last features, and the text encoders
distinguish words without training. Everything else is random, so the nets learn all they know by tuning. A
base is saved once in the user's cache.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import CLIPTokenizer, T5EncoderModel, T5Tokenizer

from gzcli.models.stable_diffusion.kinds import Kind, kind_of
from gzcli.store.cache_files import remove
from gzcli.store.files import part_path, readable
from gzcli.store.paths import cache_dir

EDITION = 1  # version of the weights from `tiny_base`; to be increased if any of them changes
# The words in the captions of the embedded sets; each is one token. All else is spelt by letters.
CAPTION_WORDS = (
    "a handwritten zero one two three four five six seven eight nine "
    "invert the colours mirror it turn upside down make bold thin smaller"
)
LENGTH = 32  # most tokens of a text
START, END = "<|startoftext|>", "<|endoftext|>"
ERASING_CONSTANT = 1e3  # constant so large that GroupNorm removes an image added to it


def folder(name: str) -> Path:
    """The folder of the tiny base with this name, made on its first use."""
    place = cache_dir("bases", f"{name}-{EDITION}")
    if not place.is_dir():
        remove(place)
        part = part_path(place)
        tiny_base(name).pipe.save_pretrained(part)
        readable(part)
        try:
            os.replace(part, place)
        except OSError:  # another process made it first
            shutil.rmtree(part)
    return place


def tiny_base(name: str) -> Kind:
    """A tiny base, with the same weights on every machine."""
    config = yaml.safe_load(Path(__file__).with_name("tiny.yaml").read_text())[name]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        base = kind_of(config, name).built(config, tokenizer)
        for layer, module in getattr(base.pipe, base.net).named_modules():
            if layer.endswith("conv2"):  # a residual block begins as its shortcut
                nn.init.zeros_(module.weight)
        make_exact(base.pipe.vae)
        if base.net == "unet":
            make_linear(base.pipe.unet)
    return base


def make_linear(unet: Any) -> None:
    """Makes the output linear in the features of the first level, to which a ControlNet adds. It uses the
    method of `make_exact`: each of the first four groups of GroupNorm is (x, −x, ±ERASING_CONSTANT)."""
    last = unet.up_blocks[-1].resnets[-1].conv_shortcut
    unet.conv_norm_out.weight[:16] = ERASING_CONSTANT / 2**0.5  # the deviation of a group
    for channel in range(4):
        x, minus, *constants = range(4 * channel, 4 * channel + 4)
        last.weight[minus] = -last.weight[x]
        last.weight[constants] = 0.0
        last.bias[[x, minus]] = 0.0
        last.bias[constants] = torch.tensor([ERASING_CONSTANT, -ERASING_CONSTANT])
        unet.conv_norm_out.weight[constants] = 0.0  # large inputs of `conv_out` would make large gradients
    unet.conv_out.weight[:, :16] = 0.0
    for channel in range(4):
        unet.conv_out.weight[channel, 4 * channel, 1, 1] = 1.0
        unet.conv_out.weight[channel, 4 * channel + 1, 1, 1] = -1.0


def make_exact(vae: Any) -> None:
    """Makes the VAE exact: latents are the mean colours of 2×2 blocks and the mean of these colours, and are
    decoded to such blocks. The fourth channel is there because diffusers' InstructPix2Pix requires four.

    h = (x, −x, ±ERASING_CONSTANT) passes all residual blocks unchanged. The variance of h comes almost only
    from ERASING_CONSTANT, so GroupNorm is a constant factor, and SiLU(x) − SiLU(−x) = x."""
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
                bias[6], bias[7] = ERASING_CONSTANT, -ERASING_CONSTANT
            elif name.endswith("conv_out"):
                weight[:3, :3, 1, 1], weight[:3, 3:6, 1, 1] = eye[:3, :3], -eye[:3, :3]
    outputs, logs = vae.encoder.conv_out.weight, vae.encoder.conv_out.bias
    outputs[3] = outputs[:3].mean(0)
    logs[4:] = -30.0  # log-variance of the posterior
    for part in (vae.encoder, vae.decoder):
        part.conv_norm_out.weight.fill_(ERASING_CONSTANT / 2)  # the deviation of h


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The tokens of a byte-pair encoding and its merges. Every word is merged from its letters, left to
    right."""
    letters = [chr(c) for c in range(33, 127)]
    tokens = dict.fromkeys([*letters, *(f"{c}</w>" for c in letters)])
    merges: dict[tuple[str, str], None] = {}
    for word in CAPTION_WORDS.split():
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges[parts[0], parts[1]] = None
            parts = [parts[0] + parts[1], *parts[2:]]
            tokens[parts[0]] = None
    tokens |= dict.fromkeys([START, END])
    return {token: i for i, token in enumerate(tokens)}, list(merges)


def tokenizer(encoder: type, config: Any) -> Any:
    """The tokenizer of CLIP (words) or of T5 (letters)."""
    if encoder is not T5EncoderModel:
        vocab, merges = vocabulary()
        cls: Any = CLIPTokenizer
        return cls(vocab=vocab, merges=merges, model_max_length=LENGTH, pad_token=END)
    pieces = [*(f"▁{word}" for word in CAPTION_WORDS.split()), "▁", *(chr(c) for c in range(33, 127))]
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -100.0), *((piece, -1.0) for piece in pieces)]
    return T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=LENGTH)
