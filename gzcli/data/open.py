"""From a data set to its pack: found in the cache, or fetched and packed now."""

from __future__ import annotations

import errno
import hashlib
from itertools import product
from pathlib import Path
from typing import Any

from gzcli.data.library import OwnSet, locate
from gzcli.data.make import Report, Say, fingerprint, make, pack_limit
from gzcli.data.pack import Pack, PackMeta
from gzcli.data.specs import DataSpec
from gzcli.errors import MissingError, UsageError
from gzcli.store.files import lock, read_json
from gzcli.store.paths import cache_dir


def peek(what: str | Path, *, size: int | None = None, channels: int | None = None) -> PackMeta | None:
    """What the pack of a set holds, from its JSON alone; None where it is not packed, or packed from other
    files."""
    packed = find_pack(sized(locate(what), size), size, channels)
    return packed.meta if packed else None


def open_named(what: str | Path, **how: Any) -> Pack:
    """The pack of the set that a name or path means; further as `open_pack`."""
    return open_pack(locate(what), **how)


def open_pack(
    found: DataSpec | OwnSet,
    *,
    size: int | None = None,
    channels: int | None = None,
    fetch: bool = True,
    foreign: bool = False,
    say: Say = lambda text: None,
    progress: Report = lambda done, total: None,
) -> Pack:
    """The pack of a set, made now if need be: fetched (up to 200 MB, if allowed) and packed, under a
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
    found = sized(found, size)
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
