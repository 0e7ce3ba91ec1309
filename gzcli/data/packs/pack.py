"""Packs: data sets as uint8 memory maps in the cache; how they are read, found, and protected from removal.
No heavy import at the top."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import itertools
import math
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gzcli.core.errors import DamagedError, MissingError, UsageError
from gzcli.core.sections import Fit
from gzcli.core.types import DataInfo
from gzcli.core.units import as_size, counted, middle, number_in
from gzcli.data.readers.images import walk
from gzcli.data.sets.names import DataSet
from gzcli.data.sets.names import names as set_names
from gzcli.data.sets.registry import FURTHER, DataSpec, Form, extras_in_words
from gzcli.store.files import is_locked, lock, read_json, read_object
from gzcli.store.paths import cache_dir
from gzcli.store.run_folder import Place

if TYPE_CHECKING:
    import numpy as np

    from gzcli.data.packs.stream import Pictures

SPLITS = ("train", "val", "test")
RULE, OWN_RULE = 2, 7  # versions of packing, of known sets and of the user's images: older packs are remade
META_TYPES: dict[str, type] = {  # of the keys that `meta.json` must have
    **dict.fromkeys(("fingerprint", "title"), str),
    **dict.fromkeys(("shape", "classes"), list),
    **dict.fromkeys(("counts", "sha256"), dict),
    **dict.fromkeys(("multilabel", "resized"), bool),
    "levels": int,
}
LONGEST_HEAD = 4096  # bytes of the head of an array
PACK_LIMIT = 32_000_000_000  # bytes: larger sets stream, unless `GZ_PACK_LIMIT` says otherwise
WAIT = "stop it first, or wait for it"
_uses = itertools.count()


@dataclass(frozen=True)
class PackFolder:
    """The folder of a pack: every name in it."""

    path: Path

    meta_file = Place("meta.json")  # what the pack holds; written last
    sheet_picture = Place("sheet.png")

    def array(self, split: str, kind: str = "") -> Path:
        """The images uint8 [N, C, H, W]; of a kind: labels, further pictures (`control`), `sides`, or images
        in shapes of these sides (`aspect`), whose bytes fill the beginnings of rows of the same length."""
        return self.path / (f"{split}_{kind}.npy" if kind else f"{split}.npy")

    def texts(self, split: str, kind: str) -> Path:
        """A list with a text for each image: `captions`, or `names` of the user's files."""
        return self.path / f"{split}_{kind}.json"


@dataclass(frozen=True)
class PackMeta:
    """The content of a pack, as in its `meta.json`."""

    name: str  # the set's key
    title: str  # what it shows, or the path of the user's own
    fingerprint: str  # of its sources, by `fingerprint`
    shape: tuple[int, int, int]  # (C, H, W) of an image; of images of several sizes the least H and W
    classes: tuple[str, ...]  # their names; () without labels
    multilabel: bool  # whether an image may have any number of the classes
    counts: dict[str, int]  # images of "train", "val" and "test"
    levels: int  # grey levels of the source, 2 … 256
    resized: bool  # whether any image was resized
    sha256: dict[str, str]  # checksums of its files
    digest: str  # hash of the content
    source_channels: int  # before packing
    fit: Fit = "crop"  # how images were resized
    streamed: dict[str, Any] | None = None  # the `Decoding` of a pack that holds only the places of pictures
    skipped: tuple[str, ...] = ()  # messages of pictures that do not decode
    extras: tuple[str, ...] = ()  # companions of each image, of EXTRAS
    notes: tuple[str, ...] = ()  # further omissions from the set, with reasons
    mixed: bool = False  # whether the images have several sizes
    facts: dict[str, Any] | None = None  # `open.Facts` of the user's own set

    @classmethod
    def read(cls, pack: PackFolder, data: DataSet) -> PackMeta | None:
        """The content of a set's pack; None if it is damaged. Older packs lack some of the keys."""
        try:
            meta = read_object(pack.meta_file)
            if not all(isinstance(meta[key], kind) for key, kind in META_TYPES.items()):
                return None
        except (DamagedError, KeyError):
            return None
        content = sorted(item for item in meta["sha256"].items() if not item[0].endswith("_names.json"))
        channels = data.channels if isinstance(data, DataSpec) else meta.get("source_channels")
        captioned = ["caption"] if "train_captions.json" in meta["sha256"] else []
        row: dict[str, Any] = {"extras": captioned}
        row |= {key: meta[key] for key in cls.__dataclass_fields__ if key in meta}
        row |= {"digest": hashlib.sha256(repr(content).encode()).hexdigest()[:16], "name": data.key}
        row |= {"source_channels": channels or meta["shape"][0]}
        row = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
        return cls(**row)

    @property
    def words(self) -> str:
        """For people: `216 train, 24 val, 80 test; 10 classes airplane to truck; 4 files … skipped`."""
        splits = ", ".join(f"{n:,} {split}" for split, n in self.counts.items() if n)
        is_short = len(self.classes) < 4
        names = ", ".join(self.classes) if is_short else f"{self.classes[0]} to {self.classes[-1]}"
        kind = "attributes" if self.multilabel else "classes" if len(self.classes) != 1 else "class"
        classes = f"{len(self.classes):,} {kind} {names}" if self.classes else "no classes"
        bad = [f"{counted(len(self.skipped), 'unreadable picture')} left out"] if self.skipped else []
        extras = [f"with {extras_in_words(self.extras)}"] if self.extras else []
        return "; ".join([splits, classes, *extras, *self.notes, *bad])


