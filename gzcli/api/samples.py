"""Images that a model drew: an array with labels and seed, which a notebook displays as an image."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gzcli.core.errors import UsageError
from gzcli.engine import sheets
from gzcli.store.files import write_arrays
from gzcli.store.png import picture_of, save_images, save_png

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SHOWN_IMAGES = 64  # images of an image in a notebook


class Samples(np.ndarray):
    """A numpy array of images, uint8 [N, C, H, W], with their labels and seed.

    labels: int64 [N] or 0/1 [N, K], the classes of the images; None without labels.
    classes: names of the classes.
    seed: seed of their noise; None for images that a model did not draw.
    values: [N, C, H, W], all channels in the units of the data set; None unless the images are only previews
      of such values.
    """

    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    seed: int | None = None
    values: np.ndarray | None = None

    def __new__(
        cls,
        images: np.ndarray,
        *,
        labels: np.ndarray | None = None,
        classes: Sequence[str] = (),
        seed: int | None = None,
        values: np.ndarray | None = None,
    ) -> Samples:
        samples = np.asarray(images).view(cls)
        samples.labels, samples.classes, samples.seed = labels, tuple(classes), seed
        samples.values = values
        return samples

    def __array_finalize__(self, source: Any) -> None:
        if isinstance(source, Samples):
            self.classes, self.seed = source.classes, source.seed
            same = 0 < self.ndim == source.ndim and len(self) == len(source)
            self.labels = source.labels if same else None
            self.values = source.values if same else None

    def __getitem__(self, rows: Any) -> Any:
        part = super().__getitem__(rows)
        if isinstance(part, Samples):
            first = rows[0] if isinstance(rows, tuple) and rows else rows
            whole = part.ndim == self.ndim and first is not ...
            part.labels = self.labels[first] if whole and self.labels is not None else None
            part.values = self.values[first] if whole and self.values is not None else None
        return part

    def grid(self, columns: int | None = None) -> Image:
        """All images as one image; if they have labels, with a column for each class.

        columns: number of columns; None: one for each class, or as square as possible.

        Raises UsageError if the array no longer has the shape of images.
        """
        images = np.asarray(self)
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[-3] not in (1, 3):
            message = f"an array of {images.dtype} with shape {images.shape} does not contain images"
            raise UsageError(message, hint="images are uint8 [N, C, H, W], C = 1 or 3")
        images = images[None] if images.ndim == 3 else images
        labels = None if self.labels is None or len(self.labels) != len(images) else self.labels
        if columns is None and labels is not None:
            import torch

            picture = sheets.of_samples(images, torch.from_numpy(np.asarray(labels)), self.classes, "")
        else:
            picture = sheets.grid(images, columns)
        return picture_of(picture)

    def save(self, path: str | Path) -> Path:
        """Writes the images and returns the path. A path that ends in `.png` gets one image, and one that
        ends in `.npz` gets `samples` [N, H, W, C] and `labels`. Any other path becomes a folder with a PNG
        for each image."""
        path, images = Path(path), np.asarray(self)
        if path.suffix == ".png":
            picture = np.asarray(self.grid())
            save_png(path, picture[:, :, None] if picture.ndim == 2 else picture, {"seed": self.seed})
        elif path.suffix == ".npz":
            labels = {} if self.labels is None else {"labels": self.labels}
            names = {"class_names": np.array(self.classes)} if labels and self.classes else {}
            whole = images if self.values is None else self.values
            write_arrays(path, {"samples": whole.transpose(0, 2, 3, 1), **labels, **names})
        else:
            save_images(path, images, {"seed": self.seed})
        return path

    def _repr_png_(self) -> bytes | None:
        """The image that a notebook displays, of at most 64 images."""
        try:
            picture = (self[:MAX_SHOWN_IMAGES] if self.ndim == 4 else self).grid()
        except UsageError:  # a notebook shows the numbers
            return None
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return buffer.getvalue()
