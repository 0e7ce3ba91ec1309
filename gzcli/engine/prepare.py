"""What a stage's model makes once of every training image (`Model.prepare`): codes, latents, embeddings,
packed in its run.

It arrives in `batch.extra`, so that the frozen models behind it run once and not in every epoch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gzcli.data.batches import scan
from gzcli.models.nn import full_fp32
from gzcli.store.files import fsync, need_space
from gzcli.types import mix

if TYPE_CHECKING:
    from gzcli.engine.trainer import Trainer
    from gzcli.types import Batch

BATCH = 128


def prepare(trainer: Trainer) -> dict[str, np.ndarray]:
    """The maps [N, …] of `RUN/prepared/<key>.npy`, made now by all ranks if they are not there; {} where the
    model prepares nothing. Where training images are augmented, each is by one draw."""
    folder = trainer.run.path / "prepared"
    if not hasattr(trainer.model, "prepare"):
        return {}
    if not folder.exists():
        model, n = trainer.model.eval(), trainer.pack.meta.counts["train"]
        made = lambda _, batch: model.prepare(batch)  # noqa: E731
        with full_fp32(trainer.device):  # codes that are nearly tied are those that the verbs will find
            write_maps(trainer, folder, {"train": n}, lambda _, index: _rows(trainer, index), made, "prepare")
        model.train()
    return {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}


def with_prepared(model: Any, batch: Batch) -> Batch:
    """A batch of held-out images with what the model prepares of them, made on the fly."""
    if hasattr(model, "prepare"):
        batch.extra |= model.prepare(batch)
    return batch


def _rows(t: Trainer, index: range) -> Iterator[Batch]:
    """With noise of their own: neither that of samples nor of held-out images of the same number."""
    return scan(
        t.data,
        "train",
        batch_size=BATCH,
        levels=t.info.levels,
        device=t.device,
        index=index,
        seed=mix(t.tree["seed"], "prepare"),
        augment=t.augment,
    )


def write_maps(
    t: Trainer,
    folder: Path,
    counts: Mapping[str, int],
    rows: Callable[[str, range], Iterator[Batch]],
    make: Callable[[str, Batch], Mapping[str, Tensor]],
    title: str,
) -> None:
    """Maps `folder/<key>.npy` [N, …] of what `make` makes of each image of the splits that `counts` names:
    each rank fills its rows of shared files, which appear under their name when all are done. `rows(split,
    index)` are its batches."""
    part = folder.with_name(f"{folder.name}.{t.run.id.replace('/', '-')}.part")
    if t.rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    with torch.inference_mode():
        for split, n in counts.items():
            if t.rank == 0 and n:
                for key, value in make(split, next(rows(split, range(1)))).items():
                    array = value.cpu().numpy()
                    need_space(folder.parent, n * array.nbytes)
                    np.lib.format.open_memmap(
                        part / f"{key}.npy", "w+", array.dtype, (n, *array.shape[1:])
                    ).flush()
            t.accelerator.wait_for_everyone()
            _fill(
                t, part, range(t.rank * n // t.world, (t.rank + 1) * n // t.world), split, rows, make, title
            )
    t.accelerator.wait_for_everyone()
    if t.rank == 0:
        for path in part.iterdir():
            fsync(path)
        try:
            os.replace(part, folder)
        except OSError:
            if not folder.exists():
                raise
            shutil.rmtree(part)  # another run was faster with the same
    t.accelerator.wait_for_everyone()


def _fill(t: Trainer, part: Path, index: range, split: str, rows, make, title: str) -> None:
    maps: dict[str, np.ndarray] = {}
    if not any(part.glob("*.npy")):  # nothing was made of the first image
        return
    with t.log.bar(title) as progress:
        for batch in rows(split, index) if len(index) else ():
            where = batch.index.cpu().numpy()
            for key, value in make(split, batch).items():
                if key not in maps:
                    maps[key] = np.load(part / f"{key}.npy", mmap_mode="r+")
                maps[key][where] = value.cpu().numpy()
            progress(int(where[-1]) + 1 - index.start, len(index))
    for value in maps.values():
        value.flush()
