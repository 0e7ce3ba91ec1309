"""Packs: a set as uint8 memory-maps in the cache, opened by every process of a run. Importing this imports no numpy."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gzcli.data.conditions import FURTHER
from gzcli.data.library import OwnSet, data_key, locate
from gzcli.data.sets import SPECS
from gzcli.data.specs import DataSpec
from gzcli.errors import GzError, MissingError, UsageError
from gzcli.store.files import lock, new_dir, read_json
from gzcli.store.paths import cache_dir
from gzcli.store.weights import offline
from gzcli.types import DataInfo

if TYPE_CHECKING:
    import numpy as np

    from gzcli.data.stream import Pictures

Say = Callable[[str], None]
Report = Callable[[int, int], None]  # report(images done, images in all)

__all__ = ["Pack", "PackMeta", "data_key", "find_pack", "open_pack", "peek"]

RULE = 2  # raised when packing changes what a pack holds: older packs are made anew
OWN_RULE = 3  # the same for the user's own images
FETCHED_UNASKED = 200_000_000  # bytes: larger sets are downloaded only by `gz data download`
PACK_LIMIT = 32_000_000_000  # bytes: larger sets stream, unless `GZ_PACK_LIMIT` says otherwise


@dataclass(frozen=True)
class PackMeta:
    """What a pack holds; `shape` is (C, H, W), `levels` the grey levels of the source, `digest` names the content.

    A streamed set has no pixels here, only where its pictures lie; `skipped` are messages of pictures left out.
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
    extras: tuple[str, ...] = ()  # what comes with each image: "caption", "control", "before"


class Pack:
    """A packed set. Splits are "train", "val" and "test"; arrays are memory-maps, shared by all processes.

    `how` are the keywords of `pictures.decode` for a streamed set, whose pictures are decoded as they are asked for.
    """

    def __init__(self, folder: Path, meta: PackMeta, how: dict[str, Any] | None = None):
        self.folder, self.meta, self._how = folder, meta, how
        self._open: dict[str, np.ndarray] = {}

    def images(self, split: str) -> np.ndarray | Pictures:
        """uint8 [N, C, H, W]; changes to it are not written back. A streamed set's are alike, indexed by rows."""
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

    def further(self, split: str) -> dict[str, np.ndarray]:
        """Further pictures of each image, uint8 [N, C, H, W] as the images: its `control`, its `before`; {} without."""
        return {kind: self._load(f"{split}_{kind}") for kind in self.meta.extras if kind in FURTHER}

    def info(self, levels: int | None = None, steps: int = 0) -> DataInfo:
        """What a model may know; `levels` None means the source's own."""
        meta = self.meta
        return DataInfo(meta.shape, levels or meta.levels, meta.classes, meta.multilabel, meta.counts["train"], steps)

    def _load(self, name: str) -> np.ndarray:
        import numpy as np

        if name not in self._open:
            empty = not self.meta.counts[name.split("_")[0]]  # an empty file cannot be mapped
            self._open[name] = np.load(self.folder / f"{name}.npy", mmap_mode=None if empty else "c")
        return self._open[name]


def peek(what: str | Path, *, size: int | None = None, channels: int | None = None) -> PackMeta | None:
    """What the pack of a set holds, from its JSON alone; None where it is not packed, or packed from other files."""
    packed = find_pack(sized(locate(what), size), size, channels)
    return packed.meta if packed else None


def open_pack(
    what: str | Path,
    *,
    size: int | None = None,
    channels: int | None = None,
    fetch: bool = True,
    say: Say = lambda text: None,
    progress: Report = lambda done, total: None,
) -> Pack:
    """The pack of a set or path, made now if need be: fetched (up to 200 MB, if allowed) and packed, under a lock. A set
    that would be larger than `GZ_PACK_LIMIT` is not packed but streamed.

    size: side of the images (default: as they are); channels: 1 or 3. Several processes may call it at once.
    Raises UsageError (unknown name, mixed sizes, size out of range) and MissingError (files not there, not readable).
    """
    if channels not in (None, 1, 3):
        raise UsageError(f"`data.channels` is 1 (grey) or 3 (RGB), not {channels}")
    if size is not None and not 4 <= size <= 1024:
        raise UsageError(f"`data.size` is between 4 and 1024 pixels, not {size}")
    found = sized(locate(what), size)
    if packed := find_pack(found, size, channels):
        return packed
    name = found.title if isinstance(found, OwnSet) else found.name
    folder = _folder(found, size, channels)
    try:
        waiting = f"another process packs `{name}`: waiting"
        with lock(folder.with_name(f".{folder.name}.lock"), on_wait=lambda: say(waiting)):
            if (packed := find_pack(found, size, channels)) is None:
                _build(found, folder, size, channels, fetch, say, progress)
                packed = find_pack(found, size, channels)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        hint = "free some space, or set `GZ_HOME` to a folder on another disk"
        raise MissingError(f"`{name}` could not be packed into `{folder}`: {e.strerror}", hint=hint) from e
    if packed is None:
        raise MissingError(f"`{name}` changed while it was packed", hint="try again when its files are at rest")
    return packed


def sized(found: DataSpec | OwnSet, size: int | None) -> DataSpec | OwnSet:
    """The set in its publisher's version for this size, where there are several."""
    return found.sized(size) if isinstance(found, DataSpec) else found


def pack_limit() -> int:
    """Bytes beyond which a set is streamed. Raises UsageError."""
    text = os.environ.get("GZ_PACK_LIMIT", "")
    if text and not text.isdigit():
        raise UsageError(f"`GZ_PACK_LIMIT` is a number of bytes, not `{text}`")
    return int(text) if text else PACK_LIMIT


