"""`data.latent`: the model lives on the latents of a trained autoencoder (Rombach et al. 2022,
arXiv:2112.10752).

They are made once of every image, packed, and handed to the model in place of pixels; what it samples is
decoded. No model knows of it. The autoencoder is a run whose model has `to_latent` and `from_latent` (vae,
cvae, and vqvae and vqgan, whose vectors are taken before the codebook and go through it when decoded), or an
`AutoencoderKL` of diffusers, by folder or id. Of its posterior a latent is the mode, or with
`data.latent_draw: sample`, as DiT trains, for training and validation images a draw, one for each image;
images that come later, as those of a score, are always taken by the mode.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from gzcli.data.batches import scan
from gzcli.data.pack import Pack
from gzcli.engine.prepare import write_maps
from gzcli.engine.trained import load_trained
from gzcli.errors import MissingError, UsageError, canonical
from gzcli.models import catalog
from gzcli.store import runs
from gzcli.store.files import checksum
from gzcli.store.paths import cache_dir, recipe_names
from gzcli.store.weights import repository
from gzcli.types import Batch, DataInfo, Noise, mix

if TYPE_CHECKING:
    from gzcli.engine.trainer import Trainer

MEASURED = 2000  # training images whose latents tell mean and deviation
BATCH = 64
SPLITS = ("train", "val")


class LatentSpace:
    """The latents (to_latent(x) − shift) · scale, of about unit deviation in each channel, of images like
    `images`.

    digest: of the autoencoder's weights. shift, scale: a number for each channel.
    """

    def __init__(
        self, autoencoder: nn.Module, images: DataInfo, digest: str, shift: list[float], scale: list[float]
    ):
        self.autoencoder, self.images, self.digest = autoencoder, images, digest
        self.shift, self.scale = (torch.tensor(v)[:, None, None] for v in (shift, scale))

    @torch.no_grad()
    def encode(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """Latents [B, c, h, w] of images [B, C, H, W]; with `noise`, draws of their posterior by an
        `AutoencoderKL`."""
        z = self.autoencoder.to_latent(x) if noise is None else self.autoencoder.drawn(x, noise)
        return (z - self.shift.to(z)) * self.scale.to(z)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Images in [-1, 1] of latents."""
        return self.autoencoder.from_latent(z / self.scale.to(z) + self.shift.to(z)).clamp(-1, 1)

    def info(self, data: DataInfo) -> DataInfo:
        """What a model on the latents of such images may know."""
        device = next(self.autoencoder.parameters()).device
        shape = tuple(self.encode(torch.zeros(1, *self.images.shape, device=device)).shape[1:])
        return replace(data, shape=shape, levels=None)

    def record(self) -> dict[str, Any]:
        """What a run keeps of it."""
        numbers = {"shift": self.shift.flatten().tolist(), "scale": self.scale.flatten().tolist()}
        return {
            "digest": self.digest,
            "shape": list(self.images.shape),
            "levels": self.images.levels,
            **numbers,
        }


class LatentPack(Pack):
    """A pack whose images are latents, float16 [N, c, h, w]; it has no test images, which are encoded as they
    come."""

    def __init__(self, pack: Pack, folder: Path):
        super().__init__(folder, pack.meta)
        self.pixels = pack

    def labels(self, split: str) -> np.ndarray | None:
        return self.pixels.labels(split)

    def captions(self, split: str) -> list[str] | None:
        return self.pixels.captions(split)


