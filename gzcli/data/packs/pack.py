"""Packs: data sets as uint8 memory maps, and the records that runs keep of them. No heavy import at the
top."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gzcli.core.errors import DamagedError, MissingError, UsageError
from gzcli.core.hints import Option, advice, setting
from gzcli.core.sections import Fit
from gzcli.core.types import DataInfo
from gzcli.core.units import by_sides, counted, middle
from gzcli.data.sets.registry import FURTHER, SPECS, extras_in_words
from gzcli.data.sets.registry import names as set_names
from gzcli.store.files import read_json, read_object, write_json
from gzcli.store.run_folder import Place, Run

if TYPE_CHECKING:
    import numpy as np

    from gzcli.data.packs.stream import Pictures
    from gzcli.data.readers.values import Values

SPLITS = ("train", "val", "test")
META_TYPES: dict[str, type] = {  # types of the keys that `meta.json` must have
    **dict.fromkeys(("fingerprint", "title"), str),
    **dict.fromkeys(("shape", "classes"), list),
    **dict.fromkeys(("counts", "sha256"), dict),
    **dict.fromkeys(("multilabel", "resized"), bool),
    "levels": int,
}


MAX_NAMED_CLASSES = 5  # maximum number of classes that a message names
RECORDED_KEYS = (
    "name",
    "digest",
    "shape",
    "classes",
    "counts",
    "extras",
    "covered",
)  # keys of a run's data record


@dataclass(frozen=True)
class PackFolder:
    """The folder of a pack: every name in it."""

    path: Path

    meta_file = Place("meta.json")  # description of the content; written last
    sheet_picture = Place("sheet.png")

    def array(self, split: str, kind: str = "") -> Path:
        """The file of the images, uint8 [N, C, H, W]. With a kind: the file of labels, further images
        (`control`), `sides`, or images with these sides (`aspect`), whose bytes fill the beginnings of rows
        of equal length."""
        return self.path / (f"{split}_{kind}.npy" if kind else f"{split}.npy")

    def texts(self, split: str, kind: str) -> Path:
        """The file of a list with a text for each image: `captions`, or the `names` of the user's files."""
        return self.path / f"{split}_{kind}.json"


