"""`gz sample`: images from a trained model, or one of its applications (`--do inpaint --input PATH`)."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gzcli import ranks
from gzcli.data.batches import quantise, to_uint8
from gzcli.engine import sampler
from gzcli.engine.apply import COLUMNS, apply, blocks, by_class, read_inputs, to_bytes
from gzcli.engine.log import Log
from gzcli.engine.trained import Trained, load_trained
from gzcli.models.nn import spread_labels
from gzcli.store.runs import Run
from gzcli.types import ImageNoise, Progress

PNG_LIMIT = 256  # single pictures are written up to so many images, or on request


def run(job: Mapping[str, Any], folder: Path, device: torch.device, log: Log) -> dict[str, Any]:
    """Does the job and writes `grid.png`, and of the images alone single PNGs and `samples.npz` (`samples`
    uint8 [N, H, W, C], `labels` [N] or [N, K] where there are any), into `folder`.

    job: {run, checkpoint, n, seed, labels, prompts, options, do, input, input_as, mask, npz, png, animate}; n
    None is as many as there are prompts or input pictures, whichever are more. `input_as`: the keyword of
    `sample` that gets these.
    """
    trained = load_trained(Run(Path(job["run"])), device, job["checkpoint"])
    since = time.monotonic()
    frames = Frames(trained.shown) if job["animate"] else None
    with log.bar(job["do"] or "sample") as bar:
        progress = bar if frames is None else frames.watch(bar)
        if job["do"]:
            done = apply(trained, job, progress)
            images, labels, picture = done.images, done.labels, done.sheet
        else:
            images, labels, picture = samples(trained, job, progress)
    result = {
        "run": trained.run.owner.id,
        "step": trained.step,
        "n": len(images),
        "seed": job["seed"],
        "prompts": job.get("prompts", []),
        "seconds": round(time.monotonic() - since, 3),
        "grid": str(folder / "grid.png"),
        "files": [],
        "npz": None,
        "animation": None,
    }
    if job["do"]:
        result |= {"do": job["do"], "rows": list(done.applied.rows), "columns": done.applied.columns}
    if ranks.rank():
        return result
    sampler.save_png(folder / "grid.png", picture)
    if job["png"] or len(images) <= PNG_LIMIT:
        result["files"] = sampler.save_images(folder / "images", images)
    if frames:
        result["animation"] = str(folder / "animation.gif")
        frames.save(folder / "animation.gif", images)
    if job["npz"]:
        result["npz"] = str(folder / "samples.npz")
        known = {} if labels is None else {"labels": labels}
        np.savez_compressed(folder / "samples.npz", samples=images.transpose(0, 2, 3, 1), **known)
    return result


def samples(
    trained: Trained,
    job: Mapping[str, Any],
    progress: Progress,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Images [n, C, H, W], the labels that they were asked for by, and their sheet [H, W, C]."""
    given, inputs = given_to_sample(trained, job)
    n, labels = job["n"] or max(map(len, given.values())), None
    if job["labels"]:
        labels = sampler.parse_labels(job["labels"], n, trained.info)
    elif trained.model.conditional:
        labels = spread_labels(None, n, trained.info, torch.device("cpu"))
    images = sampler.draw(
        trained,
        n,
        seed=job["seed"],
        labels=labels,
        given=given,
        options=job["options"],
        progress=progress,
    )
    picture = picture_of(trained, job, images, labels, given, inputs)
    return images, None if labels is None else labels.numpy(), picture


def picture_of(
    trained: Trained,
    job: Mapping[str, Any],
    images: np.ndarray,
    labels: Tensor | None,
    given: Mapping[str, Any],
    inputs: np.ndarray | None,
) -> np.ndarray:
    """The sheet [H, W, C] of samples: what each was made from above it, or columns of one class."""
    n = len(images)
    if hasattr(trained.model, "sources"):
        inputs = made_from(trained, n, job, given)
        inputs = inputs.mean(1, keepdims=True).astype(np.uint8) if images.shape[1] == 1 else inputs
    elif inputs is not None:
        inputs = inputs[np.arange(n) % len(inputs)]
    if inputs is not None and inputs.shape[1:] == images.shape[1:]:
        return blocks([(job["input_as"] or "source", inputs), ("result", images)], min(n, COLUMNS))
    columns, marks = by_class(labels, n, math.ceil(math.sqrt(n)), trained.info.classes)
    return blocks([("", images)], columns, marks) if marks else sampler.grid(images)


def made_from(trained: Trained, n: int, job: Mapping[str, Any], given: Mapping[str, Any]) -> np.ndarray:
    """The images, as bytes, that a model which starts from some, `given` or its own, made its samples of."""
    method = trained.model.sources
    options = {**trained.part.sample, **job["options"]}
    options |= {key: sampler.cycled(values, range(n), trained.device) for key, values in given.items()}
    known = {key: value for key, value in options.items() if key in inspect.signature(method).parameters}
    with torch.inference_mode():
        return to_bytes(method(n, noise=ImageNoise(job["seed"], range(n), trained.device), **known))


def given_to_sample(trained: Trained, job: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray | None]:
    """What `sample` gets of prompts and input pictures, and these as bytes; they are read at the side of the
    images."""
    given: dict[str, Any] = {"prompt": job["prompts"]} if job.get("prompts") else {}
    if not job.get("input_as"):
        return given, None
    side = ({**trained.part.sample, **job["options"]}).get("size")
    inputs, _ = read_inputs(trained, job["input"], job["n"], side)
    given[job["input_as"]] = quantise(
        torch.from_numpy(inputs), trained.images.levels, ImageNoise(job["seed"], range(len(inputs)))
    )
    return given, inputs


class Frames:
    """What the sampler showed of its first images on the way, for `--animate`."""

    FIRST, MOST, MS = 16, 60, 80

    def __init__(self, shown: Callable[[torch.Tensor], torch.Tensor]):
        self.shown = shown
        self.seen: list[np.ndarray] = []

    def watch(self, bar: Progress) -> Progress:
        """A progress that keeps every state x [B, C, H, W] which it is shown, and hands on to `bar`."""

        def progress(i: float, n: float, x: torch.Tensor | None = None) -> None:
            bar(i, n, x)
            if x is not None:
                self.seen.append(to_uint8(self.shown(x[: self.FIRST])).cpu().numpy())

        return progress

    def save(self, path: Path, images: np.ndarray) -> None:
        """A GIF of at most 60 frames that rests on the result."""
        from PIL import Image

        chosen = self.seen[:: max(1, len(self.seen) // self.MOST)]
        sheets = [sampler.grid(x, 4).squeeze() for x in [*chosen, *[images[: self.FIRST]] * 10]]
        first, *rest = [Image.fromarray(sheet) for sheet in sheets]
        first.save(path, save_all=True, append_images=rest, duration=self.MS, loop=0)
