"""An estimate of the memory of fine-tuning, from the base's configs, before anything is loaded. This module
imports no torch.

A frozen weight takes the bytes of its dtype; a trained weight takes 4 bytes, 4 for its gradient, 4 for its
average and 8 for Adam's moments (2 in 8 bits). The activations of a batch of b images take

    b · bytes · (Σ_resnets a · C · h · w + Σ_transformer layers a' · C · h · w)

with a (RESNET) and a' (LAYER) measured on diffusers' U-Nets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from gzcli.errors import MissingError
from gzcli.models.stable_diffusion.known import Config, configs, counts
from gzcli.models.stable_diffusion.options import PIXELS, LoRAOptions, TuningOptions, taken
from gzcli.parts import Part
from gzcli.sizes import sides

# Tensors of C · h · w that a resnet and a transformer layer keep for the gradient, where their weights are
# trained (True) and where they are frozen. Fitted by least squares over U-Nets of several shapes, whose saved
# tensors the hooks of torch.autograd.graph counted; within 7 %.
RESNET, LAYER = {True: 8.5, False: 6.0}, {True: 32.0, False: 28.0}
CHECKPOINTED = 5.5  # tensors that a resnet keeps with checkpointing, which recomputes all others
AUTOCAST = 0.6  # share of the activations that autocast to 16 bits leaves; norms stay in 32
VAE = 4 * 4 * 128  # bytes that the VAE takes for each pixel while it encodes
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def memory_plan(part: Part) -> list[tuple[str, int]]:
    """(what, bytes) of one process that trains a part of a recipe, the sum last.

    Activations are estimated to about a third. The device's own context and the additional memory of sampling
    are not included. Raises MissingError for a base that is neither a folder nor known by its id.
    """
    tuning = taken(TuningOptions, part.options)
    sizes, known = counts(tuning.base), configs(tuning.base)
    if not sizes or not known:
        hint = f"`hf download {tuning.base}`, then `--set model.base=FOLDER`"
        raise MissingError(
            f"`model.base`: what `{tuning.base}` takes of memory is not known before it is here", hint=hint
        )
    controlnet, vae = sizes.pop("controlnet"), sizes.pop("vae")
    if part.model == "sd_lora":
        trained = adapter_size(taken(LoRAOptions, part.options), known)
    else:
        trained = controlnet if part.model == "controlnet" else sizes.pop("unet")
    frozen = sum(sizes.values())
    copied = trained + (frozen if tuning.dtype == "fp32" else 0)
    moments = {"adamw8bit": 2, "sgd": 4, "rmsprop": 4}.get(part.optim.name, 8)
    rows = [
        ("frozen weights", 4 * vae + BYTES[tuning.dtype] * frozen),
        ("trained weights", 4 * trained),
        ("gradients", 4 * trained),
        ("optimizer", moments * trained),
        *([("average", 4 * trained)] if part.train.ema else []),
        *([("autocast's copies", 2 * copied)] if _halved(part) else []),
        ("activations", max(activations(part, known), encoding(part))),
    ]
    return [*rows, ("total", sum(size for _, size in rows))]


def adapter_size(lora: LoRAOptions, known: Config) -> int:
    """The parameters of an adapter: rank · (inputs + outputs) of each layer whose name ends in one of the
    targets."""
    unet, total = known["unet"], 0
    text = unet.get("cross_attention_dim", 1280)
    for width, _, layers in _transformers(unet):
        block = {"proj_in": 2 * width, "proj_out": 2 * width}
        layer = {f"attn{i}.to_{x}": 2 * width for i in (1, 2) for x in ("q", "out.0")}
        layer |= {f"attn1.to_{x}": 2 * width for x in "kv"} | {f"attn2.to_{x}": text + width for x in "kv"}
        layer |= {"ff.net.0.proj": 9 * width, "ff.net.2": 5 * width}
        for names, times in ((block, 1), (layer, layers)):
            adapted = (size for name, size in names.items() if name.endswith(tuple(lora.targets)))
            total += times * sum(adapted)
    if lora.text_lora:
        encoders = [known[part] for part in ("text_encoder", "text_encoder_2") if part in known]
        total += sum(4 * 2 * c["hidden_size"] * c["num_hidden_layers"] for c in encoders)
    return lora.rank * total


def _levels(unet: Mapping[str, Any]) -> Iterator[tuple[int, int, int, int]]:
    """(width, halvings, blocks, transformer layers a block) of each level of the U-Net's encoder; the decoder
    has one block more."""
    widths = unet["block_out_channels"]
    last = len(widths) - 1
    kinds = unet.get("down_block_types") or ["CrossAttnDownBlock2D"] * last + ["DownBlock2D"]
    layers = unet.get("transformer_layers_per_block") or 1
    layers = [layers] * len(widths) if isinstance(layers, int) else layers
    for i, width in enumerate(widths):
        yield width, i, unet.get("layers_per_block", 2), layers[i] if "CrossAttn" in kinds[i] else 0


def _transformers(unet: Mapping[str, Any]) -> Iterator[tuple[int, int, int]]:
    """(width, halvings, layers) of each transformer of the U-Net."""
    for width, halvings, blocks, layers in _levels(unet):
        yield from [(width, halvings, layers)] * (2 * blocks + 1 if layers else 0)
    layers = unet.get("transformer_layers_per_block") or 1
    yield (
        unet["block_out_channels"][-1],
        len(unet["block_out_channels"]) - 1,
        layers if isinstance(layers, int) else layers[-1],
    )


def _halved(part: Part) -> bool:
    """Whether autocast to 16 bits is on; `auto` counts as 16 bits on GPUs and as fp32 on a CPU."""
    precision = part.train.precision
    return precision in ("bf16", "fp16") or (precision == "auto" and bool(part.launch.gpus))


def _pixels(part: Part) -> int:
    """Pixels of an image."""
    return prod(sides(part.data.size or 512))


def activations(part: Part, known: Config) -> int:
    """Bytes of the activations that a step keeps for its gradient."""
    train, checkpointing = part.train, taken(TuningOptions, part.options).checkpointing
    batch = train.batch_size // max(1, part.launch.processes or 1) // train.accumulate
    latent = _pixels(part) / 4 ** (len(known["vae"]["block_out_channels"]) - 1)
    # a ControlNet is a trained encoder, and the decoder of the frozen U-Net has gradients
    encoder, decoder = part.model != "sd_lora", part.model == "instructpix2pix"
    kept = largest = 0.0
    for width, halvings, blocks, layers in _levels(known["unet"]):
        unit = width * latent / 4**halvings
        for count, trains in ((blocks, encoder), (blocks + 1, decoder)):
            block = unit * (RESNET[trains] + layers * LAYER[trains])
            kept += count * (unit * CHECKPOINTED if checkpointing else block)
            largest = max(largest, block)
    size = batch * 4 * (AUTOCAST if _halved(part) else 1) * (kept + (largest if checkpointing else 0))
    return round(size)


def encoding(part: Part) -> int:
    """Bytes that the VAE takes while it encodes, when there are no activations."""
    image = _pixels(part)
    return VAE * max(image, min(part.train.batch_size * image, PIXELS))
