"""`gz sample --do`: an application of a trained model to pictures, and the sheet of inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gzcli.core.errors import UsageError
from gzcli.core.jobs import SampleJob
from gzcli.core.sections import renamed
from gzcli.core.sizes import Size
from gzcli.core.types import Applied, ImageNoise, Progress
from gzcli.data.packs import same
from gzcli.data.packs.batches import quantise, to_uint8
from gzcli.data.packs.forms import Say, silent
from gzcli.data.packs.open import open_pack
from gzcli.data.readers.folder import read_pictures
from gzcli.engine import sampler, sheets
from gzcli.engine.sheets import Row, sheet
from gzcli.engine.trained import Trained
from gzcli.models.options import defaults, grouped

COLUMNS = 10  # approximate number of single images side by side
HIDDEN = 127  # grey level of pixels that a model did not see


@dataclass
class Output:
    """The outputs of an application, as they are written."""

    images: np.ndarray  # the outputs in order, uint8 [n, C, H, W]
    labels: np.ndarray | None  # labels of the outputs, [n] or [n, K]; None without labels
    sheet: np.ndarray  # picture of the outputs beside their inputs, uint8 [H, W, C]
    applied: Applied  # what the model returned


def apply(trained: Trained, do: str, job: SampleJob, progress: Progress, say: Say = silent) -> Output:
    """Applies a model to the job's input or, without one, to the first test images of the run's data set.

    Raises UsageError where it returns images of another shape.
    """
    method = getattr(trained.model, do)
    inputs, own = read_inputs(trained, job.input, job.n, say=say)
    n, device = len(inputs), trained.device
    # inputs of a binary model are binarised by one draw, as in training
    x = quantise(torch.from_numpy(inputs), trained.images.levels, ImageNoise(job.seed, range(n))).to(device)
    seen = x if trained.space is None else trained.space.encode(x)
    known = defaults(method)
    options = {renamed(name, known, "do"): value for name, value in job.options.items()}
    if job.mask:
        options["mask"] = read_mask(Path(job.mask), trained).expand(n, -1, -1, -1)
    if job.prompts:
        options["prompt"] = sampler.cycled(job.prompts, range(n), device)
    if job.labels:
        options["labels"] = sampler.parse_labels(job.labels, n, trained.info).to(device)
    if own is not None and "y" in known:
        options["y"] = torch.from_numpy(own).to(device)
    noise = ImageNoise(job.seed, range(n), device)
    with trained.applying():
        applied: Applied = method(seen, noise=noise, progress=progress, **grouped(method, options))
        images = to_bytes(trained.shown(applied.images))
    if images.shape[1:] != inputs.shape[1:]:
        raise UsageError(f"`--do {do}` returned images of another shape")
    labels = None if applied.labels is None else applied.labels.cpu().numpy()
    if labels is None and own is not None and applied.columns is None:  # an output has its input's class
        labels = own[[i for i, *_ in inputs_of(applied)]]
    caption = sheets.caption_of(trained, do, job.seed, job.options)
    picture = drawn(applied, images, to_bytes(x), given(trained, applied, x), trained.info.classes, caption)
    return Output(images, labels, picture, applied)


def inputs_of(applied: Applied) -> Sequence[tuple[int, ...]]:
    """The indices of the inputs of each output, or of each row of outputs."""
    return applied.of or [(i,) for i in range(len(applied.images))]


def given(trained: Trained, found: Applied, x: Tensor) -> np.ndarray | None:
    """The pictures that the model was given in place of its inputs x, uint8 [n, C, H, W] at the size of x.

    None where it was given the inputs themselves.
    """
    if found.given is not None:
        enlarged = F.interpolate(found.given, size=trained.info.shape[1:], mode="nearest")
        return to_bytes(trained.shown(enlarged))
    if found.known is not None:
        known = F.interpolate(found.known.float(), size=x.shape[2:], mode="nearest").cpu().numpy() > 0.5
        return np.where(known, to_bytes(x[[i for i, *_ in inputs_of(found)]]), np.uint8(HIDDEN))
    return None


def drawn(
    found: Applied,
    images: np.ndarray,
    x: np.ndarray,
    given: np.ndarray | None,
    classes: Sequence[str],
    caption: str,
) -> np.ndarray:
    """The sheet [H, W, C] of outputs and inputs.

    Outputs of single inputs lie in blocks of rows, below the inputs and what was `given`; a column of one
    class is headed by its name. Outputs in rows lie between the first and the last input of the row.
    """
    of = inputs_of(found)
    if found.columns is not None:
        rows = []
        headings = ["source", *found.marks, *["source"] * (len(of[0]) - 1)]
        for i, (name, ends) in enumerate(zip(found.rows, of, strict=True)):
            first, *last = (x[k] for k in ends)
            row = [first, *images[i * found.columns : (i + 1) * found.columns], *last]
            rows.append(Row(name, row, () if i else headings))
        return sheet([rows], caption)
    kinds = [Row("source", x[[i for i, *_ in of]])]
    kinds += [] if given is None else [Row(found.how, given, exact=True)]
    kinds += [Row(found.rows[0], images)]
    labels = None if found.labels is None else found.labels.cpu()
    columns, marks = sheets.by_class(labels, len(images), COLUMNS, classes)
    return sheets.blocks(kinds, columns, [f"→ {mark}" for mark in marks], caption)


def to_bytes(x: Tensor) -> np.ndarray:
    """Images in [-1, 1] as uint8 on the host."""
    return to_uint8(x).cpu().numpy()


def read_inputs(
    trained: Trained, path: str | None, n: int | None, size: Size | None = None, say: Say = silent
) -> tuple[np.ndarray, np.ndarray | None]:
    """At most n images uint8 [≤ n, C, H, W], and their labels where there are any."""
    if path is None:
        data = trained.part.data
        pack = open_pack(data.name, **trained.wanted)
        same.check(trained.run.owner.path, pack.meta)
        labels = pack.labels("test")
        return pack.images("test")[:n], None if labels is None else np.asarray(labels[:n])
    return shown_pictures(trained, Path(path), trained.images.shape[0], n, size, say), None


def shown_pictures(
    trained: Trained, path: Path, channels: int, n: int | None, size: Size | None = None, say: Say = silent
) -> np.ndarray:
    """At most n pictures at a path, uint8 [≤ n, channels, H, W], brought to their size as the run's images
    were."""
    form = trained.wanted
    patch = None if size else form["patch"]
    size = size or form["size"]
    return read_pictures(path, size=size, channels=channels, limit=n, fit=form["fit"], patch=patch, say=say)


def read_mask(path: Path, trained: Trained) -> Tensor:
    """[1, 1, H, W] on the device, as the model sees it: 1 (white) is kept, 0 (black) filled in."""
    u8 = shown_pictures(trained, path, 1, 1)
    return seen_mask((torch.from_numpy(u8) > 127).float(), trained)


def seen_mask(mask: Tensor, trained: Trained) -> Tensor:
    """A mask of images [1, 1, H, W] as the model sees it, on the device: a latent is kept where all its
    pixels are."""
    if trained.space is not None:
        _, height, width = trained.info.shape
        mask = (F.adaptive_avg_pool2d(mask, (height, width)) > 0.999).float()
    return mask.to(trained.device)
