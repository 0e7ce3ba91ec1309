"""What a stage's model makes once of every training image (`Model.prepare`): codes, latents, embeddings, packed in its run.

It arrives in `batch.extra`, so that the frozen models behind it run once and not in every epoch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gzcli.data.batches import scan
from gzcli.store.files import fsync, need_space
from gzcli.types import mix

if TYPE_CHECKING:
    from gzcli.engine.trainer import Trainer
    from gzcli.types import Batch

BATCH = 128


def prepare(trainer: Trainer) -> dict[str, np.ndarray]:
    """The maps [N, …] of `RUN/prepared/<key>.npy`, made now by all ranks if they are not there; {} where the model
    prepares nothing. Where training images are augmented, each is by one draw."""
    folder = trainer.run.path / "prepared"
    if not hasattr(trainer.model, "prepare"):
        return {}
    if not folder.exists():
        _make(trainer, folder)
    return {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}


def with_prepared(model: Any, batch: Batch) -> Batch:
    """A batch of held-out images with what the model prepares of them, made on the fly."""
    if hasattr(model, "prepare"):
        batch.extra |= model.prepare(batch)
    return batch


def _make(t: Trainer, folder: Path) -> None:
    """Each rank fills its rows of shared files, which appear under their name when all are done."""
    part = folder.with_suffix(".part")
    n = t.pack.meta.counts["train"]
    index = range(t.rank * n // t.world, (t.rank + 1) * n // t.world)
    model = t.model.eval()
    if t.rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for key, value in _first(t).items():
            need_space(folder.parent, n * value[0].nbytes)
            np.lib.format.open_memmap(part / f"{key}.npy", "w+", value.dtype, (n, *value.shape[1:])).flush()
    t.accelerator.wait_for_everyone()
    with t.log.bar("prepare") as progress, torch.inference_mode():
        maps = {path.stem: np.load(path, mmap_mode="r+") for path in part.glob("*.npy")}
        for batch in _batches(t, index):
            rows = batch.index.cpu().numpy()
            for key, value in model.prepare(batch).items():
                maps[key][rows] = value.cpu().numpy()
            progress(int(rows[-1]) + 1 - index.start, len(index))
    for value in maps.values():
        value.flush()
    model.train()
    t.accelerator.wait_for_everyone()
    if t.rank == 0:
        for path in part.iterdir():
            fsync(path)
        os.replace(part, folder)
    t.accelerator.wait_for_everyone()


def _first(t: Trainer) -> dict[str, np.ndarray]:
    """What is prepared of the first image: keys, types and shapes."""
    with torch.inference_mode():
        return {key: value.cpu().numpy() for key, value in t.model.prepare(next(_batches(t, range(1)))).items()}


def _batches(t: Trainer, index: range) -> Iterator[Batch]:
    """With noise of their own: neither that of samples nor of held-out images of the same number."""
    return scan(t.pack, "train", batch_size=BATCH, levels=t.info.levels, device=t.device, index=index,
                seed=mix(t.tree["seed"], "prepare"), augment=t.tree["data"]["augment"] or ())  # fmt: skip
