"""`gz sample`: images from a trained model, or an application to images (`--do inpaint --input PATH`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gzcli.core import ranks
from gzcli.core.devices import title
from gzcli.core.errors import UsageError
from gzcli.core.sections import renamed
from gzcli.core.types import Applied, ImageNoise, Progress, Say, silent
from gzcli.core.units import Size
from gzcli.data.packs.batches import quantise, to_uint8
from gzcli.data.packs.open import open_pack
from gzcli.data.packs.pack import check_unchanged
from gzcli.data.readers.folder import read_pictures
from gzcli.engine import sampler, sheets
from gzcli.engine.log import Log
from gzcli.engine.sheets import Row, sheet
from gzcli.engine.trained import Trained, load_trained, weights_file
from gzcli.models.base import flat_defaults, group_options
from gzcli.models.nn import spread_labels
from gzcli.store.files import checksum
from gzcli.store.jobs import SampleJob
from gzcli.store.png import FORMATS, save_png
from gzcli.store.runs import Run

PNG_LIMIT = 256  # number of images up to which single PNGs are written by default
SHEET_COLUMNS = 10  # approximate number of single images side by side
HIDDEN_GREY = 127  # grey level of pixels that a model did not see


@dataclass
class Output:
    images: np.ndarray  # uint8 [n, C, H, W]
    # [n] or [n, K]: labels on which samples are conditioned, or those of the outputs
    labels: np.ndarray | None
    sheet: np.ndarray  # sheet of the images and of any inputs, uint8 [H, W, C]
    applied: Applied | None = None
    values: np.ndarray | None = None  # all channels [n, C, H, W], if the images are only previews of them


def run(job: SampleJob, folder: Path, device: torch.device, log: Log) -> dict[str, Any]:
    """Writes `grid.png` and the other files of a job into `folder`. Returns the JSON of `gz sample`."""
    trained = load_trained(Run(Path(job.run)), device, job.checkpoint, job.precision)
    since, frames = time.monotonic(), Frames(trained.decode) if job.animate else None
    read: list[str] = []  # how images were read
    notes: list[str] = []  # notes on faulty images

    def say(text: str) -> None:
        read.append(text)
        log.info(text)

    with log.bar(job.do or "sample") as bar:
        progress = frames.watch(bar) if frames else bar
        if job.do:
            output = apply(trained, job.do, job, progress, say, notes.append)
        else:
            output = samples(trained, job, progress, say, notes.append)
    for note in notes:
        log.warn(note)
    images, labels, applied = output.images, output.labels, output.applied
    place = Run(folder)
    result: dict[str, Any] = {
        "run": trained.run.owner.id,
        "step": trained.step,
        "n": len(images),
        "seed": job.seed,
        "precision": trained.precision,
        "prompts": list(job.prompts),
        "seconds": round(time.monotonic() - since, 3),
        "grid": str(place.sheet_picture),
        **{format.key: [] if format.several else None for format in FORMATS.values()},
        "animation": None,
        "notes": [*read, *notes],
    }
    if applied:
        result |= {"do": job.do, "rows": list(applied.rows), "columns": applied.columns}
        result |= {"figures": dict(applied.figures)} | ({} if labels is None else {"labels": labels.tolist()})
    if ranks.rank():
        return result
    source = origin(trained, job, len(images))
    save_png(place.sheet_picture, output.sheet, source)
    for name in {*job.formats, *(["png"] if len(images) <= PNG_LIMIT else [])}:
        whole = output.values if name == "npz" and output.values is not None else images
        result[FORMATS[name].key] = FORMATS[name].write(place, whole, labels, source)
    if frames:
        result["animation"] = str(place.animation_file)
        frames.save(place.animation_file, images)
    return result


def origin(trained: Trained, job: SampleJob, n: int) -> dict[str, Any]:
    """The origin of a job's n images, which is stored in their PNGs. `gz sample --like` repeats the job from
    it."""
    return {
        "verb": job.verb,
        "run": trained.run.owner.id,
        "model": trained.name,
        "data": trained.run.owner.data,
        "weights": checksum(weights_file(trained.run, job.checkpoint)),
        "step": trained.step,
        "n": n if job.do is None else job.n,
        "seed": job.seed,
        "labels": job.labels,
        "prompts": list(job.prompts),
        "options": dict(job.options),
        "do": job.do,
        "input_as": job.input_as,
        "precision": job.precision,
        "device": title(trained.device),
        "threads": torch.get_num_threads(),
        **job.origin,
    }


class Frames:
    """The intermediate states of the first images during sampling, for `--animate`."""

    FIRST, MOST, MS = 16, 60, 80  # number of images, of frames, and milliseconds per frame

    def __init__(self, decode: Callable[[Tensor], Tensor]):
        self.shown = decode
        self.seen: list[np.ndarray] = []

    def watch(self, bar: Progress) -> Progress:
        def progress(i: float, n: float, x: Tensor | None = None) -> None:
            bar(i, n, x)
            if x is not None:
                self.seen.append(to_bytes(self.shown(x[: self.FIRST])))

        return progress

    def save(self, path: Path, images: np.ndarray) -> None:
        """Writes a GIF of about 60 frames, the last of which is shown longer."""
        from PIL import Image

        chosen = self.seen[:: max(1, len(self.seen) // self.MOST)]
        grids = [sheets.grid(x, 4).squeeze() for x in [*chosen, *[images[: self.FIRST]] * 10]]
        first, *rest = [Image.fromarray(picture) for picture in grids]
        first.save(path, save_all=True, append_images=rest, duration=self.MS, loop=0)


# ---------------------------------------------------------------------------- samples


def samples(
    trained: Trained, job: SampleJob, progress: Progress, say: Say = silent, warn: Say = silent
) -> Output:
    """Samples that cycle through the job's labels, prompts and input images. The sheet shows them below their
    input images, or in one column per class."""
    conditions: dict[str, Any] = {"prompt": job.prompts} if job.prompts else {}
    inputs, noise = None, None
    if job.input_as:
        size = {**trained.part.sample, **job.options}.get("size")
        inputs, _, _ = read_inputs(trained, job.input, job.n, size, say)
        noise = ImageNoise(job.seed, range(len(inputs)))
        conditions[job.input_as] = quantise(torch.from_numpy(inputs), trained.images.levels, noise)
    n, labels = job.n or max(map(len, conditions.values())), None
    if job.labels:
        labels = sampler.parse_labels(job.labels, n, trained.info)
    elif trained.model.conditional:
        labels = spread_labels(None, n, trained.info, torch.device("cpu"))
    images, values = sampler.draw_all(
        trained,
        n,
        seed=job.seed,
        labels=labels,
        conditions=conditions,
        options=job.options,
        progress=progress,
        warn=warn,
    )
    if hasattr(trained.model, "sources"):
        method, device = trained.model.sources, trained.device
        options = {**trained.part.sample, **job.options}
        options |= {key: sampler.cycled(values, range(n), device) for key, values in conditions.items()}
        accepted = {key: value for key, value in options.items() if key in flat_defaults(method)}
        with torch.inference_mode(), trained.sampling():
            sources = method(
                n, noise=ImageNoise(job.seed, range(n), device), **group_options(method, accepted)
            )
        inputs = to_bytes(sources if trained.values is None else trained.decode(sources))
        inputs = inputs.mean(1, keepdims=True).astype(np.uint8) if images.shape[1] == 1 else inputs
    elif inputs is not None:
        inputs = inputs[np.arange(n) % len(inputs)]
    caption = sheets.caption_of(trained, None, job.seed, job.options)
    if inputs is not None and inputs.shape[1:] == images.shape[1:]:
        kinds = [Row(job.input_as or "source", inputs), Row("result", images)]
        picture = sheets.blocks(kinds, min(n, SHEET_COLUMNS), caption=caption)
    else:
        picture = sheets.of_samples(images, labels, trained.info.classes, caption)
    return Output(images, None if labels is None else labels.numpy(), picture, values=values)


# ---------------------------------------------------------------------------- applications


def apply(
    trained: Trained, do: str, job: SampleJob, progress: Progress, say: Say = silent, warn: Say = silent
) -> Output:
    """Applies a model to the job's input or, without one, to the first test images of the run's data set."""
    method = getattr(trained.model, do)
    inputs, input_labels, pixels = read_inputs(trained, job.input, job.n, say=say)
    n, device, parameters = len(inputs), trained.device, flat_defaults(method)
    # inputs of a binary model are binarised by one draw, as in training
    levels = trained.images.levels if trained.values is None else trained.info.levels
    x = quantise(torch.from_numpy(np.array(pixels)), levels, ImageNoise(job.seed, range(n))).to(device)
    options = {renamed(name, parameters, "do"): value for name, value in job.options.items()}
    if job.mask:
        mask = torch.from_numpy(shown_pictures(trained, Path(job.mask), 1, 1)) > 127
        options["mask"] = seen_mask(mask.float(), trained).expand(n, -1, -1, -1)
    if job.prompts:
        options["prompt"] = sampler.cycled(job.prompts, range(n), device)
    named = sampler.parse_labels(job.labels, n, trained.info).to(device) if job.labels else None
    y = None if input_labels is None else torch.from_numpy(input_labels).to(device)
    options |= trained.label_keywords(do, named, y)
    noise = ImageNoise(job.seed, range(n), device)
    encoded = x if trained.space is None else trained.space.encode(x)
    with trained.applying():
        applied: Applied = method(encoded, noise=noise, progress=progress, **group_options(method, options))
        images, finite = sampler.to_images(trained.decode(applied.images))
    values = None
    if trained.values is not None:
        values = trained.values.restored(applied.images.float().cpu().numpy())
    sampler.check_finite(finite, trained, warn)
    applied = replace(applied, of=applied.of or tuple((i,) for i in range(len(images))))
    if images.shape[1:] != inputs.shape[1:]:
        raise UsageError(f"`--do {do}` returned images of a different shape")
    labels = None if applied.labels is None else applied.labels.cpu().numpy()
    if labels is None and input_labels is not None and applied.columns is None:
        labels = input_labels[[i for i, *_ in applied.of]]  # an output has its input's class
    caption = sheets.caption_of(trained, do, job.seed, job.options)
    x = x if trained.values is None else trained.decode(x)
    return Output(images, labels, sheet_of(trained, applied, images, x, caption), applied, values)


def sheet_of(trained: Trained, applied: Applied, images: np.ndarray, x: Tensor, caption: str) -> np.ndarray:
    """The sheet [H, W, C] of outputs and of their inputs x. The output of a single input is below the input
    and its condition. A row of outputs is between its first and its last input."""
    sources, inputs = applied.of, to_bytes(x)
    if applied.columns is not None:
        rows = []
        headings = ["source", *applied.marks, *["source"] * (len(sources[0]) - 1)]
        for i, (name, ends) in enumerate(zip(applied.rows, sources, strict=True)):
            first, *last = (inputs[k] for k in ends)
            row = [first, *images[i * applied.columns : (i + 1) * applied.columns], *last]
            rows.append(Row(name, row, () if i else headings))
        return sheet([rows], caption)
    firsts = inputs[[i for i, *_ in sources]]
    kinds = [Row("source", firsts)]
    if applied.condition is not None:  # small images, edges, …
        condition = F.interpolate(applied.condition, size=trained.info.shape[1:], mode="nearest")
        kinds.append(Row(applied.how, to_bytes(trained.decode(condition)), exact=True))
    elif applied.visible is not None:
        visible = F.interpolate(applied.visible.float(), size=x.shape[2:], mode="nearest").cpu().numpy() > 0.5
        kinds.append(Row(applied.how, np.where(visible, firsts, np.uint8(HIDDEN_GREY)), exact=True))
    labels = None if applied.labels is None else applied.labels.cpu()
    columns, marks = sheets.by_class(labels, len(images), SHEET_COLUMNS, trained.info.classes)
    kinds.append(Row(applied.rows[0], images))
    return sheets.blocks(kinds, columns, [f"→ {mark}" for mark in marks], caption)


def to_bytes(x: Tensor) -> np.ndarray:
    return to_uint8(x).cpu().numpy()


def read_inputs(
    trained: Trained, path: str | None, n: int | None, size: Size | None = None, say: Say = silent
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """The images, uint8 [n, C, H, W], their labels, and the same images as inputs of the model."""
    if path is not None and trained.values is None:
        pictures = shown_pictures(trained, Path(path), trained.images.shape[0], n, size, say)
        return pictures, None, pictures
    if path is not None:
        pack, labels = open_pack(path, **trained.form, foreign=True, say=say), None
    else:
        pack = open_pack(trained.part.data.name, **trained.form)
        check_unchanged(trained.run.owner.path, pack.meta)
        labels = pack.labels("test")
    images, seen = (each.images("test")[:n] for each in (pack, trained.seen(pack)))
    return images, None if labels is None else np.asarray(labels[:n]), seen


def shown_pictures(
    trained: Trained, path: Path, channels: int, n: int | None, size: Size | None = None, say: Say = silent
) -> np.ndarray:
    """At most n images at a path, uint8, resized as the run's images were."""
    form = trained.form
    patch, size = None if size else form["patch"], size or form["size"]
    return read_pictures(path, size=size, channels=channels, limit=n, fit=form["fit"], patch=patch, say=say)


def seen_mask(mask: Tensor, trained: Trained) -> Tensor:
    """A mask [1, 1, H, W] in the model's space, 1 for the pixels to keep. A latent is kept if all of its
    pixels are."""
    if trained.space is not None:
        _, h, w = trained.info.shape
        mask = (F.adaptive_avg_pool2d(mask, (h, w)) > 0.999).float()
    return mask.to(trained.device)
