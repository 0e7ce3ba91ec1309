"""Packs: a set as uint8 memory-maps in the cache, opened by every process of a run. Importing this imports no
numpy."""

from __future__ import annotations

import errno
import hashlib
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gzcli.data.conditions import FURTHER, in_words
from gzcli.data.kinds import counted
from gzcli.data.library import OwnSet, data_key, locate
from gzcli.data.make import Report, Say, fingerprint, make, pack_limit
from gzcli.data.specs import DataSpec
from gzcli.errors import MissingError, UsageError
from gzcli.store.files import lock, read_json
from gzcli.store.paths import cache_dir
from gzcli.types import DataInfo

if TYPE_CHECKING:
    import numpy as np

    from gzcli.data.stream import Pictures

__all__ = ["Pack", "PackMeta", "data_key", "find_pack", "open_pack", "pack_limit", "peek"]


@dataclass(frozen=True)
class PackMeta:
    """What a pack holds; `shape` is (C, H, W), `levels` the grey levels of the source, `digest` names the
    content.

    A streamed set has no pixels here, only where its pictures lie; `skipped` are messages of pictures that do
    not decode,
    `notes` of what else was left out of the set.
    """

    name: str
    title: str
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    multilabel: bool
    counts: dict[str, int]  # "train", "val", "test"
    levels: int
    resized: bool
    digest: str
    streamed: bool = False
    skipped: tuple[str, ...] = ()
    source_channels: int = 1  # where `shape` may have others
    extras: tuple[str, ...] = ()  # what comes with each image: "caption", "control", "before"
    notes: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """216 train, 24 val, 80 test; 10 classes airplane … truck; 4 files of unknown kinds skipped"""
        splits = ", ".join(f"{n:,} {split}" for split, n in self.counts.items() if n)
        few = ", ".join(self.classes) if len(self.classes) < 4 else f"{self.classes[0]} … {self.classes[-1]}"
        kind = "attributes" if self.multilabel else "classes" if len(self.classes) != 1 else "class"
        classes = f"{len(self.classes):,} {kind} {few}" if self.classes else "no classes"
        bad = [f"{counted(len(self.skipped), 'picture')} left out that do not decode"] if self.skipped else []
        extras = [f"with {in_words(self.extras)}"] if self.extras else []
        return "; ".join([splits, classes, *extras, *self.notes, *bad])


class Pack:
    """A packed set. Splits are "train", "val" and "test"; arrays are memory-maps, shared by all processes.

    `how` are the keywords of `pictures.decode` for a streamed set, whose pictures are decoded as they are
    asked for.
    """

    def __init__(self, folder: Path, meta: PackMeta, how: dict[str, Any] | None = None):
        self.folder, self.meta, self._how = folder, meta, how
        self._open: dict[str, np.ndarray] = {}

    def images(self, split: str) -> np.ndarray | Pictures:
        """uint8 [N, C, H, W]; changes to it are not written back. A streamed set's are alike, indexed by
        rows."""
        if self._how is None:
            return self._load(split)
        from gzcli.data.stream import Pictures

        return Pictures(self.folder, split, self.meta.shape, self._how)

    def labels(self, split: str) -> np.ndarray | None:
        """int64 [N], uint8 [N, K] (multi-label), or None."""
        return self._load(f"{split}_labels") if self.meta.classes else None

    def captions(self, split: str) -> list[str] | None:
        """A text for each image, or None."""
        return read_json(self.folder / f"{split}_captions.json")

    def names(self, split: str) -> list[str] | None:
        """What each of the user's pictures is called at its path."""
        return read_json(self.folder / f"{split}_names.json")

    def further(self, split: str) -> dict[str, np.ndarray]:
        """Further pictures of each image, uint8 [N, C, H, W] as the images: its `control`, its `before`; {}
        without."""
        return {kind: self._load(f"{split}_{kind}") for kind in self.meta.extras if kind in FURTHER}

    def info(self, levels: int | None = None, steps: int = 0) -> DataInfo:
        """What a model may know; `levels` None means the source's own."""
        meta = self.meta
        return DataInfo(
            meta.shape, levels or meta.levels, meta.classes, meta.multilabel, meta.counts["train"], steps
        )

    def _load(self, name: str) -> np.ndarray:
        import numpy as np

        if name not in self._open:
            empty = not self.meta.counts[name.split("_")[0]]  # an empty file cannot be mapped
            self._open[name] = np.load(self.folder / f"{name}.npy", mmap_mode=None if empty else "c")
        return self._open[name]


def peek(what: str | Path, *, size: int | None = None, channels: int | None = None) -> PackMeta | None:
    """What the pack of a set holds, from its JSON alone; None where it is not packed, or packed from other
    files."""
    packed = find_pack(sized(locate(what), size), size, channels)
    return packed.meta if packed else None


