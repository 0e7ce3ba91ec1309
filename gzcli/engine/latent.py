"""`data.latent`: the model is trained on latents of an autoencoder in place of pixels (Rombach et al. 2022,
arXiv:2112.10752).

Each image is encoded once (`prepared.py`), and what the model samples is decoded. The model itself is the
same as on pixels. The autoencoder is a run whose model has `to_latent` and `from_latent`, or an
`AutoencoderKL` of diffusers, by folder or id. vqvae and vqgan give the vectors before the codebook, which
quantises them when they are decoded.

A latent of an `AutoencoderKL` is the mode of its posterior. With `data.latent_draw: sample`, as DiT trains,
each training and validation image has one draw of the posterior instead. Other images, as those that are
scored, always have the mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from gzcli.core.errors import MissingError, UsageError, canonical
from gzcli.core.parts import Part, part_of
from gzcli.core.sizes import as_size
from gzcli.core.types import DataInfo, Noise
from gzcli.core.units import by_sides
from gzcli.data.packs.batches import scan
from gzcli.data.packs.pack import Pack
from gzcli.engine.build import build_model, load_model
from gzcli.engine.checkpoint import SpaceRecord
from gzcli.engine.shapes import shapes_only
from gzcli.models import catalog
from gzcli.store import files, runs
from gzcli.store.files import checksum
from gzcli.store.paths import recipe_names
from gzcli.store.run import Run
from gzcli.store.weights import hub_home, is_id, repository

MEASURED = 2000  # training images by whose latents mean and deviation are measured
MEASURE_BATCH = 64  # images that are encoded together for it
# The autoencoders of Stable Diffusion: `stabilityai/sd-vae-ft-ema`, `-mse`, and those of its versions.
STABLE_DIFFUSION = {"latent_channels": 4, "block_out_channels": [128, 256, 512, 512]}


class Autoencoder(Protocol):
    """Turns images [B, C, H, W] into latents [B, c, h, w] and back."""

    def to_latent(self, x: Tensor) -> Tensor: ...

    def from_latent(self, z: Tensor) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


class LatentSpace:
    """The latents (to_latent(x) − shift) · scale of images x, of about unit deviation in each channel.

    autoencoder: encodes and decodes.
    images: shape and levels of the images.
    digest: sha256 of the autoencoder's weights.
    shift: a number for each of the c channels, [c].
    scale: a number for each of the c channels, [c].
    """

    def __init__(
        self, autoencoder: Autoencoder, images: DataInfo, digest: str, shift: list[float], scale: list[float]
    ):
        self.autoencoder, self.images, self.digest = autoencoder, images, digest
        self.shift, self.scale = (torch.tensor(v)[:, None, None] for v in (shift, scale))  # [c, 1, 1]

    @torch.no_grad()
    def encode(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """Latents [B, c, h, w] of images x [B, C, H, W].

        noise: draws the latents from the posterior of an `AutoencoderKL`; None: the latents are its mode.

        Raises TypeError for noise with any other autoencoder.
        """
        if noise is None:
            z = self.autoencoder.to_latent(x)
        elif isinstance(self.autoencoder, DiffusersVAE):
            z = self.autoencoder.drawn(x, noise)
        else:
            raise TypeError(f"{type(self.autoencoder).__name__} has no posterior to draw from")
        return (z - self.shift.to(z)) * self.scale.to(z)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] of latents z [B, c, h, w]."""
        return self.autoencoder.from_latent(z / self.scale.to(z) + self.shift.to(z)).clamp(-1, 1)

    def info(self, data: DataInfo) -> DataInfo:
        """The description of such data for a model on latents: their shape in place of the images'."""
        device = next(self.autoencoder.parameters()).device
        shape = tuple(self.encode(torch.zeros(1, *self.images.shape, device=device)).shape[1:])
        return replace(data, shape=shape, levels=None)

    def record(self) -> SpaceRecord:
        """The description of the space that is saved with the weights of a run."""
        shift, scale = self.shift.flatten().tolist(), self.scale.flatten().tolist()
        return SpaceRecord(self.digest, list(self.images.shape), self.images.levels, shift, scale)


