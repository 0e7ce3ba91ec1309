"""Whether samples are copies of training images, and what they are worth as training images themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from gzcli.engine.sheets import Row, sheet
from gzcli.judge import figures
from gzcli.judge.figures import Found
from gzcli.judge.image_sets import ImageSet, RealImages, Space, some
from gzcli.judge.images import subset
from gzcli.metrics.manifold import authenticity, duplicates, nearest
from gzcli.metrics.worth import worth
from gzcli.store.png import save_png

BANK = 50_000  # training images among which neighbours are looked for, at most
SHOWN = 10  # samples of a picture, those nearest to a training image


class Memory:
    """Compares samples with their nearest training images. Held-out test images are the floor."""

    def __init__(self, real: RealImages, space: Space):
        self.space = space
        train = real.of("train")
        self.train = train if len(train) <= BANK else train.take(subset(len(train), BANK))
        self.held_out = real.of("test")

    def __call__(self, images: ImageSet) -> Found:
        """`authenticity`, the share of samples that are farther from a training image than it is from the
        next, and `duplicates`, the share as close to one as 1 % of the test images are, with intervals."""
        made, train = images.features(self.space), self.train.features(self.space)
        held_out = self.held_out.features(self.space)
        found = {"authenticity": authenticity(made, train), "duplicates": duplicates(made, train, held_out)}
        return {name: figures.share(value, len(made)) for name, value in found.items()}

    def floor(self, n: int) -> Found:
        """The same of n test images."""
        return self(some(self.held_out, n))

    def picture(self, path: Path, sets: Mapping[str, ImageSet]) -> None:
        """Writes a picture: of each set the images nearest to a training image, above this and above the one
        that is nearest by pixels."""
        train = self.train.features(self.space)
        blocks = []
        for name, images in {**sets, "test images": self.held_out}.items():
            distances, places = nearest(images.features(self.space), train)
            rows = np.argsort(distances[:, 0], kind="stable")[:SHOWN]
            shown = np.asarray(images.images[np.sort(rows)])[np.argsort(np.argsort(rows))]
            by_pixels = nearest(shown, np.asarray(self.train.images[:]))[1][:, 0]
            blocks.append(
                [
                    Row(name, list(shown)),
                    Row("nearest by features", [self.train.images[int(i)] for i in places[rows, 0]]),
                    Row("nearest by pixels", [self.train.images[int(i)] for i in by_pixels]),
                ]
            )
        save_png(path, sheet(blocks))


def worth_of(images: ImageSet, real: RealImages, say: Callable[[str], None]) -> Found:
    """What labelled images are worth as training images, by the names that `worth` gives them after `worth_`;
    {} for images without labels, or of sets without classes."""
    train, test, meta = real.of("train"), real.of("test"), real.pack.meta
    if images.labels is None or train.labels is None or test.labels is None or meta.multilabel:
        return {}
    found = worth(
        np.asarray(train.images[:]),
        train.labels,
        np.asarray(images.images),
        images.labels,
        np.asarray(test.images[:]),
        test.labels,
        len(meta.classes),
        say=say,
    )
    return {f"worth_{name}": value for name, value in found.items()}
