"""MedMNIST's `.npz` layout, read in blocks from the zip that it is; never unpickled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gzcli.data.archives import Zip
from gzcli.data.build import Block, Source
from gzcli.errors import MissingError, UsageError

BLOCK_BYTES = 1 << 18
MOST_CLASSES = 100_000


def npz(path: Path) -> Source:
    """MedMNIST's layout (train_images [N, H, W] or [N, H, W, 3], train_labels [N], [N, 1] or [N, K]; val_…, test_…),
    or `images` and, if there are any, `labels`. uint8, or uint16 (divided by 257). Streamed, never unpickled."""
    archive = _Npz(path)
    stems = {s: f"{s}_" for s in ("train", "val", "test") if f"{s}_images" in archive} or {"train": ""}
    if "train" not in stems or f"{stems['train']}images" not in archive:
        hint = "it needs `train_images` (and `train_labels`, `test_images`, …), or `images` (and `labels`)"
        raise UsageError(f"`{path}` has no images: its arrays are {', '.join(archive) or 'none'}", hint=hint)
    labelled = [f"{stem}labels" in archive for stem in stems.values()]
    if any(labelled) and not all(labelled):
        raise UsageError(f"`{path}` has labels for some splits only", hint="give them for all, or for none")
    shapes = {split: archive.image_shape(f"{stem}images") for split, stem in stems.items()}
    if len({shape[1:] for shape in shapes.values()}) > 1:
        raise UsageError(f"`{path}` has splits of different image sizes")
    counts = {split: shape[0] for split, shape in shapes.items()}
    labels = {split: archive.labels(f"{stem}labels", counts[split]) for split, stem in stems.items() if any(labelled)}
    multilabel = any(y.ndim == 2 for y in labels.values())
    known = max((y.shape[1] if multilabel else int(y.max()) + 1 for y in labels.values() if len(y)), default=0)

    def blocks() -> Iterator[Block]:
        for split, stem in stems.items():
            for start, images in archive.images(f"{stem}images"):
                yield split, start, images, f"{stem}images"

    return Source(
        str(path),
        tuple(map(str, range(known))),
        counts,
        labels,
        blocks,
        shape=shapes["train"][1:],
        multilabel=multilabel,
    )


class _Npz:
    """The arrays of an npz, read in blocks from the zip it is."""

    def __init__(self, path: Path):
        self.path = path
        self.zip = Zip(path, lambda name: name.endswith(".npy"))
        self.names = [name[: -len(".npy")] for name in self.zip.names]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def image_shape(self, name: str) -> tuple[int, int, int, int]:
        """(N, C, H, W)"""
        with self.zip.opened() as archive, archive.open(f"{name}.npy") as f:
            shape, dtype, fortran = self._header(f, name)
        grey = len(shape) == 3
        if dtype not in (np.uint8, np.uint16) or fortran or not (grey or (len(shape) == 4 and shape[3] in (1, 3))):
            raise UsageError(
                f"`{name}` in `{self.path}` is {dtype} of shape {shape}",
                hint="images are uint8 or uint16 of shape [N, H, W] or [N, H, W, 3]",
            )
        return (shape[0], 1, *shape[1:]) if grey else (shape[0], shape[3], shape[1], shape[2])

    def images(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, uint8 [n, C, H, W])"""
        n, c, h, w = self.image_shape(name)
        with self.zip.opened() as archive, archive.open(f"{name}.npy") as f:
            _, dtype, _ = self._header(f, name)
            row = c * h * w * dtype.itemsize
            block = max(1, BLOCK_BYTES // row)
            for start in range(0, n, block):
                want = min(block, n - start) * row
                if len(data := f.read(want)) != want:
                    raise MissingError(f"`{self.path}` is cut off in `{name}`", hint="fetch or make the file again")
                images = np.frombuffer(data, dtype).reshape(-1, h, w, c).transpose(0, 3, 1, 2)
                wide = dtype != np.uint8
                yield start, ((images.astype(np.uint32) + 128) // 257).astype(np.uint8) if wide else images

    def labels(self, name: str, n: int) -> np.ndarray:
        """int64 [N], or uint8 [N, K] where several classes can hold at once."""
        with self.zip.opened() as archive, archive.open(f"{name}.npy") as f:
            self._header(f, name)
            f.seek(0)
            y = np.lib.format.read_array(f, allow_pickle=False)
        y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
        whole = np.issubdtype(y.dtype, np.integer) or y.dtype == bool
        most = 1 if y.ndim == 2 else MOST_CLASSES - 1
        if not whole or y.ndim not in (1, 2) or len(y) != n or (y.size and (y.min() < 0 or y.max() > most)):
            hint = "labels are integers from 0 on, of shape [N] or [N, 1], or 0 and 1 of shape [N, K]"
            raise UsageError(f"`{name}` in `{self.path}` is {y.dtype} of shape {y.shape} for {n} images", hint=hint)
        return y.astype(np.int64 if y.ndim == 1 else np.uint8)

    def _header(self, f, name: str) -> tuple[tuple[int, ...], np.dtype, bool]:
        try:
            version = np.lib.format.read_magic(f)
            read = {(1, 0): np.lib.format.read_array_header_1_0}.get(version, np.lib.format.read_array_header_2_0)
            shape, fortran, dtype = read(f)
            if dtype.hasobject:
                raise ValueError("it holds Python objects")
        except ValueError as e:
            raise MissingError(f"`{name}` in `{self.path}` is not a numpy array: {e}") from e
        return shape, dtype, fortran
