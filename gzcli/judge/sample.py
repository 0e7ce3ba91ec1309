"""`gz sample`: images from a trained model, or one of its applications (`--do inpaint --input PATH`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gzcli.core import ranks
from gzcli.core.jobs import SampleJob
from gzcli.core.types import ImageNoise, Progress
from gzcli.data.packs.batches import quantise, to_uint8
from gzcli.data.packs.forms import Say, silent
from gzcli.engine import sampler, sheets
from gzcli.engine.devices import title
from gzcli.engine.log import Log
from gzcli.engine.sheets import Row
from gzcli.engine.trained import Trained, load_trained, weights_file
from gzcli.judge.apply import COLUMNS, apply, read_inputs, to_bytes
from gzcli.models.nn import spread_labels
from gzcli.models.options import defaults, grouped
from gzcli.store.files import checksum
from gzcli.store.png import save_images, save_png
from gzcli.store.runs import Run

PNG_LIMIT = 256  # number of images up to which single PNGs are written without being asked for


def run(job: SampleJob, folder: Path, device: torch.device, log: Log) -> dict[str, Any]:
    """Does the job and writes its files into `folder`. Returns the JSON of `gz sample`.

    `grid.png` is always written. The job may ask for single PNGs, for `animation.gif`, and for `samples.npz`
    with `samples` uint8 [N, H, W, C] and, where there are any, `labels` [N] or [N, K].
    """
    trained = load_trained(Run(Path(job.run)), device, job.checkpoint, job.precision)
    since = time.monotonic()
    frames = Frames(trained.shown) if job.animate else None
    rows: dict[str, Any] = {}
    with log.bar(job.do or "sample") as bar:
        progress = bar if frames is None else frames.watch(bar)
        if job.do:
            output = apply(trained, job.do, job, progress, log.info)
            images, labels, picture = output.images, output.labels, output.sheet
            rows = {"do": job.do, "rows": list(output.applied.rows), "columns": output.applied.columns}
            rows |= {"figures": dict(output.applied.figures)}
            rows |= {} if labels is None else {"labels": labels.tolist()}
        else:
            images, labels, picture = samples(trained, job, progress, log.info)
    result: dict[str, Any] = {
        "run": trained.run.owner.id,
        "step": trained.step,
        "n": len(images),
        "seed": job.seed,
        "precision": trained.precision,
        "prompts": list(job.prompts),
        "seconds": round(time.monotonic() - since, 3),
        "grid": str(folder / "grid.png"),
        "files": [],
        "npz": None,
        "animation": None,
        **rows,
    }
    if ranks.rank():
        return result
    made = origin(trained, job, len(images))
    save_png(folder / "grid.png", picture, made)
    if job.png or len(images) <= PNG_LIMIT:
        result["files"] = save_images(folder / "images", images, made)
    if frames:
        result["animation"] = str(folder / "animation.gif")
        frames.save(folder / "animation.gif", images)
    if job.npz:
        result["npz"] = str(folder / "samples.npz")
        arrays = {"samples": images.transpose(0, 2, 3, 1)} | ({} if labels is None else {"labels": labels})
        np.savez_compressed(folder / "samples.npz", **arrays)
    return result


def origin(trained: Trained, job: SampleJob, n: int) -> dict[str, Any]:
    """What made the n images of a job, as their pictures say it: by this `gz sample --like` draws again."""
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


def samples(
    trained: Trained, job: SampleJob, progress: Progress, say: Say = silent
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Images [n, C, H, W], the labels that they were sampled by, and their sheet [H, W, C].

    say: takes a line about how input pictures were read.
    """
    given, inputs = given_to_sample(trained, job, say)
    n, labels = job.n or max(map(len, given.values())), None
    if job.labels:
        labels = sampler.parse_labels(job.labels, n, trained.info)
    elif trained.model.conditional:
        labels = spread_labels(None, n, trained.info, torch.device("cpu"))
    images = sampler.draw(
        trained, n, seed=job.seed, labels=labels, given=given, options=job.options, progress=progress
    )
    picture = picture_of(trained, job, images, labels, given, inputs)
    return images, None if labels is None else labels.numpy(), picture