@dataclass(frozen=True)
class PackMeta:
    """The content of a pack, as in its `meta.json`."""

    name: str  # the set's key
    title: str  # description of the set, or the path of the user's own
    fingerprint: str  # `fingerprint` of its sources
    shape: tuple[int, int, int]  # (C, H, W) of an image; for images of several sizes, the smallest H and W
    classes: tuple[str, ...]  # names of the classes; () without labels
    multilabel: bool  # whether an image may have any number of the classes
    counts: dict[str, int]  # images of "train", "val" and "test"
    levels: int  # grey levels of the source, 2 … 256
    resized: bool  # whether any image was resized
    sha256: dict[str, str]  # checksums of its files
    digest: str  # hash of the content
    source_channels: int  # before packing
    fit: Fit = "crop"  # how images were resized
    streamed: dict[str, Any] | None = None  # the `Decoding` of a pack that contains only the places of images
    skipped: tuple[str, ...] = ()  # messages of images that do not decode
    extras: tuple[str, ...] = ()  # companions of each image, of EXTRAS
    notes: tuple[str, ...] = ()  # other omissions from the set, with reasons
    covered: bool = False  # whether the splits that gz drew cover the classes
    mixed: bool = False  # whether the images have several sizes
    facts: dict[str, Any] | None = None  # `open.Facts` of the user's own set
    values: dict[str, Any] | None = None  # `readers.values.Values` of a set that is not of 8-bit images

    @classmethod
    def read(cls, pack: PackFolder) -> PackMeta | None:
        """The content of a set's pack; None if it is damaged. Older packs lack some of the keys."""
        with suppress(DamagedError, AttributeError, KeyError, TypeError, ValueError):
            return cls._of(read_object(pack.meta_file), pack)
        return None

    @classmethod
    def _of(cls, meta: dict[str, Any], pack: PackFolder) -> PackMeta:
        """The content that a parsed `meta.json` describes. Raises an error unless it is that of a pack."""
        sizes = [*map(meta["counts"].get, SPLITS), *meta["shape"]]
        if not all(isinstance(meta[key], kind) for key, kind in META_TYPES.items()):
            raise TypeError("a value has another type")
        if len(meta["shape"]) != 3 or not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise ValueError("`counts` and `shape` are not numbers")
        values = meta.get("values") or {}
        beside = ["_names.json"]
        if values.get("levels") and values["channels"] in (1, 3):
            beside.append("_values.npy")  # older packs had only 8-bit images
        content = sorted(item for item in meta["sha256"].items() if not item[0].endswith(tuple(beside)))
        name = pack.path.parent.name
        channels = SPECS[name].channels if name in SPECS else meta.get("source_channels")
        captioned = ["caption"] if "train_captions.json" in meta["sha256"] else []
        row: dict[str, Any] = {"extras": captioned}
        row |= {key: meta[key] for key in cls.__dataclass_fields__ if key in meta}
        row |= {"digest": hashlib.sha256(repr(content).encode()).hexdigest()[:16], "name": name}
        row |= {"source_channels": channels or meta["shape"][0]}
        row = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
        return cls(**row)

    @property
    def reference(self) -> str:
        """The name or path with which verbs open the set."""
        return self.name if self.name in set_names() else self.title

    @property
    def channels(self) -> int:
        """The channels of the set: those of its values, of which an image may show only some."""
        return self.values["channels"] if self.values else self.shape[0]

    @property
    def words(self) -> str:
        """The content in words: `216 train, 24 val, 80 test; 10 classes airplane to truck; 4 files …
        skipped`."""
        splits = ", ".join(f"{n:,} {split}" for split, n in self.counts.items() if n)
        is_short = len(self.classes) < 4
        names = ", ".join(self.classes) if is_short else f"{self.classes[0]} to {self.classes[-1]}"
        kind = "attributes" if self.multilabel else "classes" if len(self.classes) != 1 else "class"
        classes = f"{len(self.classes):,} {kind} {names}" if self.classes else "no classes"
        bad = [f"{counted(len(self.skipped), 'unreadable image')} skipped"] if self.skipped else []
        extras = [f"with {extras_in_words(self.extras)}"] if self.extras else []
        return "; ".join([splits, classes, *extras, *self.notes, *bad])