class DiffusersVAE(nn.Module):
    """An `AutoencoderKL` of diffusers, by the mode of its posterior or by draws of it."""

    def __init__(self, vae: Any):
        super().__init__()
        self.vae: Any = vae

    @classmethod
    def load(cls, name: str, device: torch.device | str) -> tuple[DiffusersVAE, str]:
        """The autoencoder of a folder or a repository of the hub, and the sha256 of its weights.

        name: folder or id; the autoencoder lies at its top or in its folder `vae`.

        Raises MissingError where there is none.
        """
        from diffusers import AutoencoderKL

        folder = repository(
            name,
            key="data.latent",
            files=["*.json", "vae/*.json", "*model.safetensors", "vae/*model.safetensors"],
        )
        folder = folder / "vae" if (folder / "vae").is_dir() else folder
        try:
            vae = AutoencoderKL.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        except (OSError, ValueError) as e:
            raise MissingError(
                f"`data.latent`: `{folder}` holds no `AutoencoderKL` in safetensors: {e}"
            ) from e
        (weights,) = folder.glob("*model.safetensors")
        return cls(vae.to(device).eval().requires_grad_(False)), checksum(weights)

    @property
    def channels(self) -> int:
        """The number of channels of its images."""
        return self.vae.config.in_channels

    def scaling(self) -> tuple[list[float], list[float]]:
        """Shift and scale of each channel, as its configuration gives them."""
        config, c = self.vae.config, self.vae.config.latent_channels
        return [config.shift_factor or 0.0] * c, [config.scaling_factor] * c

    def to_latent(self, x: Tensor) -> Tensor:
        return self.vae.encode(x.to(self.vae.dtype)).latent_dist.mode().float()

    def drawn(self, x: Tensor, noise: Noise) -> Tensor:
        """One draw of the posterior of each image, [B, c, h, w]."""
        posterior = self.vae.encode(x.to(self.vae.dtype)).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        return mean + std * noise.randn(*mean.shape)

    def from_latent(self, z: Tensor) -> Tensor:
        return self.vae.decode(z.to(self.vae.dtype)).sample.float()


def new_space(name: str, device: torch.device | str, pack: Pack, levels: int | None) -> LatentSpace:
    """The latent space of an autoencoder for the images of a data set.

    name: a run, a model or an `AutoencoderKL`.
    pack: the data set.
    levels: grey levels of the images; None: those of the set.

    Raises MissingError where it is not at hand; UsageError for a run whose model has no latents, or images of
    another size or other grey levels than it was trained on.
    """
    autoencoder, trained_on, digest = _find(name, device)
    images = pack.info(levels)
    if trained_on and (trained_on.shape, trained_on.levels) != (images.shape, images.levels):
        channels, *had = trained_on.shape
        raise UsageError(
            f"`data.latent`: `{name}` was trained on images of {by_sides(trained_on.shape)} with "
            f"{trained_on.levels} levels, these are of {by_sides(images.shape)} with {images.levels}",
            hint=f"`--set data.size={as_size(*had)} --set data.channels={channels} "
            f"--set data.levels={trained_on.levels}`",
        )
    if isinstance(autoencoder, DiffusersVAE):
        if images.shape[0] != autoencoder.channels:
            raise UsageError(
                f"`data.latent`: `{name}` takes {autoencoder.channels} channels, the images have "
                f"{images.shape[0]}",
                hint=f"`--set data.channels={autoencoder.channels}`",
            )
        return LatentSpace(autoencoder, images, digest, *autoencoder.scaling())
    return LatentSpace(autoencoder, images, digest, *_measure(autoencoder, pack, images.levels, device))


def open_space(name: str, device: torch.device | str, record: SpaceRecord) -> LatentSpace:
    """The latent space of a trained run.

    name: the autoencoder's run, model, folder or id.
    record: the description that the run was saved with.

    Raises MissingError where the autoencoder is not at hand, or has other weights than were recorded.
    """
    autoencoder, _, digest = _find(name, device)
    if digest != record.digest:
        raise MissingError(f"`data.latent`: `{name}` is not the autoencoder that this run was trained with")
    images = DataInfo(tuple(record.shape), record.levels)
    return LatentSpace(autoencoder, images, digest, record.shift, record.scale)


