"""What the page of `gz demo` does: each function takes what a person set and returns pictures, and the code
that makes the same ones."""

from __future__ import annotations

import itertools
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from gzcli.api import functions
from gzcli.api.handles import Run
from gzcli.core.errors import UsageError
from gzcli.core.types import Progress
from gzcli.data.packs.batches import to_uint8
from gzcli.data.sets.names import class_numbers
from gzcli.demo import code
from gzcli.demo.choices import Controls, controls
from gzcli.demo.code import Code
from gzcli.demo.watch import watched
from gzcli.engine.sheets import grid
from gzcli.judge.sample import shown_pictures
from gzcli.store.png import save_png

WIDE = 900  # pixels to which pictures are enlarged
Shown = tuple[np.ndarray, Code | None]  # a picture [H, W, C] uint8, and the code once it is the last one


@dataclass(frozen=True)
class Asked:
    """What is asked of a sampler.

    run: name of the run.
    n: number of images.
    seed: of the noise.
    label: name of their class; None: each in turn.
    options: keywords of the model's `sample`.
    """

    run: str
    n: int = 16
    seed: int = 0
    label: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


class Studio:
    """The run that is on the page. It is loaded once; one thing is done at a time.

    device: as torch names it; None: a GPU if there is one.

    Its `folder` goes with it, or when the program ends.
    """

    def __init__(self, device: str | None = None):
        self.device = device
        self._held = tempfile.TemporaryDirectory(prefix="gz-demo-", ignore_cleanup_errors=True)
        self.folder = Path(self._held.name)
        self.shown = self.folder / "shown"  # what the page shows: none of its files is written twice
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._open: tuple[str, Run, Controls] | None = None
        self._judged = 0

    def open(self, name: str) -> tuple[Run, Controls]:
        """A run, and what the page shows for it."""
        with self._lock:
            if self._open is None or self._open[0] != name:
                run = functions.load(name, device=self.device)
                self._open = name, run, controls(run)
            return self._open[1:]

    def draw(self, asked: Asked) -> Iterator[Shown]:
        """Samples, as they become."""
        run, _ = self.open(asked.run)
        number, options = self._number(run, asked.label), self._changed(asked)

        def work(progress: Progress) -> np.ndarray:
            labels = None if number is None else [number]
            with self._lock:
                return run.sample(asked.n, seed=asked.seed, labels=labels, progress=progress, **options)

        made = code.drawing(asked.run, asked.n, asked.seed, asked.label, number, options)
        yield from self._shown(run, work, made, asked.n)

    def between(self, first: Asked, last: Asked, frames: int) -> Iterator[Shown]:
        """The way from an image of one seed to that of another."""
        run, can = self.open(first.run)
        if not can.way:
            raise UsageError(f"`{run.trained.name}` does not go from image to image")
        options = self._changed(first)
        ends = [(asked.seed, asked.label, self._number(run, asked.label)) for asked in (first, last)]

        def work(progress: Progress) -> np.ndarray:
            with self._lock:
                images = [
                    run.sample(1, seed=seed, labels=None if number is None else [number], **options)
                    for seed, _, number in ends
                ]
                return run.do("interpolate", np.concatenate(images), progress=progress, frames=frames)

        made = code.between(first.run, ends, frames, options)
        yield from self._shown(run, work, made, frames, whole=True)

    def canvas(self, name: str, seed: int, label: str | None) -> np.ndarray:
        """A sample large enough to paint on, [H, W, 3]."""
        run, _ = self.open(name)
        number = self._number(run, label)
        with self._lock:
            image = run.sample(1, seed=seed, labels=None if number is None else [number])
        large = enlarged(image[0].transpose(1, 2, 0), 480)
        return large.repeat(3, 2) if large.shape[2] == 1 else large

    def inpaint(
        self, name: str, picture: np.ndarray, painted: np.ndarray, seed: int, label: str | None
    ) -> Iterator[Shown]:
        """A picture with what was painted over filled in.

        picture: uint8 [H, W, C] of any size, which is brought to that of the run's images.
        painted: where the brush was, bool [H, W].
        """
        run, can = self.open(name)
        if not can.inpaints:
            raise UsageError(f"`{run.trained.name}` does not inpaint")
        if not painted.any():
            raise UsageError("nothing is painted over", hint="mark with the brush what is to be filled in")
        number, place = self._number(run, label), self.folder
        channels = run.info.shape[0]
        image = self._sized(run, picture, channels)
        mask = self._sized(run, np.where(painted, 0, 255).astype(np.uint8), 1) > 127
        save_png(place / "picture.png", image[0].transpose(1, 2, 0))
        save_png(place / "mask.png", (mask[0] * np.uint8(255)).transpose(1, 2, 0))

        def work(progress: Progress) -> np.ndarray:
            given: dict[str, Any] = {} if number is None else {"labels": [number]}
            with self._lock:
                return run.do("inpaint", image, mask=mask[0, 0], seed=seed, progress=progress, **given)

        yield from self._shown(run, work, code.inpainting(name, seed, label, number), 1)

    def judge(self, name: str, picture: np.ndarray, n: int) -> tuple[dict[str, Any], np.ndarray, Code]:
        """Whether a picture is none of the run's set: what `gz ood --input` finds of it; the picture as the
        model sees it and, where the model has one, beside it the map [H, W, 3]; and the code.

        picture: uint8 [H, W, C].
        n: held-out images that it is compared with.
        """
        run, can = self.open(name)
        if not can.scores:
            raise UsageError(f"`{run.trained.name}` does not score pictures")
        with self._lock:
            self._judged += 1
            place = self.folder / f"judged-{self._judged}"
            save_png(place / "picture.png", picture)
            found = run.judge(place / "picture.png", n=n, maps=can.maps, folder=place)
            seen = shown_pictures(run.trained, place / "picture.png", run.info.shape[0], 1)
        pictures = [seen.repeat(3, 1) if seen.shape[1] == 1 else seen]
        for path in (found["outputs"].get("maps") or {}).values():
            pictures.append(np.asarray(Image.open(path)).transpose(2, 0, 1)[None])
        return found, sheet(np.concatenate(pictures), len(pictures)), code.judging(name, n, can.maps)

    def file(self, picture: np.ndarray) -> str:
        """The path of a picture [H, W, C], in a file of its own: the browser may still be reading that of an
        equal one."""
        path = self.shown / f"{next(self._numbers):06}.png"
        save_png(path, picture)
        return str(path)

    # ------------------------------------------------------------------------------------------ helpers

    def _shown(self, run: Run, work: Any, made: Code, n: int, whole: bool = False) -> Iterator[Shown]:
        """The pictures of what `work` makes of n images: states without code, then the result with it.

        whole: whether they stand in one row; states of others than n images are left out.
        """

        def images(x: Tensor) -> np.ndarray:
            return to_uint8(run.trained.shown(x)).cpu().numpy()

        last: np.ndarray | None = None
        for last in watched(work, images):
            if len(last) == n:
                yield sheet(last, n if whole else None), None
        assert last is not None
        yield sheet(last, n if whole else None), made

    @staticmethod
    def _number(run: Run, label: str | None) -> int | None:
        return None if label is None else class_numbers(label, run.info.classes)[0]

    def _changed(self, asked: Asked) -> dict[str, Any]:
        """The options that differ from the values of the recipe."""
        _, can = self.open(asked.run)
        values = {**can.numbers, "sampler": can.sampler, "prompt": None}
        return {key: v for key, v in asked.options.items() if v != values.get(key)}

    def _sized(self, run: Run, picture: np.ndarray, channels: int) -> np.ndarray:
        """A picture as the run's images are, uint8 [1, channels, H, W]; of an enlarged image that image."""
        picture = np.atleast_3d(picture)
        scale = max(1, picture.shape[0] // run.info.shape[1])
        small = picture[::scale, ::scale]
        if small.shape[:2] == run.info.shape[1:] and np.array_equal(
            enlarged(small, len(picture[0])), picture
        ):
            picture = small
        path = self.folder / "painted.png"
        save_png(path, picture)
        return shown_pictures(run.trained, path, channels, 1)


def sheet(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Images uint8 [N, C, H, W] as one picture [H', W', C] that fills the page; one image by itself.

    columns: number of images in a row; None: about as many as make the picture square.
    """
    return enlarged(images[0].transpose(1, 2, 0) if len(images) == 1 else grid(images, columns), WIDE)


def enlarged(picture: np.ndarray, least: int) -> np.ndarray:
    """A picture [H, W, C] by the whole number that brings its width to `least` pixels, about."""
    scale = max(1, least // picture.shape[1])
    return picture.repeat(scale, 0).repeat(scale, 1)
