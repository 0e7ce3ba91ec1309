"""The packs in the cache: their folders, the files that they were made of, and the one that a form asks for.
No heavy import."""

from __future__ import annotations

import ast
import hashlib
import math
import os
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from gzcli.core.errors import DamagedError, MissingError
from gzcli.core.sections import Fit
from gzcli.core.units import Size, as_size, number_in
from gzcli.data.packs.forms import Decoding, Form
from gzcli.data.packs.pack import Pack, PackMeta
from gzcli.data.readers.walk import walk
from gzcli.data.sets.names import DataSet
from gzcli.data.sets.specs import DataSpec
from gzcli.store.files import read_object
from gzcli.store.paths import cache_dir

RULE = 2  # version of the packing: packs of an older one are made anew
OWN_RULE = 7  # the same for the user's own images
KINDS: dict[str, type | tuple[type, ...]] = {  # types of what the `meta.json` of a pack must say
    **dict.fromkeys(("fingerprint", "title"), str),
    **dict.fromkeys(("shape", "classes"), list),
    **dict.fromkeys(("counts", "sha256"), dict),
    **dict.fromkeys(("multilabel", "resized"), bool),
    "levels": int,
}
LONGEST = 4096  # bytes of the head of an array
PACK_LIMIT = 32_000_000_000  # bytes: larger sets stream, unless `GZ_PACK_LIMIT` says otherwise


def find_pack(found: DataSet, form: Form | None = None) -> Pack | None:
    """The pack of a form, if there is one that was made of the present files.

    A pack that was made without asking for a size or channels is also found by a form that asks for those
    that it has, and one whose images were not resized whatever the fit.
    """
    form = form or found.form
    ways: Iterable[tuple[Size | None, int | None, Fit, bool]] = product(
        dict.fromkeys((form.size, found.size)),
        dict.fromkeys((form.channels, found.channels)),
        dict.fromkeys((form.fit, "crop")),
        dict.fromkeys((form.mixed, False)),
    )
    folders = dict.fromkeys(
        pack_dir(found, replace(form, size=size, channels=channels, fit=fit, mixed=mixed))
        for size, channels, fit, mixed in ways
    )
    metas = [(folder, meta) for folder in folders if (meta := meta_of(folder))]
    now = fingerprint(found) if metas else None
    for folder, meta in metas:
        if now in (meta["fingerprint"], None):
            c, h, w = meta["shape"]
            how = meta.get("streamed")
            mixed = meta.get("mixed", False)
            if how and not mixed and sum(meta["counts"].values()) * c * h * w <= pack_limit():
                continue  # the limit was raised
            if form.mixed and how and not mixed:
                continue  # its pictures need one size
            if meta.get("skipped") and not form.skip_bad:
                continue  # bad pictures may not be skipped any more
            if meta["resized"] and meta.get("fit", "crop") != form.fit:
                continue
            fits = form.size in (None, as_size(h, w)) and form.channels in (None, c)
            if fits and is_whole(folder, meta):
                return Pack(folder, _meta(found, meta), Decoding(**how) if how else None)
    return None


def meta_of(folder: Path) -> dict[str, Any] | None:
    """What the `meta.json` of a pack says; None where there is none, or it is damaged."""
    try:
        meta = read_object(folder / "meta.json")
        return meta if all(isinstance(meta[key], kind) for key, kind in KINDS.items()) else None
    except (DamagedError, KeyError):
        return None


def is_whole(folder: Path, meta: dict[str, Any]) -> bool:
    """Whether the arrays of a pack are there, and as long as their heads say; one that is not is made anew.

    `gz data verify` reads every byte.
    """
    return all(is_array(folder / name) for name in meta["sha256"] if name.endswith(".npy"))


def is_array(file: Path) -> bool:
    """Whether a file has the length that the head of its array says.

    numpy's format: its name, the version in two bytes, the length of a Python literal that has the type, as
    `|u1` or `<i8`, and the shape; numpy itself is not loaded, which light verbs do without.
    """
    try:
        with file.open("rb") as f:
            known, version = f.read(6) == b"\x93NUMPY", f.read(2)
            length = int.from_bytes(f.read(2 if version[:1] == b"\x01" else 4), "little")
            if not known or length > LONGEST:
                return False
            head = ast.literal_eval(f.read(length).decode("latin1"))
            size = math.prod(head["shape"]) * int(head["descr"][2:])
            return f.tell() + size == file.stat().st_size
    except (OSError, ValueError, SyntaxError, TypeError, KeyError):
        return False


def packs_of(found: DataSet) -> list[Path]:
    """The folders of every pack of a set."""
    folder = cache_dir("packs", found.key)
    return sorted(p for p in folder.iterdir() if (p / "meta.json").exists()) if folder.is_dir() else []


def pack_dir(found: DataSet, form: Form) -> Path:
    """The folder of the pack of this form: `packs/mnist/28x1`, `packs/my-photos-3f2a1c/ownxown`,
    `packs/faces/48x32x3-pad`."""
    end = "-foreign" if form.foreign else ""
    if form.mixed:
        end = f"-mixed{end}"
    elif form.size and form.fit != "crop":
        end = f"-{form.fit}{end}"
    return cache_dir("packs", found.key, f"{form.size or 'own'}x{form.channels or 'own'}{end}")


def pack_limit() -> int:
    """Bytes beyond which a set is streamed. Raises UsageError."""
    limit = number_in("GZ_PACK_LIMIT", "bytes")
    return PACK_LIMIT if limit is None else limit


def fingerprint(found: DataSet) -> str | None:
    """A hash of what a pack is made of: the version of the packing, and the checksums of a known set's files,
    or the names, sizes and times of the user's own files and their layout.

    None where the path of an imported set is gone: then its pack is used as it is.
    """
    digest = hashlib.sha256(str(RULE if isinstance(found, DataSpec) else OWN_RULE).encode())
    if isinstance(found, DataSpec):
        digest.update(repr([(f.name, f.sha256 or f.md5) for f in found.files]).encode())
        return digest.hexdigest()
    if not found.path.exists():
        return None
    files, odd = walk(found.path) if found.path.is_dir() else ([], {})
    digest.update(repr((found.form.layout, odd)).encode())
    for path in [str(found.path), *(os.path.join(found.path, name) for name in files)]:
        try:
            stat = os.stat(path)
        except OSError as e:
            raise MissingError(
                f"`{path}` cannot be read: {e.strerror}", hint="try again when the files are at rest"
            ) from e
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _meta(found: DataSet, meta: dict[str, Any]) -> PackMeta:
    """What a pack's `meta.json` says; older packs do not have all of its keys."""
    content = sorted(item for item in meta["sha256"].items() if not item[0].endswith("_names.json"))
    captioned = ("caption",) if "train_captions.json" in meta["sha256"] else ()
    channels = meta.get("source_channels", meta["shape"][0])
    return PackMeta(
        found.key,
        meta["title"],
        tuple(meta["shape"]),
        tuple(meta["classes"]),
        meta["multilabel"],
        meta["counts"],
        meta["levels"],
        meta["resized"],
        digest=hashlib.sha256(repr(content).encode()).hexdigest()[:16],
        streamed=bool(meta.get("streamed")),
        skipped=tuple(meta.get("skipped", ())),
        source_channels=found.channels if isinstance(found, DataSpec) else channels,
        extras=tuple(meta.get("extras", captioned)),
        notes=tuple(meta.get("notes", ())),
        mixed=meta.get("mixed", False),
    )