def open_pack(
    what: str | Path,
    *,
    size: int | None = None,
    channels: int | None = None,
    fetch: bool = True,
    foreign: bool = False,
    say: Say = lambda text: None,
    progress: Report = lambda done, total: None,
) -> Pack:
    """The pack of a set or path, made now if need be: fetched (up to 200 MB, if allowed) and packed, under a
    lock. A set that would be larger than `GZ_PACK_LIMIT` is not packed but streamed.

    size: side of the images (default: as they are); channels: 1 or 3. foreign: the user's own set is one to
    be scored only, whose `test` split is its own or, where it has none, all images. Several processes may
    call it at once. Raises UsageError (unknown name, mixed sizes, size out of range) and MissingError (files
    not there, not readable).
    """
    if channels not in (None, 1, 3):
        raise UsageError(f"`data.channels` is 1 (grey) or 3 (RGB), not {channels}")
    if size is not None and not 4 <= size <= 1024:
        raise UsageError(f"`data.size` is between 4 and 1024 pixels, not {size}")
    found = sized(locate(what), size)
    foreign = foreign and isinstance(found, OwnSet)
    if packed := find_pack(found, size, channels, foreign):
        return packed
    name = found.title if isinstance(found, OwnSet) else found.name
    folder = _folder(found, size, channels, foreign)
    try:
        waiting = f"another process packs `{name}`: waiting"
        with lock(folder.with_name(f".{folder.name}.lock"), on_wait=lambda: say(waiting)):
            if (packed := find_pack(found, size, channels, foreign)) is None:
                make(found, folder, size, channels, fetch, foreign, say, progress)
                if packed := find_pack(found, size, channels, foreign):
                    say(f"`{name}`: {packed.meta.words}")
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        hint = "free some space, or set `GZ_HOME` to a folder on another disk"
        raise MissingError(f"`{name}` could not be packed into `{folder}`: {e.strerror}", hint=hint) from e
    if packed is None:
        raise MissingError(
            f"`{name}` changed while it was packed", hint="try again when its files are at rest"
        )
    return packed


def sized(found: DataSpec | OwnSet, size: int | None) -> DataSpec | OwnSet:
    """The set in its publisher's version for this size, where there are several."""
    return found.sized(size) if isinstance(found, DataSpec) else found


def find_pack(
    found: DataSpec | OwnSet,
    size: int | None = None,
    channels: int | None = None,
    foreign: bool = False,
) -> Pack | None:
    """The pack of this size and these channels, if there is one of the files as they are now.

    One whose size or channels were not asked for serves also whoever asks for the very ones that it has.
    """
    size, channels = size or found.size, channels or found.channels
    asked = product(dict.fromkeys((size, found.size)), dict.fromkeys((channels, found.channels)))
    folders = (_folder(found, *pair, foreign) for pair in asked)
    metas = [(folder, raw) for folder in folders if (raw := read_json(folder / "meta.json"))]
    now = fingerprint(found) if metas else None
    for folder, raw in metas:
        if now in (raw["fingerprint"], None):
            c, h, w = raw["shape"]
            if raw.get("streamed") and sum(raw["counts"].values()) * c * h * w <= pack_limit():
                continue  # the limit was raised
            if raw.get("skipped") and not found.skip_bad:
                continue  # bad pictures may not be skipped any more
            if size in (None, h) and h == w and channels in (None, c):
                return Pack(folder, _meta(found, raw), raw.get("streamed"))
    return None


def _folder(found: DataSpec | OwnSet, size: int | None, channels: int | None, foreign: bool) -> Path:
    """Where the pack of this size and these channels lies: `packs/mnist/28x1`,
    `packs/my-photos-3f2a1c/ownxown`."""
    key = found.key if isinstance(found, OwnSet) else found.name
    end = "-foreign" if foreign else ""
    return cache_dir(
        "packs", key, f"{size or found.size or 'own'}x{channels or found.channels or 'own'}{end}"
    )


def _meta(found: DataSpec | OwnSet, raw: dict) -> PackMeta:
    name = found.key if isinstance(found, OwnSet) else found.name
    content = sorted(item for item in raw["sha256"].items() if not item[0].endswith("_names.json"))
    digest = hashlib.sha256(repr(content).encode()).hexdigest()[:16]
    captioned = ("caption",) if "train_captions.json" in raw["sha256"] else ()  # older packs do not say it
    return PackMeta(
        name,
        raw["title"],
        tuple(raw["shape"]),
        tuple(raw["classes"]),
        raw["multilabel"],
        raw["counts"],
        raw["levels"],
        raw["resized"],
        digest,
        bool(raw.get("streamed")),
        tuple(raw.get("skipped", ())),
        raw.get("source_channels", raw["shape"][0]) if isinstance(found, OwnSet) else found.channels,
        tuple(raw.get("extras", captioned)),
        tuple(raw.get("notes", ())),
    )