class Pack:
    """A packed data set, as `gzcli.open_data` returns it.

    The arrays of its splits are memory-maps, which all processes share. With `patch` the images are patches
    of that side: random ones in training, elsewhere the middle ones.

    meta: what it holds.
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
        """Its name in ids of runs."""
        return self.meta.name

    @property
    def reference(self) -> str:
        """The name or path by which verbs open it."""
        return self.meta.name if self.meta.name in set_names() else self.meta.title

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return self.meta.shape

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of its classes; () where it has no labels."""
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
        """The rows of images in shapes of their own, uint8 [N, C, H, W], and these shapes, int32 [N, 2], each
        (width, height); None of a pack in one shape."""
        if self.meta.fit != "aspect":
            return None
        return self._load(split, "aspect"), self._load(split, "sides")

    def labels(self, split: str = "train") -> np.ndarray | None:
        """int64 [N], or uint8 [N, K] of a multi-label set, or None."""
        return self._load(split, "labels") if self.meta.classes else None

    def captions(self, split: str) -> list[str] | None:
        """A text for each image, or None."""
        return read_json(self._files.texts(split, "captions"))

    def names(self, split: str) -> list[str] | None:
        """The file name of each of the user's pictures, relative to the set's path."""
        return read_json(self._files.texts(split, "names"))

    def further(self, split: str, *, uncut: bool = False) -> dict[str, np.ndarray]:
        """Further pictures of each image by kind (`control`, `before`), uint8 [N, C, H, W]; {} without."""
        arrays = {kind: self._load(split, kind) for kind in self.meta.extras if kind in FURTHER}
        return arrays if uncut else {kind: self._cut(images) for kind, images in arrays.items()}

    def info(self, levels: int | None = None, steps: int = 0) -> DataInfo:
        """The description of the data for building a model, by default with the grey levels of the source."""
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
        problem = f"the images of `{self.meta.title}` are {width}×{height}"
        for split in SPLITS if self.meta.mixed else ():
            sides, names = self._load(split, "sides"), self.names(split)
            small = (sides < patch).any(1).nonzero()[0]
            if len(small) and names is not None:
                width, height = sides[small[0]].tolist()
                more = len(small) - 1
                others = f", and {more:,} more of the {split} split are small" if more else ""
                problem = f"`{names[small[0]]}` of `{self.meta.title}` is {width}×{height}{others}"
                break
        hint = f"`--set 'data.augment=[patch={least}]'`, or `--set data.size={patch}`, which enlarges them"
        raise UsageError(f"{problem}: smaller than the patch of {patch}×{patch}", hint=hint)

    def _load(self, split: str, kind: str = "") -> np.ndarray:
        import numpy as np

        file = self._files.array(split, kind)
        if file not in self._open:  # an empty file cannot be mapped
            self._open[file] = np.load(file, mmap_mode="c" if self.meta.counts[split] else None)
        return self._open[file]


# --- packs in the cache ---


def pack_dir(data: DataSet, form: Form) -> Path:
    """The folder of the pack of this form: `packs/mnist/28x1`, `packs/my-photos-3f2a1c/ownxown`,
    `packs/faces/48x32x3-pad`."""
    end = "-mixed" if form.mixed else f"-{form.fit}" if form.size and form.fit != "crop" else ""
    end += "-foreign" if form.foreign else ""
    return cache_dir("packs") / data.key / f"{form.size or 'own'}x{form.channels or 'own'}{end}"


def packs_of(data: DataSet) -> list[PackFolder]:
    """Every pack of a set."""
    folder = cache_dir("packs") / data.key
    packs = map(PackFolder, sorted(folder.iterdir()) if folder.is_dir() else ())
    return [pack for pack in packs if pack.meta_file.exists()]


def pack_limit() -> int:
    """Bytes beyond which a set is streamed."""
    limit = number_in("GZ_PACK_LIMIT", "bytes")
    return PACK_LIMIT if limit is None else limit


def find_pack(data: DataSet, form: Form | None = None) -> Pack | None:
    """The pack of a form, if there is one of the current files.

    A pack made without a size or channels also serves forms that ask for its own, and one without resized
    images serves every fit.
    """
    form = form or data.form
    fits: tuple[Fit, ...] = (form.fit, "crop")
    forms = (
        replace(form, size=size, channels=channels, fit=fit, mixed=mixed)
        for size in (form.size, data.size)
        for channels in (form.channels, data.channels)
        for fit in fits
        for mixed in (form.mixed, False)
    )
    packs = [PackFolder(folder) for folder in dict.fromkeys(pack_dir(data, variant) for variant in forms)]
    metas = [(pack.path, meta) for pack in packs if (meta := PackMeta.read(pack, data))]
    now = fingerprint(data) if metas else None
    for folder, meta in metas:
        # `gz data verify` reads every byte of the arrays
        is_complete = all(is_array(folder / name) for name in meta.sha256 if name.endswith(".npy"))
        if now in (meta.fingerprint, None) and _serves(meta, form) and is_complete:
            return Pack(folder, meta)
    return None


