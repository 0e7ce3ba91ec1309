"""A packed data set in Python: `Data`."""

from __future__ import annotations

import numpy as np

from gzcli.data.packs.pack import Pack
from gzcli.data.packs.stream import Pictures


class Data:
    """A packed data set.

    pack: its arrays and metadata.
    """

    def __init__(self, pack: Pack):
        self.pack = pack

    @property
    def name(self) -> str:
        """Its name in ids of runs."""
        return self.pack.meta.name

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return self.pack.meta.shape

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of its classes; () where it has no labels."""
        return self.pack.meta.classes

    def images(self, split: str = "train") -> np.ndarray | Pictures:
        """The images of "train", "val" or "test", uint8 [N, C, H, W].

        They are a memory-map. Those of a streamed set are decoded as rows of them are asked for.
        """
        return self.pack.images(split)

    def labels(self, split: str = "train") -> np.ndarray | None:
        """int64 [N], uint8 [N, K] where several classes hold at once, or None."""
        return self.pack.labels(split)

    def __repr__(self) -> str:
        return f"<gzcli.Data {self.name}: {self.pack.meta.words}>"
