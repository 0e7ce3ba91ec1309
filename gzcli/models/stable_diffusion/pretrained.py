"""The bases: VAE, text encoders with their tokenizers, net and noise schedule. They come from a folder or the
hub, or gz makes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
import yaml
from torch import nn
from transformers import BatchEncoding

from gzcli.core.errors import GzError, MissingError, UsageError, first_line
from gzcli.core.hints import advice, setting
from gzcli.models.nn import is_shape_only
from gzcli.models.stable_diffusion import tiny
from gzcli.models.stable_diffusion.kinds import Config, Kind, kind_of
from gzcli.store.cache_files import remove
from gzcli.store.files import check_folder, read_object
from gzcli.store.hub import TINY_BASES, repository


def configs(base: str) -> Config | None:
    """The configs of a base's parts, with its `model_index`, from its folder or by the id of a published
    base; None if it is neither."""
    folder = Path(base).expanduser()
    index = folder / "model_index.json"
    if not index.is_file():
        published = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())
        return published.get(published["names"].get(base))
    files = {path.parent.name: path for path in folder.glob("*/config.json")}
    files |= {"model_index": index, "scheduler": folder / "scheduler" / "scheduler_config.json"}
    return {part: read_object(path) for part, path in files.items() if path.is_file()}


# The files of a repository that are used: no half-precision variants, and no safety checker, which is larger
# than the rest of SD 1.5.
SHARDS = ("", "-0????-of-?????")
PART_FILES = (
    *("model_index.json", "*/*config.json", "tokenizer*/*", "*/*.safetensors.index.json"),
    *(
        f"{net}/diffusion_pytorch_model{end}.safetensors"
        for net in ("unet", "transformer", "vae")
        for end in SHARDS
    ),
    *(f"text_encoder{which}/model{end}.safetensors" for which in ("", "_2", "_3") for end in SHARDS),
)


def load_base(name: str) -> Kind:
    """The pipeline of a base on the CPU, according to its kind. It has no values if new tensors have none."""
    if is_shape_only():
        base = tiny.tiny_base(name) if name in TINY_BASES else _build_empty(name)
    else:
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        if name in TINY_BASES:
            base = _load_tiny(name)
        else:
            base = _load_folder(repository(name, key="model.base", files=PART_FILES), name)
    takes = getattr(base.pipe, base.net).config.in_channels // base.packing
    if takes != (channels := base.pipe.vae.config.latent_channels):
        raise UsageError(
            f"`model.base`: `{name}` takes {takes} channels, not the {channels} of a latent",
            hint="choose a text-to-image model, not one for inpainting or editing",
        )
    return base


class BlankTokenizer:
    """A tokenizer without a vocabulary: every text becomes token 0 at the largest length."""

    def __init__(self, encoder: type, config: Mapping[str, Any]):
        self.model_max_length = config.get("max_position_embeddings", 77)
        self.added_tokens_encoder: dict[str, int] = {}

    def tokenize(self, text: str) -> list[str]:
        return []

    def __call__(self, texts: str | list[str], **options: Any) -> BatchEncoding:
        shape = (1 if isinstance(texts, str) else len(texts), self.model_max_length)
        ids = torch.zeros(shape, dtype=torch.int64)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _load_tiny(name: str) -> Kind:
    """A tiny base, from the cache. A damaged one is made again."""
    folder = tiny.folder(name)
    try:
        return _load_folder(folder, name)
    except GzError:
        remove(folder)
        return _load_folder(tiny.folder(name), name)


def _load_folder(folder: Path, name: str) -> Kind:
    """The base in a folder, only from safetensors, because other formats may run code on loading."""
    check_folder(folder)
    config = configs(str(folder))
    if config is None:
        message = f"`model.base`: `{folder}` contains no `model_index.json`"
        raise MissingError(message, hint="give a folder in diffusers' format")
    kind = kind_of(config, name)
    absent: dict[str, Any] = {"image_encoder": None, "feature_extractor": None} | kind.absent
    for part, entry in config["model_index"].items():
        if not (part.startswith("_") or (part in absent and is_skipped(entry)) or is_known(entry)):
            message = f"`model.base`: `{part}` of `{folder}` is {json.dumps(entry)[:80]}"
            raise UsageError(
                message, hint="use only networks, tokenizers and schedules of diffusers or transformers"
            )
    try:
        pipe = kind.cls.from_pretrained(folder, use_safetensors=True, local_files_only=True, **absent)
    except Exception as e:  # of diffusers, transformers, safetensors and torch, which share no error class
        first = first_line(e)
        is_folder = Path(name).expanduser().is_dir()
        hint = "save it with `pipeline.save_pretrained`" if is_folder else f"run `hf download {name}`"
        message = f"`model.base`: `{folder}` is incomplete: {first}"
        raise MissingError(message, hint=f"{hint}; its weights must be safetensors") from e
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, torch.get_default_dtype())  # some files are in half precision
    return kind(pipe)


# What the parts of a base are. diffusers .32 imports whatever else an entry names, from the base's folder.
PART_TYPES: tuple[type, ...] = (diffusers.ModelMixin, diffusers.SchedulerMixin, transformers.PreTrainedModel)
PART_TYPES += (transformers.PreTrainedTokenizerBase,)
LIBRARIES = {"diffusers": diffusers, "transformers": transformers}


def is_known(entry: Any) -> bool:
    """Whether an entry of `model_index.json`, such as ["diffusers", "DDIMScheduler"], is harmless: it names
    no part, or a class of diffusers or transformers themselves."""
    if entry == [None, None] or isinstance(entry, int | float | None):
        return True
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)):
        return False
    cls = getattr(LIBRARIES.get(entry[0]), entry[1], None)
    return isinstance(cls, type) and issubclass(cls, PART_TYPES)


def is_skipped(entry: Any) -> bool:
    """Whether an entry is a part that is not loaded, judged by its library."""
    return isinstance(entry, list) and entry[:1] in ([name] for name in (*LIBRARIES, "stable_diffusion"))


def _build_empty(name: str) -> Kind:
    """The base built from its configs, without weights and vocabularies."""
    config = configs(name)
    if config is None:
        hint = advice(f"run `hf download {name}`, then add {{}}", setting("model.base", "FOLDER"))
        raise MissingError(f"`model.base`: the size of `{name}` is unknown until it is downloaded", hint=hint)
    return kind_of(config, name).built(config, BlankTokenizer)
