"""Packs: a set as uint8 memory-maps in the cache, opened by every process of a run. No heavy import at the
top."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gzcli.core.errors import UsageError
from gzcli.core.types import DataInfo
from gzcli.data.packs.forms import Decoding
from gzcli.data.readers.conditions import FURTHER, in_words
from gzcli.data.readers.kinds import counted
from gzcli.store.files import read_json

if TYPE_CHECKING:
    import numpy as np

    from gzcli.data.packs.stream import Pictures


def middle(side: int, patch: int) -> slice:
    """The middle `patch` pixels of a side."""
    start = (side - patch) // 2
    return slice(start, start + patch)


@dataclass(frozen=True)
class PackMeta:
    """What a pack holds.

    name: the set's key.
    title: what it shows, or the path of the user's own.
    shape: (C, H, W) of an image.
    classes: names of the classes; () without labels.
    multilabel: whether an image may have any number of the classes.
    counts: images of "train", "val" and "test".
    levels: grey levels of the source, 2 … 256.
    resized: whether any image was resized.
    digest: hash of the content.
    streamed: whether the pack holds no pixels, only where the pictures lie.
    skipped: messages of pictures that do not decode.
    source_channels: channels of the source, which may differ from those of `shape`.
    extras: what belongs to each image, of `conditions.EXTRAS`.
    notes: what else was left out of the set, and why.
    mixed: whether the images have several sizes; then `shape` has the least height and width.
    """

    name: str
    title: str
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    multilabel: bool
    counts: dict[str, int]
    levels: int
    resized: bool
    digest: str
    streamed: bool = False
    skipped: tuple[str, ...] = ()
    source_channels: int = 1
    extras: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    mixed: bool = False

    @property
    def words(self) -> str:
        """For people: `216 train, 24 val, 80 test; 10 classes airplane to truck; 4 files … skipped`."""
        splits = ", ".join(f"{n:,} {split}" for split, n in self.counts.items() if n)
        few = ", ".join(self.classes) if len(self.classes) < 4 else f"{self.classes[0]} to {self.classes[-1]}"
        kind = "attributes" if self.multilabel else "classes" if len(self.classes) != 1 else "class"
        classes = f"{len(self.classes):,} {kind} {few}" if self.classes else "no classes"
        bad = [f"{counted(len(self.skipped), 'unreadable picture')} left out"] if self.skipped else []
        extras = [f"with {in_words(self.extras)}"] if self.extras else []
        return "; ".join([splits, classes, *extras, *self.notes, *bad])


class Pack:
    """A packed set. Splits are "train", "val" and "test"; arrays are memory-maps, shared by all processes.

    folder: its folder.
    meta: what it holds.
    how: how the pictures of a streamed set are decoded; None: the set is not streamed.
    patch: side of the patches of the images that are used; None: whole images are.

    Raises UsageError that names an image smaller than the patch.
    """

    use: object = None  # what keeps the set from being removed for as long as the pack is there

    def __init__(self, folder: Path, meta: PackMeta, how: Decoding | None = None, patch: int | None = None):
        self.folder, self.meta, self._how, self.patch = folder, meta, how, patch
        self._open: dict[str, np.ndarray] = {}
        if patch:
            self._check_patch(patch)
            self.meta = replace(meta, shape=(meta.shape[0], patch, patch))

    def cut(self, patch: int | None) -> Pack:
        """The pack of which patches of this side are used. Raises UsageError that names an image smaller than
        them."""
        return Pack(self.folder, self.meta, self._how, patch) if patch else self

    def images(self, split: str, *, uncut: bool = False) -> np.ndarray | Pictures:
        """uint8 [N, C, H, W]; changes to it are not written back. Those of a streamed set are decoded as rows
        of them are asked for.

        uncut: whether images are whole of which patches are used, as those of a streamed set never are; if
          not, they are their middle patches.
        """
        if self._how is None:
            return self._load(split) if uncut else self._cut(self._load(split))
        from gzcli.data.packs.stream import Pictures

        return Pictures(self.folder, split, self.meta.shape, self._how, self.patch)

    def labels(self, split: str) -> np.ndarray | None:
        """int64 [N], uint8 [N, K] (multi-label), or None."""
        return self._load(f"{split}_labels") if self.meta.classes else None

    def captions(self, split: str) -> list[str] | None:
        """A text for each image, or None."""
        return read_json(self.folder / f"{split}_captions.json")

    def names(self, split: str) -> list[str] | None:
        """What each of the user's pictures is called at its path."""
        return read_json(self.folder / f"{split}_names.json")

    def further(self, split: str, *, uncut: bool = False) -> dict[str, np.ndarray]:
        """Further pictures of each image by kind (`control`, `before`), uint8 [N, C, H, W]; {} without.

        uncut: as in `images`.
        """
        found = {kind: self._load(f"{split}_{kind}") for kind in self.meta.extras if kind in FURTHER}
        return found if uncut else {kind: self._cut(images) for kind, images in found.items()}

    def info(self, levels: int | None = None, steps: int = 0) -> DataInfo:
        """The description of the data that a model is built for.

        levels: grey levels, 2 … 256; None: those of the source.
        steps: length of the run.
        """
        meta = self.meta
        return DataInfo(
            meta.shape, levels or meta.levels, meta.classes, meta.multilabel, meta.counts["train"], steps
        )

    def _cut(self, images: np.ndarray) -> np.ndarray:
        """The middle patches of images [N, C, H, W], a view of them."""
        if self.patch is None:
            return images
        y, x = (middle(side, self.patch) for side in images.shape[2:])
        return images[:, :, y, x]

    def _check_patch(self, patch: int) -> None:
        """Raises UsageError that names an image smaller than the patch."""
        _, height, width = self.meta.shape
        least = min(height, width)
        if patch <= least:
            return
        what = f"the images of `{self.meta.title}` are {width}×{height}"
        if self.meta.mixed:
            named = (self._smaller(patch, split) for split in self.meta.counts)
            what = next(filter(None, named), what)
        raise UsageError(
            f"{what}: smaller than the patch of {patch}×{patch}",
            hint=f"`--set 'data.augment=[patch={least}]'`, or `--set data.size={patch}`, which enlarges them",
        )

    def _smaller(self, patch: int, split: str) -> str | None:
        """Names the first of the split's images that is smaller than the patch."""
        import numpy as np

        had, names = np.load(self.folder / f"{split}_sides.npy"), self.names(split)
        found = np.flatnonzero((had < patch).any(1))
        if not len(found) or names is None:
            return None
        width, height = had[found[0]].tolist()
        more = f", and {len(found) - 1:,} more of the {split} split are small" if len(found) > 1 else ""
        return f"`{names[found[0]]}` of `{self.meta.title}` is {width}×{height}{more}"

    def _load(self, name: str) -> np.ndarray:
        import numpy as np

        if name not in self._open:
            empty = not self.meta.counts[name.split("_")[0]]  # an empty file cannot be mapped
            self._open[name] = np.load(self.folder / f"{name}.npy", mmap_mode=None if empty else "c")
        return self._open[name]
