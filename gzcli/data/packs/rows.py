"""A `.npy` file of uint8 rows that is written row by row."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np


class Rows:
    """A file of rows that are written in any order. They are written, not mapped: so resident memory does not
    grow with the file.

    path: the file.
    n: rows.
    shape: of a row.
    """

    def __init__(self, path: Path, n: int, shape: tuple[int, ...]):
        self.row = int(np.prod(shape))
        self.seen = np.zeros(n, bool)
        self.file = path.open("wb+")
        np.lib.format.write_array_header_1_0(
            self.file, {"descr": "|u1", "fortran_order": False, "shape": (n, *shape)}
        )
        self.start = self.file.tell()
        self.file.truncate(self.start + n * self.row)
        self.file.flush()

    def put(self, row: int, image: np.ndarray) -> None:
        os.pwrite(self.file.fileno(), np.ascontiguousarray(image).tobytes(), self.start + int(row) * self.row)
        self.seen[row] = True

    def close(self) -> None:
        self.file.close()


def keep(path: Path, rows: np.ndarray) -> None:
    """Rewrites a `.npy` file with these rows only."""
    old, part = np.load(path, mmap_mode="r"), path.with_suffix(".part")
    new = Rows(part, len(rows), old.shape[1:])
    for to, row in enumerate(rows):
        new.put(to, old[row])
    new.close()
    os.replace(part, path)