class Pack:
    """A packed data set, returned by `gzcli.open_data`. The arrays of its splits are memory maps, which all
    processes share. With `patch`, the images are patches of that side: random ones in training, otherwise the
    middle ones.

    meta: metadata of the pack.
    """

    use: object = None  # protects the set from removal for the lifetime of the pack

    def __init__(self, folder: Path, meta: PackMeta, patch: int | None = None):
        self.folder, self.meta, self.patch = folder, meta, patch
        self._files = PackFolder(folder)
        self._open: dict[Path, np.ndarray] = {}
        if patch:
            self._refuse_smaller(patch)
            self.meta = replace(meta, shape=(meta.shape[0], patch, patch))

    @property
    def name(self) -> str:
        """The set's name in ids of runs."""
        return self.meta.name

    @property
    def reference(self) -> str:
        """The name or path with which verbs open the set."""
        return self.meta.reference

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return self.meta.shape

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; () if the set has no labels."""
        return self.meta.classes

    def __repr__(self) -> str:
        return f"<gzcli.Data {self.name}: {self.meta.words}>"

    def images(self, split: str = "train", *, uncut: bool = False) -> np.ndarray | Pictures:
        """The images of "train", "val" or "test", uint8 [N, C, H, W].

        Changes are not written back. Images of a streamed set are decoded when their rows are read.

        uncut: whether to return whole images instead of patches; ignored for a streamed set.
        """
        if self.meta.streamed is None:
            return self._load(split) if uncut else self._cut(self._load(split))
        from gzcli.data.packs.stream import Pictures
        from gzcli.data.readers.pictures import Decoding

        return Pictures(self.folder, split, self.meta.shape, Decoding(**self.meta.streamed), self.patch)

    def aspects(self, split: str) -> tuple[np.ndarray, np.ndarray] | None:
        """For images in several shapes: their rows, uint8 [N, C, H, W], and their sides (width, height),
        int32 [N, 2]. None for a pack in one shape."""
        if self.meta.fit != "aspect":
            return None
        return self._load(split, "aspect"), self._load(split, "sides")

    def labels(self, split: str = "train") -> np.ndarray | None:
        """The labels, int64 [N], or uint8 [N, K] for a multi-label set; None without labels."""
        return self._load(split, "labels") if self.meta.classes else None

    def captions(self, split: str) -> list[str] | None:
        """A text for each image, or None."""
        return self._texts(split, "captions")

    def names(self, split: str) -> list[str] | None:
        """The file name of each of the user's images, relative to the set's path."""
        return self._texts(split, "names")

    def _texts(self, split: str, kind: str) -> list[str] | None:
        """A text for each image, or None. Raises DamagedError for any other content of the file."""
        file, hint = self._files.texts(split, kind), f"gz data remove {self.meta.reference}"
        texts = read_json(file, hint)
        n = self.meta.counts[split]
        if texts is None or (isinstance(texts, list) and list(map(type, texts)) == [str] * n):
            return texts
        raise DamagedError(f"`{file}` is damaged: it is not a list of {n:,} texts", hint=hint)

    def further(self, split: str, *, uncut: bool = False) -> dict[str, np.ndarray]:
        """The further images by kind (`control`, `before`), uint8 [N, C, H, W]; {} if there are none."""
        arrays = {kind: self._load(split, kind) for kind in self.meta.extras if kind in FURTHER}
        return arrays if uncut else {kind: self._cut(images) for kind, images in arrays.items()}

    def seen(self, levels: int | None) -> Pack:
        """The pack that a model with these grey levels is trained on: the values of the set if it has any,
        otherwise the images. If the images show all channels, a model with at most 256 levels is trained on
        them. Raises UsageError for levels that the values do not have."""
        if self.meta.values is None:
            return self
        channels, depth = self.meta.values["channels"], self.meta.values["levels"]
        if levels in (None, depth) or (depth == 256 and levels and levels < depth):
            return ValuePack(self)
        if channels in (1, 3) and levels and levels <= 256:
            return self
        have = "are real numbers" if depth is None else f"have {depth:,} levels"
        hint = advice("use {}", setting("data.levels", None))
        raise UsageError(
            f"`data.levels: {levels}` does not fit `{self.meta.reference}`, whose values {have}", hint=hint
        )

    def info(self, levels: int | None = None, steps: int = 0) -> DataInfo:
        """The description of the data with which a model is built, by default with the grey levels of the
        source."""
        m = self.meta
        return DataInfo(m.shape, levels or m.levels, m.classes, m.multilabel, m.counts["train"], steps)

    def _cut(self, images: np.ndarray) -> np.ndarray:
        """The middle patches of images [N, C, H, W], a view of them."""
        if self.patch is None:
            return images
        y, x = (middle(side, self.patch) for side in images.shape[2:])
        return images[:, :, y, x]

    def _refuse_smaller(self, patch: int) -> None:
        """Raises UsageError with the name of an image smaller than the patch."""
        _, height, width = self.meta.shape
        least = min(height, width)
        if patch <= least:
            return
        small_ones = f"the images of `{self.meta.title}` ({width}×{height}) are"
        for split in SPLITS if self.meta.mixed else ():
            sides, names = self._load(split, "sides"), self.names(split)
            small = (sides < patch).any(1).nonzero()[0]
            if len(small) and names is not None:
                width, height = sides[small[0]].tolist()
                more = len(small) - 1
                remainder = f" and {more:,} more {split} images are" if more else " is"
                small_ones = f"`{names[small[0]]}` of `{self.meta.title}` ({width}×{height}){remainder}"
                break
        hint = advice(
            "use {}, or enlarge them by {}",
            setting("data.augment", f"[patch={least}]"),
            setting("data.size", patch),
        )
        raise UsageError(f"{small_ones} smaller than the patch of {patch}×{patch}", hint=hint)

    def _load(self, split: str, kind: str = "") -> np.ndarray:
        import numpy as np

        file = self._files.array(split, kind)
        if file not in self._open:  # an empty file cannot be mapped
            self._open[file] = np.load(file, mmap_mode="c" if self.meta.counts[split] else None)
        return self._open[file]


class ValuePack(Pack):
    """A pack whose images are the values of a set: bytes, or float32 [N, C, H, W] scaled to [-1, 1]."""

    def __init__(self, pictures: Pack):
        super().__init__(pictures.folder, pictures.meta)
        values, (_, *sides) = pictures.meta.values or {}, pictures.meta.shape
        self.meta = replace(pictures.meta, shape=(values["channels"], *sides), values=None)
        self.patch, self.use, self.levels = pictures.patch, pictures.use, values["levels"]
        self.stored, self.shown_as = values, values

    def scaled_as(self, values: Values) -> ValuePack:
        """The same real numbers, rescaled so that −1 and 1 have the meaning that they have in a model's
        training set."""
        self.shown_as = asdict(values)
        return self

    def images(self, split: str = "train", *, uncut: bool = False) -> np.ndarray:
        values, (source, target) = self._load(split, "values"), map(_ends, (self.stored, self.shown_as))
        if self.levels is None and source != target:
            from gzcli.data.readers.values import Values

            values = Values.of(self.shown_as).scaled(Values.of(self.stored).restored(values))
        return values if uncut else self._cut(values)

    def info(self, levels: int | None = None, steps: int = 0) -> DataInfo:
        return replace(super().info(1, steps), levels=levels or self.levels)


def _ends(values: Mapping[str, Any]) -> list[float]:
    return [*values["low"], *values["high"]]


def values_of(pack: Pack, levels: int | None) -> Values | None:
    """The kind of values on which a model with these grey levels is trained; None for 8-bit images."""
    from gzcli.data.readers.values import Values

    return None if pack.seen(levels) is pack else Values.of(pack.meta.values or {})


# --- the record of a run's data: the user's files may change after a training ---


def record_data(folder: Path, meta: PackMeta) -> None:
    """Records the data of the run in `folder`, unless that was done before."""
    file = Run(folder).environment_file
    env = Run(folder).environment
    if not env.get("data"):
        write_json(file, env | {"data": {key: getattr(meta, key) for key in RECORDED_KEYS}})


def check_unchanged(folder: Path, meta: PackMeta) -> None:
    """Raises MissingError, which lists the changes, if a set has changed since the run in `folder` recorded
    it."""
    before = Run(folder).environment.get("data") or {}
    if before.get("name") != meta.name or before.get("digest") == meta.digest:
        return
    now = {
        key: list(value) if isinstance(value := getattr(meta, key), tuple) else value for key in RECORDED_KEYS
    }
    try:
        changes = ", ".join(_changes(before, now))
    except (KeyError, TypeError, ValueError):  # a damaged record does not end a training
        return
    hint = advice("restore the images, or train again without {}", Option("resume"))
    raise MissingError(f"`{meta.title}` has changed since `{folder.name}` was trained: {changes}", hint=hint)


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The differences between two records, for the user."""
    changes = []
    gone = [name for name in before["classes"] if name not in now["classes"]]
    added = [name for name in now["classes"] if name not in before["classes"]]
    for change, names in (("missing", gone), ("new", added)):
        if names:
            remainder = (
                f" and {len(names) - MAX_NAMED_CLASSES} more" if len(names) > MAX_NAMED_CLASSES else ""
            )
            changes.append(
                f"{change} classes {' '.join(f'`{name}`' for name in names[:MAX_NAMED_CLASSES])}{remainder}"
            )
    for split in SPLITS:
        if before["counts"][split] != now["counts"][split]:
            changes.append(f"{now['counts'][split]:,} {split} images instead of {before['counts'][split]:,}")
    if before["shape"] != now["shape"]:
        old, new = (by_sides(row["shape"][::-1]) for row in (before, now))
        changes.append(f"images of {new} instead of {old}")
    if before["extras"] != now["extras"]:
        old, new = (", ".join(row["extras"]) or "nothing" for row in (before, now))
        changes.append(f"{new} beside each image instead of {old}")
    return changes or ["different pixels, labels or texts"]