class KL(nn.Module):
    """An `AutoencoderKL` of diffusers, by the mode of its posterior or draws of it."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae, self.channels = vae, vae.config.in_channels

    @classmethod
    def load(cls, name: str, device: torch.device | str) -> tuple[KL, str]:
        """That of a folder or repository, by itself or in its `vae`, and the digest of its weights."""
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

    def scaling(self) -> tuple[list[float], list[float]]:
        """Shift and scale of each channel, as its configuration gives them."""
        config, c = self.vae.config, self.vae.config.latent_channels
        return [config.shift_factor or 0.0] * c, [config.scaling_factor] * c

    def to_latent(self, x: Tensor) -> Tensor:
        return self.vae.encode(x.to(self.vae.dtype)).latent_dist.mode().float()

    def drawn(self, x: Tensor, noise: Noise) -> Tensor:
        """A draw of the posterior of each image."""
        law = self.vae.encode(x.to(self.vae.dtype)).latent_dist
        return law.mean.float() + law.std.float() * noise.randn(*law.mean.shape).to(law.mean.device)

    def from_latent(self, z: Tensor) -> Tensor:
        return self.vae.decode(z.to(self.vae.dtype)).sample.float()


def open_space(
    name: str,
    device: torch.device | str,
    *,
    pack: Pack | None = None,
    levels: int | None = None,
    record: Mapping[str, Any] | None = None,
) -> LatentSpace:
    """The latent space of a run or an `AutoencoderKL` for the images of `pack`, or as the `record` of a
    trained run says.

    Raises MissingError where it is not at hand, or another one than was recorded; UsageError for a run whose
    model has no latents, or images of another size or other grey levels than it was trained on.
    """
    autoencoder, trained_on, digest = _find(name, device)
    if record is not None:
        if digest != record["digest"]:
            raise MissingError(
                f"`data.latent`: `{name}` is not the autoencoder that this run was trained with"
            )
        images = DataInfo(tuple(record["shape"]), record["levels"])
        return LatentSpace(autoencoder, images, digest, record["shift"], record["scale"])
    images = pack.info(levels)
    if trained_on and (trained_on.shape, trained_on.levels) != (images.shape, images.levels):
        (_, size, _), (channels, *_) = trained_on.shape, trained_on.shape
        raise UsageError(
            f"`data.latent`: `{name}` was trained on images of {_by(trained_on.shape)} with "
            f"{trained_on.levels} levels, these are "
            f"of {_by(images.shape)} with {images.levels}",
            hint=f"`--set data.size={size} --set data.channels={channels} --set "
            f"data.levels={trained_on.levels}`",
        )
    if isinstance(autoencoder, KL):
        if images.shape[0] != autoencoder.channels:
            raise UsageError(
                f"`data.latent`: `{name}` takes {autoencoder.channels} channels, the images have "
                f"{images.shape[0]}",
                hint=f"`--set data.channels={autoencoder.channels}`",
            )
        return LatentSpace(autoencoder, images, digest, *autoencoder.scaling())
    return LatentSpace(autoencoder, images, digest, *_measure(autoencoder, pack, images.levels, device))


def packed(trainer: Trainer, pack: Pack) -> LatentPack:
    """The latents of the training and validation images, made now by all ranks where they are not in the
    cache. Where training images are augmented, each is by one draw."""
    space, seed = trainer.space, mix(trainer.tree["seed"], "prepare")
    augment, drawn = (
        tuple(trainer.tree["data"]["augment"] or ()),
        trainer.tree["data"].get("latent_draw") == "sample",
    )
    if drawn and not isinstance(space.autoencoder, KL):
        raise UsageError(
            "`data.latent_draw: sample` is for an `AutoencoderKL`: latents of this run are no distribution",
            hint="`--set data.latent_draw=mode`",
        )
    made_of = repr(
        (
            space.record(),
            pack.meta.digest,
            augment,
            seed if augment or drawn else 0,
            *(["drawn"] if drawn else []),
        )
    )
    folder = cache_dir("latents", f"{pack.meta.name}-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}")
    if not folder.exists():

        def rows(split: str, index: range) -> Iterator[Batch]:
            return scan(
                pack,
                split,
                batch_size=BATCH,
                levels=space.images.levels,
                device=trainer.device,
                index=index,
                seed=seed,
                augment=augment if split == "train" else (),
            )

        counts = {split: pack.meta.counts[split] for split in SPLITS}

        def encoded(split: str, batch: Batch) -> dict[str, Tensor]:
            return {split: space.encode(batch.x, batch.noise if drawn else None).half()}

        write_maps(trainer, folder, counts, rows, encoded, "encode")
    return LatentPack(pack, folder)


def _find(name: str, device: torch.device | str) -> tuple[nn.Module, DataInfo | None, str]:
    """The autoencoder, what it was trained on (None: any images), and a digest of its weights."""
    if run := runs.by_name(name) or (
        runs.find(name) if canonical(name) in map(canonical, recipe_names()) else None
    ):
        for part in run.stages or [run]:
            if "latent" in catalog.card(part.tree()["model"]["name"]).can:
                trained = load_trained(part, device)
                return trained.model, trained.info, checksum(part.path / "model.safetensors")
        raise UsageError(
            f"`data.latent`: `{run.id}` has no latents of images", hint="gz list models --can latent"
        )
    kl, digest = KL.load(name, device)
    return kl, None, digest


def _measure(
    autoencoder: nn.Module, pack: Pack, levels: int, device: torch.device | str
) -> tuple[list[float], list[float]]:
    """The mean and the inverse deviation of each channel over latents of training images."""
    n = min(MEASURED, pack.meta.counts["train"])
    index = np.random.default_rng(0).permutation(pack.meta.counts["train"])[:n]
    with torch.inference_mode():
        parts = [
            autoencoder.to_latent(b.x).cpu().double()
            for b in scan(pack, "train", batch_size=BATCH, levels=levels, device=device, index=index)
        ]
    z = torch.cat(parts).transpose(0, 1).flatten(1)  # [c, N · h · w]
    return z.mean(1).tolist(), (1 / z.std(1).clamp(min=1e-3)).tolist()


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
