"""Readers of the publishers' own files: one function a layout, one line in PARSERS a set. Images stream in blocks."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from gzcli.data.build import Block, Source
from gzcli.data.specs import DataSpec
from gzcli.errors import MissingError

BLOCK = 256  # images


def idx(spec: DataSpec, folder: Path) -> Source:
    """MNIST's layout: big-endian header (0, 0, type 8 = uint8, dimensions, sizes), then the bytes; gzipped."""
    stems = {"train": "train", "test": "t10k"}
    labels = {s: _idx_array(folder / f"{stem}-labels-idx1-ubyte.gz").astype(np.int64) for s, stem in stems.items()}

    def blocks() -> Iterator[Block]:
        for split, stem in stems.items():
            path = folder / f"{stem}-images-idx3-ubyte.gz"
            with gzip.open(path) as f:
                n, h, w = _idx_header(f, path)
                if (n, h, w) != (len(labels[split]), *spec.shape[1:]):
                    raise MissingError(f"`{path}` holds {n} images of {h}×{w}", hint=f"`gz data verify {spec.name}`")
                for start in range(0, n, BLOCK):
                    rows = min(BLOCK, n - start)
                    data = np.frombuffer(f.read(rows * h * w), np.uint8).reshape(rows, 1, h, w)
                    yield split, start, data, path.name

    counts = {split: len(y) for split, y in labels.items()}
    return Source(spec.title, spec.classes, counts, labels, blocks, shape=spec.shape)


def cifar(spec: DataSpec, folder: Path) -> Source:
    """CIFAR's Python layout: a tar of pickled batches {data: uint8 [10000, 3072] channel by channel, labels: list}."""
    path = folder / spec.files[0].name
    batches = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
    labels: dict[str, list[np.ndarray]] = {split: [] for split in batches}
    with tarfile.open(path) as tar:
        for split, names in batches.items():
            labels[split] = [np.asarray(_cifar_batch(tar, name)[b"labels"], np.int64) for name in names]

    def blocks() -> Iterator[Block]:
        with tarfile.open(path) as tar:
            for split, names in batches.items():
                start = 0
                for name in names:
                    data = np.asarray(_cifar_batch(tar, name)[b"data"], np.uint8).reshape(-1, *spec.shape)
                    for i in range(0, len(data), BLOCK):
                        yield split, start + i, data[i : i + BLOCK], name
                    start += len(data)

    joined = {split: np.concatenate(parts) for split, parts in labels.items()}
    counts = {split: len(y) for split, y in joined.items()}
    return Source(spec.title, spec.classes, counts, joined, blocks, shape=spec.shape)


PARSERS: dict[str, Callable[[DataSpec, Path], Source]] = {"mnist": idx, "fashionmnist": idx, "cifar10": cifar}


def _idx_header(f, path: Path) -> tuple[int, ...]:
    zeros, kind, dims = struct.unpack(">HBB", f.read(4))
    if zeros != 0 or kind != 8:
        raise MissingError(f"`{path}` is not an IDX file of bytes")
    return struct.unpack(f">{dims}I", f.read(4 * dims))


def _idx_array(path: Path) -> np.ndarray:
    with gzip.open(path) as f:
        shape = _idx_header(f, path)
        return np.frombuffer(f.read(), np.uint8).reshape(shape)


def _cifar_batch(tar: tarfile.TarFile, name: str) -> dict:
    file = tar.extractfile(f"cifar-10-batches-py/{name}")
    if file is None:
        raise MissingError(f"`{tar.name}` has no `{name}`")
    return _Arrays(io.BytesIO(file.read()), encoding="bytes").load()


class _Arrays(pickle.Unpickler):
    """Unpickles dicts, lists, numbers and numpy arrays; nothing else can be named, so nothing can be run."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.numeric", "_frombuffer"), ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
    }  # fmt: skip

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise MissingError(f"a pickle asks for `{module}.{name}`: refused", hint="fetch the publisher's own file")
        if module.startswith("numpy.core") and not np.__version__.startswith("1."):
            module = module.replace("numpy.core", "numpy._core")
        if module.startswith("numpy._core") and np.__version__.startswith("1."):
            module = module.replace("numpy._core", "numpy.core")
        return super().find_class(module, name)