def find_pack(found: DataSpec | OwnSet, size: int | None = None, channels: int | None = None) -> Pack | None:
    """The pack of this size and these channels, if there is one of the files as they are now.

    A path packed as it is serves also whoever asks for the very size and channels that it has.
    """
    now = fingerprint(found)
    size, channels = size or found.size, channels or found.channels
    for folder in dict.fromkeys((_folder(found, size, channels), _folder(found))):
        raw = read_json(folder / "meta.json")
        if raw and now in (raw["fingerprint"], None):
            c, h, w = raw["shape"]
            if raw.get("streamed") and sum(raw["counts"].values()) * c * h * w <= pack_limit():
                continue  # the limit was raised
            if raw.get("skipped") and not found.skip_bad:
                continue  # bad pictures may not be skipped any more
            if size in (None, h) and h == w and channels in (None, c):
                return Pack(folder, _meta(found, raw), raw.get("streamed"))
    return None


def _folder(found: DataSpec | OwnSet, size: int | None = None, channels: int | None = None) -> Path:
    """Where the pack of this size and these channels lies: `packs/mnist/28x1`, `packs/my-photos-3f2a1c/ownxown`."""
    key = found.key if isinstance(found, OwnSet) else found.name
    return cache_dir("packs", key, f"{size or found.size or 'own'}x{channels or found.channels or 'own'}")


def fingerprint(found: DataSpec | OwnSet) -> str | None:
    """Of what a pack was made: the packing rule and the checksums, or a path's names, sizes and times; None where
    the path of an imported set is gone, whose pack is then all there is."""
    digest = hashlib.sha256(str(RULE if isinstance(found, DataSpec) else OWN_RULE).encode())
    if isinstance(found, DataSpec):
        digest.update(repr([(f.name, f.sha256 or f.md5) for f in found.files]).encode())
    elif not found.path.exists():
        return None
    else:
        for path in [found.path, *(_walk(found.path) if found.path.is_dir() else ())]:
            stat = path.stat()
            digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _walk(root: Path) -> list[Path]:
    found = [Path(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names]
    return sorted(path for path in found if not path.name.startswith("."))


def _build(
    found: DataSpec | OwnSet,
    folder: Path,
    size: int | None,
    channels: int | None,
    fetch: bool,
    say: Say,
    progress: Report,
) -> None:
    if isinstance(found, DataSpec) and not found.embedded:
        _have_files(found, fetch, say)
    from gzcli.data.build import build

    made_of = fingerprint(found)
    source = _source(found)
    say(f"packing `{source.title}`: {sum(source.counts.values()):,} images")
    with new_dir(folder) as part:
        build(
            source, part, size=size or found.size, channels=channels or found.channels, limit=pack_limit(),
            skip_bad=isinstance(found, OwnSet) and found.skip_bad, progress=progress,
            extra={"fingerprint": made_of, "rule": RULE},
        )  # fmt: skip


def _source(found: DataSpec | OwnSet):
    if isinstance(found, OwnSet):
        from gzcli.data.folder import open_path

        if not found.path.exists():
            hint = f"`gz data remove {found.key}`, then `gz data import PATH --name {found.key}`"
            raise MissingError(f"`{found.path}`, imported as `{found.key}`, is gone", hint=hint)
        return open_path(found.path)
    if found.embedded:
        from gzcli.data.embedded import SOURCES

        return SOURCES[found.name](found)
    import tarfile

    from gzcli.data.library import raw_dir
    from gzcli.data.parsers import PARSERS

    try:
        return PARSERS[found.name](found, raw_dir(found))
    except GzError:
        raise
    except (OSError, EOFError, ValueError, KeyError, IndexError, tarfile.TarError) as e:
        hint = f"`gz data verify {found.name}` checks its files"
        raise MissingError(f"the files of `{found.name}` cannot be read: {e}", hint=hint) from e


def _have_files(spec: DataSpec, fetch: bool, say: Say) -> None:
    """Fetches what is missing, if that is allowed and small enough."""
    from gzcli.data import fetch as fetching
    from gzcli.data.library import is_fetched

    if is_fetched(spec):
        return
    size = "" if spec in SPECS.values() else f" --size {spec.size}"
    hint = f"`gz data download {spec.name}{size}` ({spec.download_size / 1e6:,.0f} MB)"
    if spec.linked:
        hint = f"`gz data download {spec.name} --from DIR`, where DIR has the files of {spec.page}"
    if not fetch or (offline() and not fetching.has_local_mirror()):
        why = " and `GZ_OFFLINE` is set" if offline() else ""
        raise MissingError(f"`{spec.name}` is not in the cache{why}", hint=hint)
    if spec.download_size > FETCHED_UNASKED:
        raise MissingError(f"`{spec.name}` is not in the cache, and large", hint=hint)
    say(f"downloading `{spec.name}` ({spec.download_size / 1e6:,.0f} MB, licence: {spec.licence})")
    fetching.fetch(spec, say=say)


def _meta(found: DataSpec | OwnSet, raw: dict) -> PackMeta:
    name = found.key if isinstance(found, OwnSet) else found.name
    digest = hashlib.sha256(repr(sorted(raw["sha256"].items())).encode()).hexdigest()[:16]
    captioned = ("caption",) if "train_captions.json" in raw["sha256"] else ()  # older packs do not say it
    return PackMeta(
        name, raw["title"], tuple(raw["shape"]), tuple(raw["classes"]), raw["multilabel"], raw["counts"], raw["levels"],
        raw["resized"], digest, bool(raw.get("streamed")), tuple(raw.get("skipped", ())), tuple(raw.get("extras", captioned)),
    )  # fmt: skip