def _find(name: str, device: torch.device | str) -> tuple[Autoencoder, DataInfo | None, str]:
    """The autoencoder, what it was trained on (None: any images), and the sha256 of its weights."""
    if run := autoencoder_run(name):
        model, saved = load_model(run, device)
        if not hasattr(model, "to_latent"):
            raise TypeError(f"{type(model).__name__} has no `to_latent`")
        return model, saved.info, checksum(run.path / "model.safetensors")
    vae, digest = DiffusersVAE.load(name, device)
    return vae, None, digest


def autoencoder_run(name: str) -> Run | None:
    """The run, or the stage of a run, that a name of `data.latent` means; None for an `AutoencoderKL`.

    Raises UsageError for a run whose model has no latents.
    """
    is_model = canonical(name) in map(canonical, recipe_names())
    run = runs.by_name(name) or (runs.find(name) if is_model else None)
    if run is None:
        return None
    for stage in run.stages or [run]:
        if "latent" in catalog.card_of(stage, part_of(stage.tree()).model).can:
            return stage
    raise UsageError(
        f"`data.latent`: `{run.id}` has no latents of images", hint="gz list models --can latent"
    )


def _measure(
    autoencoder: Autoencoder, pack: Pack, levels: int | None, device: torch.device | str
) -> tuple[list[float], list[float]]:
    """The mean and the inverse deviation of each channel over latents of training images."""
    n = min(MEASURED, pack.meta.counts["train"])
    index = np.random.default_rng(0).permutation(pack.meta.counts["train"])[:n]
    batches = scan(pack, "train", batch_size=MEASURE_BATCH, levels=levels, device=device, index=index)
    with torch.inference_mode():
        parts = [autoencoder.to_latent(batch.x).cpu().double() for batch in batches]
    z = torch.cat(parts).transpose(0, 1).flatten(1)  # [c, N · h · w]
    return z.mean(1).tolist(), (1 / z.std(1).clamp(min=1e-3)).tolist()


# ---------------------------------------------------------------------------- before the autoencoder is there


def on_latents(part: Part, info: DataInfo) -> DataInfo:
    """The description of what the part's model sees: that of its latents, where it is trained on latents.

    Raises MissingError where their shape is not known.
    """
    name = part.data.latent
    if not name:
        return info
    if run := runs.by_name(name):
        return replace(info, shape=_shape_by_run(run, info), levels=None)
    config = _config(name)
    times = 2 ** (len(config["block_out_channels"]) - 1)
    height, width = info.shape[1:]
    shape = (config.get("latent_channels", 4), height // times, width // times)
    return replace(info, shape=shape, levels=None)


def _shape_by_run(run: runs.Run, info: DataInfo) -> tuple[int, ...]:
    for stage in run.stages or [run]:
        part = part_of(stage.tree())
        card = catalog.card_of(stage, part.model)
        if "latent" in card.can and not card.stages:
            with shapes_only():
                model: Any = build_model(part, info, {}, card).eval()
                return tuple(model.to_latent(torch.zeros(1, *info.shape)).shape[1:])
    raise MissingError(f"`data.latent`: what `{run.id}` makes of an image is not known before it is used")


def _config(name: str) -> dict[str, Any]:
    """The configuration of an `AutoencoderKL`, from its folder or the hub's cache."""
    cached = hub_home() / "hub" / f"models--{name.replace('/', '--')}"
    folders = [Path(name).expanduser(), *cached.glob("snapshots/*")]
    for path in (folder / sub / "config.json" for folder in folders for sub in ("vae", "")):
        if config := files.read_json(path):
            return config
    if is_id(name) and "vae" in name:
        return STABLE_DIFFUSION
    raise MissingError(f"`data.latent`: the shape of the latents of `{name}` is not known before it is here")
