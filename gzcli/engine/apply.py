"""`gz sample --do`: an application of a trained model on pictures, and the sheet of what came of which."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gzcli.data.batches import quantise, to_uint8
from gzcli.engine import sampler
from gzcli.engine.pictures import Row, sheet
from gzcli.engine.trained import Trained
from gzcli.errors import UsageError
from gzcli.types import Applied, ImageNoise, Progress

COLUMNS = 10  # of single images side by side, about so many
HIDDEN = 127  # the grey of what a model did not see


@dataclass
class Done:
    """What is written of an application: `images` uint8 [n, C, H, W], its outputs alone, in order; `labels`
    [n], [n, K] or None; `sheet` [H, W, C], outputs beside what they were made of; and what the application
    told of them."""

    images: np.ndarray
    labels: np.ndarray | None
    sheet: np.ndarray
    applied: Applied


def apply(trained: Trained, job: Mapping[str, Any], progress: Progress) -> Done:
    """An application on the input's images; without `--input` on the first test images of the run's data set.

    Raises UsageError where it returns images of another shape.
    """
    method = getattr(trained.model, job["do"])
    inputs, own = read_inputs(trained, job["input"], job["n"])
    n = len(inputs)
    # a binary model sees one draw of its inputs, as it does in training
    x = quantise(torch.from_numpy(inputs), trained.images.levels, ImageNoise(job["seed"], range(n)))
    x = x.to(trained.device)
    seen = x if trained.space is None else trained.space.encode(x)
    options = dict(job["options"])
    if job["mask"]:
        options["mask"] = read_mask(Path(job["mask"]), trained).expand(n, -1, -1, -1)
    if job.get("prompts"):
        options["prompt"] = sampler.cycled(job["prompts"], range(n), trained.device)
    if job["labels"]:
        options["labels"] = sampler.parse_labels(job["labels"], n, trained.info).to(trained.device)
    if own is not None and "y" in inspect.signature(method).parameters:
        options["y"] = torch.from_numpy(own).to(trained.device)
    noise = ImageNoise(job["seed"], range(n), trained.device)
    found = method(seen, noise=noise, progress=progress, **options)
    images = to_bytes(trained.shown(found.images))
    if images.shape[1:] != inputs.shape[1:]:
        raise UsageError(f"`--do {job['do']}` returned images of another shape")
    labels = None if found.labels is None else found.labels.cpu().numpy()
    if labels is None and own is not None and found.columns is None:  # an output is of its image's class
        labels = own[[i for i, *_ in sources(found)]]
    picture = drawn(found, images, to_bytes(x), given(trained, found, x), trained.info.classes)
    return Done(images, labels, picture, found)


def sources(found: Applied) -> Sequence[tuple[int, ...]]:
    """The numbers of the images that each output, or row of outputs, is of."""
    return found.of or [(i,) for i in range(len(found.images))]


def given(trained: Trained, found: Applied, x: Tensor) -> np.ndarray | None:
    """What the model was shown in place of each image, as large, uint8 [n, C, H, W]; None where it saw
    them."""
    if found.given is not None:
        enlarged = F.interpolate(found.given, size=trained.info.shape[1:], mode="nearest")
        return to_bytes(trained.shown(enlarged))
    if found.known is not None:
        known = F.interpolate(found.known.float(), size=x.shape[2:], mode="nearest").cpu().numpy() > 0.5
        return np.where(known, to_bytes(x[[i for i, *_ in sources(found)]]), np.uint8(HIDDEN))
    return None


def drawn(
    found: Applied,
    images: np.ndarray,
    x: np.ndarray,
    given: np.ndarray | None,
    classes: Sequence[str],
) -> np.ndarray:
    """The sheet [H, W, C]: outputs of single images in blocks of rows, below their images and what was
    `given`; rows of ways between the images that they are of. Columns of one class, where labels take turns,
    have its name."""
    of = sources(found)
    if found.columns is not None:
        rows = []
        for i, (name, ends) in enumerate(zip(found.rows, of, strict=True)):
            first, *last = (x[k] for k in ends)
            rows.append(Row(name, [first, *images[i * found.columns : (i + 1) * found.columns], *last]))
        return sheet([rows], ["source", *found.marks, *["source"] * (len(of[0]) - 1)])
    kinds = [("source", x[[i for i, *_ in of]])]
    kinds += [] if given is None else [(found.how, given)]
    kinds += [(found.rows[0], images)]
    columns, marks = by_class(found.labels, len(images), COLUMNS, classes)
    return blocks(kinds, columns, [f"→ {mark}" for mark in marks])


def blocks(kinds: Sequence[tuple[str, np.ndarray]], columns: int, marks: Sequence[str] = ()) -> np.ndarray:
    """The sheet [H, W, C] of several kinds of pictures [n, C, H, W], each with its name, of the same images:
    below each other, so many side by side."""
    starts = range(0, len(kinds[0][1]), columns)
    rows = [[Row(name, pictures[i : i + columns]) for name, pictures in kinds] for i in starts]
    return sheet(rows if len(kinds) > 1 else [[row for (row,) in rows]], marks)


def by_class(labels: Tensor | None, n: int, about: int, classes: Sequence[str]) -> tuple[int, Sequence[str]]:
    """The number of columns for n images, about so many, so that each holds one class, and the columns'
    names; none where no few labels take turns."""
    turn = n if labels is None else next(k for k in range(1, n + 1) if (labels[k:] == labels[: n - k]).all())
    columns = min(n, turn * max(1, round(about / turn)))
    once = 2 * turn > n and n > about  # no turns at all, unless every image is of another class
    if labels is None or columns > 3 * about or (once and len(labels[:turn].unique(dim=0)) < turn):
        return min(about, n), ()
    return columns, [named(label, classes) for label in labels[:columns]]


def named(label: Tensor, classes: Sequence[str]) -> str:
    """A label's name; of several at once all."""
    if label.ndim == 0:
        return classes[int(label)]
    return " + ".join(name for name, there in zip(classes, label.tolist(), strict=True) if there) or "none"


def to_bytes(x: Tensor) -> np.ndarray:
    return to_uint8(x).cpu().numpy()


def read_inputs(
    trained: Trained,
    path: str | None,
    n: int | None,
    side: int | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """uint8 [≤ n, C, H, W]: pictures of a file or folder at the run's size or another `side`; or the run's
    own test images, and their labels if they have any."""
    from gzcli.data import same
    from gzcli.data.folder import read_pictures
    from gzcli.data.open import open_named

    channels, height, _ = trained.images.shape
    if path is None:
        data = trained.part.data
        pack = open_named(data.name, size=data.size, channels=data.channels)
        same.hold(trained.run.owner.path, pack.meta)
        labels = pack.labels("test")
        return pack.images("test")[:n], None if labels is None else np.asarray(labels[:n])
    return read_pictures(Path(path), size=side or height, channels=channels, limit=n), None


def read_mask(path: Path, trained: Trained) -> Tensor:
    """[1, 1, H, W] of 0/1 on the device: white is kept, black filled in. Latents are kept where all their
    pixels are."""
    from gzcli.data.folder import read_pictures

    u8 = read_pictures(path, size=trained.images.shape[1], channels=1, limit=1)
    mask = (torch.from_numpy(u8) > 127).float()
    if trained.space is not None:
        mask = (F.adaptive_avg_pool2d(mask, trained.info.shape[1:]) > 0.999).float()
    return mask.to(trained.device)
