"""What frozen models make of every image, computed once and not in every epoch.

The latents of `data.latent` take the place of the images; they are kept in the cache. What the model of a
stage makes of each training image (`Model.prepare`: codes, latents, embeddings) comes in `batch.extra`; it is
kept in the run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gzcli.core import ranks
from gzcli.core.errors import UsageError
from gzcli.core.parts import Part
from gzcli.core.types import Batch, DataInfo, mix
from gzcli.data.packs.batches import TrainBatches, scan
from gzcli.data.packs.pack import Pack, is_array
from gzcli.engine.latent import DiffusersVAE, LatentSpace, new_space
from gzcli.engine.log import Log
from gzcli.engine.maps import write_maps
from gzcli.models.base import Model
from gzcli.models.nn import full_fp32
from gzcli.store.files import remove_tree
from gzcli.store.paths import cache_dir
from gzcli.store.runs import Run

PREPARE_BATCH = 128  # images that a model prepares at a time
ENCODE_BATCH = 64  # images that an autoencoder encodes at a time


@dataclass(frozen=True)
class TrainImages:
    """The training images of a run, as its model sees them.

    pack: the images, or their latents.
    levels: number of grey levels; None: latents.
    device: device of the batches.
    seed: seed of the run.
    augment: names of the augmentations.
    """

    pack: Pack
    levels: int | None
    device: torch.device
    seed: int
    augment: tuple[str, ...]

    def shuffled(
        self, batch_size: int, n: int | None, prepared: Mapping[str, np.ndarray], needs: Sequence[str]
    ) -> TrainBatches:
        """This rank's batches of every step, for ever; the arguments are those of `TrainBatches`."""
        return TrainBatches(
            self.pack,
            seed=self.seed,
            batch_size=batch_size,
            levels=self.levels,
            device=self.device,
            augment=self.augment,
            rank=ranks.rank(),
            world=ranks.world(),
            n=n,
            prepared=prepared,
            needs=needs,
        )

    def scan(
        self, index: Sequence[int] | np.ndarray, *, purpose: str, batch_size: int, split: str = "train"
    ) -> Iterator[Batch]:
        """Images in batches, each once. Training images are augmented, by one draw.

        index: positions in the split.
        purpose: a word that, with the run's seed, decides the noise: so it is neither that of samples nor
          that of other scans.
        batch_size: number of images of a batch.
        split: "train" or "val".
        """
        return scan(
            self.pack,
            split,
            batch_size=batch_size,
            levels=self.levels,
            device=self.device,
            index=index,
            seed=mix(self.seed, purpose),
            augment=self.augment if split == "train" else (),
        )


def train_images(
    part: Part, pack: Pack, device: torch.device, run: Run, log: Log
) -> tuple[TrainImages, DataInfo, LatentSpace | None]:
    """The training images of a recipe, their description for the model, and their latent space.

    Without `data.latent` the space is None.

    pack: the images.
    """
    info = pack.info(levels=part.data.levels, steps=part.train.steps)
    images = TrainImages(pack, info.levels, device, part.seed, part.data.augment)
    if not part.data.latent:
        return images, info, None
    space = new_space(part.data.latent, device, pack, info.levels)
    latents = latents_of(images, space, part.data.latent_draw == "sample", run, log)
    return replace(images, pack=latents, levels=None, augment=()), space.info(info), space


def prepare(model: Model, images: TrainImages, run: Run, log: Log) -> dict[str, np.ndarray]:
    """What a model prepares of training images: memory-maps {key: [N, …]}; {} where it prepares nothing.

    They lie in `RUN/prepared/<key>.npy`. All ranks make them now where they are not there.
    """
    folder = run.path / "prepared"
    if not hasattr(model, "prepare"):
        return {}
    if not _is_there(folder, log):

        def rows(split: str, index: range) -> Iterator[Batch]:
            return images.scan(index, purpose="prepare", batch_size=PREPARE_BATCH)

        model.eval()
        with full_fp32(images.device):  # so nearly tied codes are chosen as the verbs choose them
            write_maps(
                folder,
                {"train": images.pack.meta.counts["train"]},
                rows,
                lambda split, batch: model.prepare(batch),
                log=log,
                title="prepare",
            )
        model.train()
    return {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}


def _is_there(folder: Path, log: Log) -> bool:
    """Whether there is a folder of maps; a damaged one is removed with a line. A call of every rank."""
    there = folder.exists()
    if ranks.rank() == 0 and there and not all(is_array(file) for file in folder.glob("*.npy")):
        log.warn(f"`{folder}` is damaged; it is made again")
        remove_tree(folder)
        there = False
    return ranks.agree(there)


def with_prepared(model: Model, batch: Batch) -> Batch:
    """The batch with what the model prepares of its images, which is made now."""
    if hasattr(model, "prepare"):
        batch.extra |= model.prepare(batch)
    return batch


class LatentPack(Pack):
    """A pack whose images are latents, float16 [N, c, h, w]; labels and captions are those of `pixels`.

    It has no test images: these are encoded as they are read.
    """

    def __init__(self, pixels: Pack, folder: Path):
        super().__init__(folder, pixels.meta)
        self.pixels = pixels

    def labels(self, split: str) -> np.ndarray | None:
        return self.pixels.labels(split)

    def captions(self, split: str) -> list[str] | None:
        return self.pixels.captions(split)


def latents_of(images: TrainImages, space: LatentSpace, draw: bool, run: Run, log: Log) -> LatentPack:
    """The latents of the training and validation images, made now by all ranks where they are not cached.

    A training image is augmented by one draw before it is encoded.

    draw: whether each latent is a draw of the posterior, in place of its mode.

    Raises UsageError for draws from an autoencoder that has no posterior.
    """
    if draw and not isinstance(space.autoencoder, DiffusersVAE):
        raise UsageError(
            "`data.latent_draw: sample` is for an `AutoencoderKL`: latents of this run are no distribution",
            hint="`--set data.latent_draw=mode`",
        )
    meta = images.pack.meta
    random = images.augment or draw
    seed = mix(images.seed, "prepare") if random else 0
    made_of = (asdict(space.record()), meta.digest, images.augment, seed, *(["drawn"] if draw else []))
    digest = hashlib.sha256(repr(made_of).encode()).hexdigest()[:12]
    folder = cache_dir("latents", f"{meta.name}-{digest}")
    if not _is_there(folder, log):

        def rows(split: str, index: range) -> Iterator[Batch]:
            return images.scan(index, purpose="prepare", batch_size=ENCODE_BATCH, split=split)

        def encoded(split: str, batch: Batch) -> dict[str, Tensor]:
            return {split: space.encode(batch.x, batch.noise if draw else None).half()}

        counts = {split: meta.counts[split] for split in ("train", "val")}
        write_maps(folder, counts, rows, encoded, log=log, title="encode")
    return LatentPack(images.pack, folder)