def _serves(meta: PackMeta, form: Form) -> bool:
    """Whether a pack has the images that a form asks for."""
    c, h, w = meta.shape
    if meta.streamed and not meta.mixed:
        fits = sum(meta.counts.values()) * c * h * w <= pack_limit()  # the limit was raised
        if fits or form.mixed:
            return False
    same_fit = meta.fit == form.fit or not (meta.resized or "aspect" in (meta.fit, form.fit))
    if (meta.skipped and not form.skip_bad) or not same_fit:
        return False
    return form.size in (None, as_size(h, w)) and form.channels in (None, c)


def is_array(file: Path) -> bool:
    """Whether the length of a `.npy` file agrees with its header.

    This parses the header without numpy, which is slow to import: magic string, version in two bytes, and
    length of a Python literal with the type, as `|u1` or `<i8`, and the shape.
    """
    try:
        with file.open("rb") as f:
            is_numpy, version = f.read(6) == b"\x93NUMPY", f.read(2)
            length = int.from_bytes(f.read(2 if version[:1] == b"\x01" else 4), "little")
            if not is_numpy or length > LONGEST_HEAD:
                return False
            head = ast.literal_eval(f.read(length).decode("latin1"))
            size = math.prod(head["shape"]) * int(head["descr"][2:])
            return f.tell() + size == file.stat().st_size
    except (OSError, ValueError, SyntaxError, TypeError, KeyError):
        return False


def fingerprint(data: DataSet) -> str | None:
    """A hash of a pack's sources: the version of packing, and the checksums of a known set's files, or the
    names, sizes and times of the user's files and their layout.

    None if the path of an imported set is gone: its pack is then used unchecked.
    """
    digest = hashlib.sha256(str(RULE if isinstance(data, DataSpec) else OWN_RULE).encode())
    if isinstance(data, DataSpec):
        digest.update(repr([(f.name, f.sha256 or f.md5) for f in data.files]).encode())
        return digest.hexdigest()
    if not data.path.exists():
        return None
    files, odd = walk(data.path) if data.path.is_dir() else ([], {})
    digest.update(repr((data.form.layout, odd)).encode())
    for path in [str(data.path), *(os.path.join(data.path, name) for name in files)]:
        try:
            stat = os.stat(path)
        except OSError as e:
            hint = "try again when the files are at rest"
            raise MissingError(f"`{path}` cannot be read: {e.strerror}", hint=hint) from e
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


# --- uses: a set is not removed while a process reads or packs it ---
# A use is a file `packs/.NAME.PID.N.used`, locked by its process. The next process removes files of killed
# ones. These files are made and inspected under a lock of the set, its gate.


class Use:
    """Marks a set as used by this process, until `end` is called or the object or the process ends."""

    def __init__(self, data: DataSet):
        self._held = contextlib.ExitStack()
        # at the end of the interpreter `__del__` might not be called, or miss modules that it needs
        self.end = weakref.finalize(self, _end_use, self._held, os.getpid())
        file = cache_dir("packs", f".{data.key}.{os.getpid()}.{next(_uses)}.used")
        with contextlib.suppress(OSError), lock(_gate(data)):  # on a read-only disk nothing can be removed
            _other_users(data)
            self._held.callback(file.unlink, missing_ok=True)
            self._held.enter_context(lock(file, wait=False))

    def __enter__(self) -> Use:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        """Ends the use if the block has failed."""
        if kind:
            self.end()


def _end_use(held: contextlib.ExitStack, pid: int) -> None:
    """Ends a use, but not in a child that has a copy of it."""
    if os.getpid() == pid:
        with contextlib.suppress(OSError):
            held.close()


@contextlib.contextmanager
def alone(data: DataSet) -> Iterator[None]:
    """Keeps other processes from using the set within the block. Raises UsageError if one uses it already."""
    raw = cache_dir("raw", f".{data.key}.lock") if isinstance(data, DataSpec) else None
    with lock(_gate(data)):
        if others := _other_users(data):
            raise UsageError(f"`{data.reference}` is being used by process {others[0]}", hint=WAIT)
        with lock(raw, wait=False) if raw else contextlib.nullcontext(True) as acquired:
            if not acquired:
                raise UsageError(f"`{data.reference}` is being downloaded by another process", hint=WAIT)
            yield


def _gate(data: DataSet) -> Path:
    return cache_dir("packs", f".{data.key}.gate.lock")


def _other_users(data: DataSet) -> list[int]:
    """The other processes that use a set; the files of killed ones are removed."""
    living = []
    for file in cache_dir("packs").glob(f".{data.key}.*.used"):
        pid = int(file.name.split(".")[-3])
        if pid == os.getpid():
            continue
        if is_locked(file):
            living.append(pid)
        else:
            file.unlink(missing_ok=True)
    return living
