"""`gz sample`: images from a trained model, or one of its applications (`--do inpaint --input PATH`)."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gzcli.data.batches import quantise, to_uint8
from gzcli.engine import sampler
from gzcli.engine.context import Trained, load_trained
from gzcli.engine.log import Log
from gzcli.errors import UsageError
from gzcli.store.runs import Run
from gzcli.types import ImageNoise, Progress

PNG_LIMIT = 256  # single pictures are written up to so many images, or on request


def run(job: Mapping[str, Any], folder: Path, device: torch.device, log: Log) -> dict[str, Any]:
    """Does the job and writes `grid.png`, single PNGs and `samples.npz` (uint8 [N, H, W, C]) into `folder`.

    job: {run, checkpoint, n, seed, labels, prompts, options, do, input, input_as, mask, npz, png, animate}; n None is as many
    as there are prompts or input pictures, whichever are more. `input_as`: the keyword of `sample` that gets these.
    """
    trained = load_trained(Run(Path(job["run"])), device, job["checkpoint"])
    since = time.monotonic()
    frames = Frames(trained.shown) if job["animate"] else None
    with log.bar(job["do"] or "sample") as bar:
        progress = bar if frames is None else frames.watch(bar)
        if job["do"]:
            images, columns = apply(trained, job, progress)
            sheet = images
        else:
            given, inputs = given_to_sample(trained, job)
            n = job["n"] or max(map(len, given.values()))
            labels = sampler.parse_labels(job["labels"], n, trained.info) if job["labels"] else None
            images = sampler.draw(
                trained, n, seed=job["seed"], labels=labels, given=given, options=job["options"], progress=progress
            )
            sheet, columns = images, None
            if inputs is not None and inputs.shape[1:] == images.shape[1:]:
                sheet, columns = pairs(inputs[np.arange(n) % len(inputs)], images)
    seconds = time.monotonic() - since
    result = {
        "run": trained.run.owner.id, "step": trained.step, "n": len(images), "seed": job["seed"], "prompts": job.get("prompts", []),
        "seconds": round(seconds, 3), "grid": str(folder / "grid.png"), "files": [], "npz": None,
    }  # fmt: skip
    if sampler.ranks()[0]:
        return result
    sampler.save_png(folder / "grid.png", sampler.grid(sheet, columns))
    if job["png"] or len(images) <= PNG_LIMIT:
        result["files"] = sampler.save_images(folder / "images", images)
    if frames:
        frames.save(folder / "animation.gif", images)
    if job["npz"]:
        result["npz"] = str(folder / "samples.npz")
        np.savez_compressed(folder / "samples.npz", samples=images.transpose(0, 2, 3, 1))
    return result


def given_to_sample(trained: Trained, job: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray | None]:
    """What `sample` gets of prompts and input pictures, and these as bytes; they are read at the side of the images."""
    given: dict[str, Any] = {"prompt": job["prompts"]} if job.get("prompts") else {}
    if not job.get("input_as"):
        return given, None
    side = (trained.tree["sample"] | job["options"]).get("size")
    inputs = read_inputs(trained, job["input"], job["n"], side)
    given[job["input_as"]] = quantise(torch.from_numpy(inputs), trained.images.levels, ImageNoise(job["seed"], range(len(inputs))))
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


def apply(trained: Trained, job: Mapping[str, Any], progress: Progress) -> tuple[np.ndarray, int]:
    """An application on the input's images. Returns inputs and outputs as rows of one grid, and its number of columns.

    Without `--input` the first test images of the run's data set are taken. An application that returns ways of `steps`
    images (an interpolation) fills that many columns.
    """
    method = getattr(trained.model, job["do"])
    inputs = read_inputs(trained, job["input"], job["n"])
    n = len(inputs)
    # a binary model sees one draw of its inputs, as it does in training
    x = quantise(torch.from_numpy(inputs), trained.images.levels, ImageNoise(job["seed"], range(n))).to(trained.device)
    x = x if trained.space is None else trained.space.encode(x)
    options = dict(job["options"])
    if job["mask"]:
        options["mask"] = read_mask(Path(job["mask"]), trained).expand(n, -1, -1, -1)
    if job.get("prompts"):
        options["prompt"] = sampler.cycled(job["prompts"], range(n), trained.device)
    if job["labels"]:
        options["labels"] = sampler.parse_labels(job["labels"], n, trained.info).to(trained.device)
    out = trained.shown(method(x, noise=ImageNoise(job["seed"], range(n), trained.device), progress=progress, **options))
    out = to_uint8(out).cpu().numpy()
    if out.shape[1:] != inputs.shape[1:]:
        raise UsageError(f"`--do {job['do']}` returned images of another shape")
    if len(out) == n:
        return pairs(inputs, out)
    keys = inspect.signature(method).parameters
    length = "frames" if "frames" in keys else "steps"  # what the method calls the images of a way: a row of the grid
    return out, options.get(length, keys[length].default)


def pairs(inputs: np.ndarray, out: np.ndarray) -> tuple[np.ndarray, int]:
    """Images [n, C, H, W] as rows of one grid, inputs above, outputs below, ten a row; and its number of columns."""
    columns = min(len(out), 10)
    rows = [part[i : i + columns] for i in range(0, len(out), columns) for part in (inputs, out)]
    return np.concatenate([pad(row, columns) for row in rows]), columns


def pad(row: np.ndarray, columns: int) -> np.ndarray:
    """A last row that is not full, filled with white."""
    return np.concatenate([row, np.full((columns - len(row), *row.shape[1:]), 255, np.uint8)])


def read_inputs(trained: Trained, path: str | None, n: int | None, side: int | None = None) -> np.ndarray:
    """uint8 [≤ n, C, H, W]: pictures of a file or folder at the run's size or another `side`, or the run's own test images."""
    from gzcli.data import same
    from gzcli.data.folder import read_pictures
    from gzcli.data.pack import open_pack

    channels, height, _ = trained.images.shape
    if path is None:
        data = trained.tree["data"]
        pack = open_pack(data["name"], size=data["size"], channels=data["channels"])
        same.hold(trained.run.owner.path, pack.meta)
        return pack.images("test")[:n]
    return read_pictures(Path(path), size=side or height, channels=channels, limit=n)


def read_mask(path: Path, trained: Trained) -> torch.Tensor:
    """[1, 1, H, W] of 0/1 on the device: white is kept, black is filled in. Latents are kept where all their pixels are."""
    from gzcli.data.folder import read_pictures

    mask = (torch.from_numpy(read_pictures(path, size=trained.images.shape[1], channels=1, limit=1)) > 127).float()
    if trained.space is not None:
        mask = (torch.nn.functional.adaptive_avg_pool2d(mask, trained.info.shape[1:]) > 0.999).float()
    return mask.to(trained.device)
