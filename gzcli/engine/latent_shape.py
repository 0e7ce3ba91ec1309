"""The shape of the latents of `data.latent`, before the autoencoder is there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from gzcli.core.errors import MissingError
from gzcli.core.parts import Part, part_of
from gzcli.core.types import DataInfo
from gzcli.engine.build import build_model
from gzcli.engine.cost import batch_of
from gzcli.engine.shapes import shapes_only
from gzcli.models import catalog
from gzcli.store import files, runs
from gzcli.store.hub import hub_home, is_id

# The autoencoders of Stable Diffusion: `stabilityai/sd-vae-ft-ema`, `-mse`, and those of its versions.
KNOWN = {"latent_channels": 4, "block_out_channels": [128, 256, 512, 512]}


def on_latents(part: Part, info: DataInfo) -> DataInfo:
    """The description of what the part's model sees: that of its latents, where it is trained on latents.

    Raises MissingError where their shape is not known.
    """
    name = part.data.latent
    if not name:
        return info
    if run := runs.by_name(name):
        return replace(info, shape=_of_run(run, info), levels=None)
    config = _config(name)
    times = 2 ** (len(config["block_out_channels"]) - 1)
    height, width = info.shape[1:]
    shape = (config.get("latent_channels", 4), height // times, width // times)
    return replace(info, shape=shape, levels=None)


def _of_run(run: runs.Run, info: DataInfo) -> tuple[int, ...]:
    for stage in run.stages or [run]:
        part = part_of(stage.tree())
        card = catalog.card_of(stage, part.model)
        if "latent" in card.can and not card.stages:
            with shapes_only():
                model = build_model(part, info, {}, card).eval()
                return tuple(model.to_latent(batch_of(part, info, 1).x).shape[1:])
    raise MissingError(f"`data.latent`: what `{run.id}` makes of an image is not known before it is used")


def _config(name: str) -> dict[str, Any]:
    """The configuration of an `AutoencoderKL`, from its folder or the hub's cache."""
    cached = hub_home() / "hub" / f"models--{name.replace('/', '--')}"
    folders = [Path(name).expanduser(), *cached.glob("snapshots/*")]
    for path in (folder / sub / "config.json" for folder in folders for sub in ("vae", "")):
        if found := files.read_json(path):
            return found
    if is_id(name) and "vae" in name:
        return KNOWN
    raise MissingError(f"`data.latent`: the shape of the latents of `{name}` is not known before it is here")