def picture_of(
    trained: Trained,
    job: SampleJob,
    images: np.ndarray,
    labels: Tensor | None,
    given: Mapping[str, Any],
    inputs: np.ndarray | None,
) -> np.ndarray:
    """The sheet [H, W, C] of samples: below the picture that each was made from, or in columns of one class.

    images: the samples, uint8 [n, C, H, W].
    labels: the labels that they were sampled by; None: no labels.
    given: what `given_to_sample` returned first.
    inputs: what `given_to_sample` returned second.
    """
    n, caption = len(images), sheets.caption_of(trained, None, job.seed, job.options)
    if hasattr(trained.model, "sources"):
        inputs = sources(trained, n, job, given)
        inputs = inputs.mean(1, keepdims=True).astype(np.uint8) if images.shape[1] == 1 else inputs
    elif inputs is not None:
        inputs = inputs[np.arange(n) % len(inputs)]
    if inputs is not None and inputs.shape[1:] == images.shape[1:]:
        kinds = [Row(job.input_as or "source", inputs), Row("result", images)]
        return sheets.blocks(kinds, min(n, COLUMNS), caption=caption)
    return sheets.of_samples(images, labels, trained.info.classes, caption)


def sources(trained: Trained, n: int, job: SampleJob, given: Mapping[str, Any]) -> np.ndarray:
    """The images uint8 [n, C, H, W] that the model's samples were made from: those `given`, or its own."""
    method = trained.model.sources
    options = {**trained.part.sample, **job.options}
    options |= {key: sampler.cycled(values, range(n), trained.device) for key, values in given.items()}
    taken = {key: value for key, value in options.items() if key in defaults(method)}
    noise = ImageNoise(job.seed, range(n), trained.device)
    with torch.inference_mode(), trained.sampling():
        return to_bytes(method(n, noise=noise, **grouped(method, taken)))


def given_to_sample(
    trained: Trained, job: SampleJob, say: Say = silent
) -> tuple[dict[str, Any], np.ndarray | None]:
    """The job's prompts and input pictures as keywords of `sample`; and these pictures as uint8 [m, C, H, W],
    at the size of the samples."""
    given: dict[str, Any] = {"prompt": job.prompts} if job.prompts else {}
    if not job.input_as:
        return given, None
    size = {**trained.part.sample, **job.options}.get("size")
    inputs, _ = read_inputs(trained, job.input, job.n, size, say)
    noise = ImageNoise(job.seed, range(len(inputs)))
    given[job.input_as] = quantise(torch.from_numpy(inputs), trained.images.levels, noise)
    return given, inputs


class Frames:
    """The states of the first images while they are sampled, for `--animate`.

    shown: turns what the model made into images [B, C, H, W] in [-1, 1].
    """

    FIRST, MOST, MS = 16, 60, 80  # images, frames, milliseconds of a frame

    def __init__(self, shown: Callable[[torch.Tensor], torch.Tensor]):
        self.shown = shown
        self.seen: list[np.ndarray] = []

    def watch(self, bar: Progress) -> Progress:
        """A progress that keeps every state x [B, C, H, W], and passes its arguments on to `bar`."""

        def progress(i: float, n: float, x: torch.Tensor | None = None) -> None:
            bar(i, n, x)
            if x is not None:
                self.seen.append(to_uint8(self.shown(x[: self.FIRST])).cpu().numpy())

        return progress

    def save(self, path: Path, images: np.ndarray) -> None:
        """Writes a GIF of about 60 frames, the last of which, the result, stays longer."""
        from PIL import Image

        chosen = self.seen[:: max(1, len(self.seen) // self.MOST)]
        shown = [sheets.grid(x, 4).squeeze() for x in [*chosen, *[images[: self.FIRST]] * 10]]
        first, *rest = [Image.fromarray(picture) for picture in shown]
        first.save(path, save_all=True, append_images=rest, duration=self.MS, loop=0)
