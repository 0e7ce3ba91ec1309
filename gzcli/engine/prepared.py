"""The outputs of frozen models for every image, computed once instead of in every epoch.

With `data.latent`, a model is trained on latents of an autoencoder instead of pixels (Rombach et al. 2022,
arXiv:2112.10752). Each image is encoded once into the cache, and the model's samples are decoded. The
autoencoder is a run whose model has `to_latent` and `from_latent`, or an `AutoencoderKL` of diffusers, by
folder or id. The latent of an `AutoencoderKL` is the mode of its posterior. With `data.latent_draw: sample`,
as in the training of DiT, it is one draw per training or validation image.

`Model.prepare` computes what a stage's model outputs for an image: codes, latents or embeddings. It is part
of `batch.extra`. For training images it is stored in the run; for validation images it stays in memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from gzcli.core import ranks
from gzcli.core.errors import MissingError, UsageError
from gzcli.core.hints import Option, advice, setting
from gzcli.core.sections import Part, part_of
from gzcli.core.types import Batch, DataInfo, ImageNoise, mix, moved_to
from gzcli.core.units import as_size, by_sides
from gzcli.data.packs.batches import TrainImages, scan
from gzcli.data.packs.open import head_of
from gzcli.data.packs.pack import Pack
from gzcli.engine.checkpoint import SpaceRecord
from gzcli.engine.log import Log
from gzcli.engine.step import shapes_only
from gzcli.engine.trained import DiffusersVAE, LatentSpace, build_model, find_autoencoder
from gzcli.models import catalog
from gzcli.models.base import Model
from gzcli.models.nn import full_fp32
from gzcli.store import files, runs
from gzcli.store.files import need_space, new_dir, remove_leftovers, remove_tree
from gzcli.store.hub import hub_home, is_id
from gzcli.store.paths import cache_dir
from gzcli.store.runs import Run

AT_ONCE = 64  # images per batch that a model prepares, or an autoencoder encodes
PREPARATION_SHARE = 0.4  # largest share of a training's time for preparation; steps get at least half
MEASURED_IMAGES = 2000  # training images on whose latents mean and deviation are measured
# The autoencoders of Stable Diffusion: `stabilityai/sd-vae-ft-ema`, `-mse`, and those of its versions.
STABLE_DIFFUSION = 4, 8  # channels of a latent, and the factor by which its sides are smaller
Make = Callable[[str, Batch], Mapping[str, Tensor]]  # (split, batch of B) → {key: rows [B, …]}


def train_images(
    part: Part, pack: Pack, device: torch.device, run: Run, log: Log
) -> tuple[TrainImages, DataInfo, LatentSpace | None]:
    """The training images of a recipe, their description for the model, and the latent space of
    `data.latent`, if any."""
    seen = pack.seen(part.data.levels)
    info = seen.info(levels=part.data.levels, steps=part.train.steps)
    images = TrainImages(seen, info.levels, device, part.seed, part.data.augment)
    if not part.data.latent:
        return images, info, None
    space = new_space(part.data.latent, device, pack, info.levels)
    latents = latents_of(images, space, part.data.latent_draw == "sample", run, log)
    return replace(images, pack=latents, levels=None, augment=()), space.info(info), space


def prepare(
    model: Model, images: TrainImages, positions: np.ndarray, run: Run, log: Log
) -> dict[str, np.ndarray]:
    """The outputs of `Model.prepare` as memory maps {key: [N, …]}, with a row for each image of the set; {}
    for a model without that method. Rows are computed for the training images at these positions. All ranks
    write missing maps into `RUN/prepared/<key>.npy`."""
    folder = run.path / "prepared"
    if not hasattr(model, "prepare"):
        return {}
    if not is_whole(folder, {"train": images.pack.meta.counts["train"]}, log):
        model.eval()
        with full_fp32(images.device):  # so nearly tied codes are chosen as the verbs choose them
            rows = {"train": np.sort(positions)}
            write_maps(folder, images, rows, lambda _, batch: model.prepare(batch), log, "prepare")
        model.train()
    return {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}


def count_in_time(
    model: Model, images: TrainImages, positions: np.ndarray, seconds: float, clock: Callable[[], float]
) -> int:
    """The number of the images at these positions that `prepare` finishes in its share of a training of
    `seconds`, from the time of one batch. It is at least a batch. Every rank must call it."""
    few = positions[:AT_ONCE]
    if not hasattr(model, "prepare"):
        return len(positions)
    model.eval()
    with torch.inference_mode(), full_fp32(images.device):
        times = []
        for index in (few[:1], few):  # the first call is not timed, because it chooses kernels
            since = clock()
            for batch in images.scan(purpose="prepare", batch_size=AT_ONCE, index=index):
                model.prepare(batch)
            times.append(clock() - since)
    model.train()
    n = ranks.agree(int(PREPARATION_SHARE * seconds * ranks.world() * len(few) / max(times[-1], 1e-9)))
    return min(len(positions), max(n, len(few)))


def with_prepared(model: Model, batch: Batch) -> Batch:
    """The batch with the outputs of `Model.prepare` for its images, computed immediately."""
    if hasattr(model, "prepare"):
        batch.extra |= model.prepare(batch)
    return batch


def with_remembered(model: Model, batch: Batch, memory: dict[tuple[int, int], Mapping[str, Tensor]]) -> Batch:
    """The batch of consecutive images with the outputs of `Model.prepare`, computed once and kept in main
    memory by the first image and their number. The noise of the losses does not advance."""
    place = int(batch.index[0]), len(batch)
    if hasattr(model, "prepare") and place not in memory:
        noise = ImageNoise(mix(0, "prepare"), batch.index, batch.x.device)
        memory[place] = {
            key: value.cpu() for key, value in model.prepare(replace(batch, noise=noise)).items()
        }
    batch.extra |= {key: moved_to(value, batch.x.device) for key, value in memory.get(place, {}).items()}
    return batch


class LatentPack(Pack):
    """A pack whose images are latents, float16 [N, c, h, w], with the labels and captions of `pixels`."""

    def __init__(self, pixels: Pack, folder: Path):
        super().__init__(folder, replace(pixels.meta, streamed=None))  # latents are arrays
        self.pixels = pixels

    def labels(self, split: str = "train") -> np.ndarray | None:
        return self.pixels.labels(split)

    def captions(self, split: str) -> list[str] | None:
        return self.pixels.captions(split)


def latents_of(images: TrainImages, space: LatentSpace, draw: bool, run: Run, log: Log) -> LatentPack:
    """The latents of the training and validation images. If they are not cached, all ranks encode them,
    training images after one draw of the augmentations."""
    if draw and not isinstance(space.autoencoder, DiffusersVAE):
        raise UsageError(
            "`data.latent_draw: sample` needs an `AutoencoderKL`: the latents of this run have no "
            "distribution",
            hint=advice("use {}", setting("data.latent_draw", "mode")),
        )
    meta = images.pack.meta
    seed = mix(images.seed, "prepare") if images.augment or draw else 0
    made_of = (asdict(space.record), meta.digest, images.augment, seed, *(["drawn"] if draw else []))
    digest = hashlib.sha256(repr(made_of).encode()).hexdigest()[:12]
    folder = cache_dir("latents", f"{meta.name}-{digest}")
    counts = {split: meta.counts[split] for split in ("train", "val")}
    if not is_whole(folder, counts, log, [split for split, n in counts.items() if n]):

        def make(split: str, batch: Batch) -> Mapping[str, Tensor]:
            return {split: space.encode(batch.x, batch.noise if draw else None).half()}

        rows = {split: np.arange(n) for split, n in counts.items()}
        write_maps(folder, images, rows, make, log, "encode")
    return LatentPack(images.pack, folder)


# ---------------------------------------------------------------------------- latents


def new_space(name: str, device: torch.device | str, pack: Pack, levels: int | None) -> LatentSpace:
    """The latent space of an autoencoder, scaled for the images of a data set."""
    autoencoder, trained_on, digest = find_autoencoder(name, device)
    images = pack.info(levels)
    if trained_on and (trained_on.shape, trained_on.levels) != (images.shape, images.levels):
        channels, *sides = trained_on.shape
        raise UsageError(
            f"`data.latent`: `{name}` was trained on images of {by_sides(trained_on.shape)} with "
            f"{trained_on.levels} levels, but these are {by_sides(images.shape)} with {images.levels} levels",
            hint=advice(
                "use {}",
                Option(
                    "set",
                    {
                        "data.size": as_size(*sides),
                        "data.channels": channels,
                        "data.levels": trained_on.levels,
                    },
                ),
            ),
        )
    if trained_on:
        scaling = _measure(autoencoder, pack, images.levels, device)
    else:
        config = autoencoder.vae.config
        if images.shape[0] != (channels := config.in_channels):
            message = (
                f"`data.latent`: `{name}` takes {channels} channels, but the images have {images.shape[0]}"
            )
            raise UsageError(message, hint=advice("use {}", setting("data.channels", channels)))
        shift = torch.full((config.latent_channels,), config.shift_factor or 0.0)
        scaling = shift, torch.full((config.latent_channels,), config.scaling_factor)
    of_channels = [values.float().tolist() for values in scaling]
    return LatentSpace(autoencoder, SpaceRecord(digest, list(images.shape), images.levels, *of_channels))


def _measure(
    autoencoder: Any, pack: Pack, levels: int | None, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """The mean and the inverse standard deviation of each channel, over latents of training images."""
    index = np.random.default_rng(0).permutation(pack.meta.counts["train"])[:MEASURED_IMAGES]
    batches = scan(pack, "train", batch_size=AT_ONCE, levels=levels, device=device, index=index)
    with torch.inference_mode():
        parts = [autoencoder.to_latent(batch.x).cpu().double() for batch in batches]
    z = torch.cat(parts).transpose(0, 1).flatten(1)  # [c, N · h · w]
    return z.mean(1), 1 / z.std(1).clamp(min=1e-3)


def on_latents(part: Part, info: DataInfo) -> DataInfo:
    """The description of the input of a part's model: images, or latents if it is trained on them. Raises
    MissingError if the shape of the latents is unknown until the autoencoder is available."""
    if not (name := part.data.latent):
        return info
    if run := runs.by_name(name):
        for stage in run.stages or [run]:
            tokenizer = part_of(stage.tree())
            card = catalog.card_of(stage, tokenizer.model)
            if "latent" in card.can and not card.stages:
                with shapes_only():
                    model: Any = build_model(tokenizer, info, {}, card).eval()
                    shape = tuple(model.to_latent(torch.zeros(1, *info.shape)).shape[1:])
                return replace(info, shape=shape, levels=None)
        raise MissingError(f"`data.latent`: the latent shape of `{run.id}` is unknown until the run is used")
    cached = hub_home() / "hub" / f"models--{name.replace('/', '--')}"
    folders = [Path(name).expanduser(), *cached.glob("snapshots/*")]
    configs = (folder / sub / "config.json" for folder in folders for sub in ("vae", ""))
    config = next(filter(Path.exists, configs), None)
    if config is None and not (is_id(name) and "vae" in name):
        message = f"`data.latent`: the latent shape of `{name}` is unknown until the model is downloaded"
        raise MissingError(message)
    channels, factor = _shape_in(config) if config else STABLE_DIFFUSION
    return replace(info, shape=(channels, *(side // factor for side in info.shape[1:])), levels=None)


def _shape_in(config: Path) -> tuple[int, int]:
    """The channels of a latent, and the factor by which its sides are smaller, from the configuration of an
    autoencoder of diffusers. Raises DamagedError."""
    hint = "give a folder in diffusers' format"
    tree = files.read_record(config, {"block_out_channels": list}, hint)
    with files.reading(config, hint):
        return int(tree.get("latent_channels", 4)), 2 ** (len(tree["block_out_channels"]) - 1)


# ---------------------------------------------------------------------------- arrays of a row per image


def is_whole(folder: Path, counts: Mapping[str, int], log: Log, names: Sequence[str] = ()) -> bool:
    """Whether the folder of maps is complete. A damaged one is removed and reported. Every rank must call it.

    counts: number of rows by split. A map that is not named like a split has those of "train".
    names: of maps that must be there.
    """
    exists = os.path.lexists(folder)
    if ranks.rank() == 0 and exists:
        heads = {file.stem: head_of(file) for file in folder.glob("*.npy")}
        rows = ((head and head[1][:1], counts.get(name, counts["train"])) for name, head in heads.items())
        if not (folder.is_dir() and heads.keys() >= {*names} and all(have == (n,) for have, n in rows)):
            log.warn(f"`{folder}` is damaged; gz recreates it")
            remove_tree(folder)
            exists = False
    return ranks.agree(exists)


def write_maps(
    folder: Path, images: TrainImages, positions: Mapping[str, np.ndarray], make: Make, log: Log, title: str
) -> None:
    """Writes the outputs of `make`, for the images at some positions of each split, into `folder/<key>.npy`
    [N, …]. Every rank must call it. Each fills its share of the rows, and the folder appears when all have
    finished."""
    main = ranks.rank() == 0
    maps: dict[str, np.memmap] = {}
    if main:
        remove_leftovers(folder.parent)
    with torch.inference_mode(), new_dir(folder, keep=True) if main else nullcontext(folder) as part:
        part = ranks.agree(part)
        for split, index in positions.items():
            n = images.pack.meta.counts[split]
            read = partial(images.scan, purpose="prepare", batch_size=AT_ONCE, split=split)
            if main and len(index):
                for key, value in make(split, next(read(index[:1]))).items():
                    row = value.cpu().numpy()  # [1, …]
                    need_space(part.parent, len(index) * row.nbytes)
                    open_memmap(part / f"{key}.npy", "w+", row.dtype, (n, *row.shape[1:])).flush()
            ranks.wait()
            share = np.array_split(index, ranks.world())[ranks.rank()]
            if not len(share) or not any(part.glob("*.npy")):  # there is no output for the first image
                continue
            done = 0
            with log.bar(title) as progress:
                for batch in read(share):
                    rows = batch.index.cpu().numpy()
                    for key, value in make(split, batch).items():
                        if key not in maps:
                            maps[key] = open_memmap(part / f"{key}.npy", "r+")
                        maps[key][rows] = value.cpu().numpy()
                    progress(done := done + len(rows), len(share))
        for array in maps.values():
            array.flush()
        ranks.wait()
    ranks.wait()
