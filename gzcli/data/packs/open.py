"""Finds the pack of a data set in the cache; otherwise fetches, reads and packs the set. No heavy import at
the top."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import itertools
import math
import os
import weakref
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import TypedDict

from gzcli.core.errors import DamagedError, GzError, MissingError, UsageError, system_error
from gzcli.core.hints import advice, setting
from gzcli.core.sections import DataSection, Fit
from gzcli.core.types import Report, Say, silent, unreported
from gzcli.core.units import Size, as_size, canonical_size, counted, number_in, packable, sides
from gzcli.data.packs.augment import patch_of
from gzcli.data.packs.facts import Facts, measure
from gzcli.data.packs.pack import Pack, PackFolder, PackMeta
from gzcli.data.packs.source import at_hand, read
from gzcli.data.readers.images import walk
from gzcli.data.sets.registry import DataSet, DataSpec, Form, OwnSet, is_fetched, locate
from gzcli.store.files import check_regular, is_locked, lock, new_dir, remove_leftovers
from gzcli.store.paths import cache_dir
from gzcli.store.runs import all_runs

# versions of packing, for known sets and for the user's images; older packs are rebuilt
RULE_VERSION, OWN_RULE = 2, 10
LONGEST_HEAD = 4096  # bytes at the beginning of an array
PACK_LIMIT = 32_000_000_000  # bytes above which sets are streamed, unless `GZ_PACK_LIMIT` is set
WAIT_HINT = "stop that process, or wait until it ends"
_uses = itertools.count()


class PackOptions(TypedDict):
    """Keywords of `open_pack` and `peek`."""

    size: Size | None  # size of the images; None: the set's
    channels: int | None  # channels: 1 or 3; None: the set's
    fit: Fit  # how images of another shape are resized
    patch: int | None  # side of the patches of images; None: whole images


def pack_options(data: DataSection) -> PackOptions:
    """The keywords of `open_pack` for the section `data` of a recipe."""
    return PackOptions(size=data.size, channels=data.channels, fit=data.fit, patch=patch_of(data.augment))


def size_of(data: DataSection) -> Size | None:
    """The size of a model's images: that of the patches if it is trained on patches."""
    return patch_of(data.augment) or data.size


def peek(
    what: DataSet | str | Path,
    *,
    size: Size | None = None,
    channels: int | None = None,
    fit: Fit = "crop",
    patch: int | None = None,
) -> PackMeta | None:
    """The metadata of a set's pack, read only from its JSON; None without a pack of the current files."""
    data = locate(what).sized(size := size and canonical_size(size))
    pack = find_pack(data, data.form.with_options(size, channels, fit, patch))
    return Pack(pack.folder, pack.meta, patch).meta if pack else None


def open_pack(
    what: DataSet | str | Path,
    *,
    size: Size | None = None,
    channels: int | None = None,
    fit: Fit = "crop",
    patch: int | None = None,
    foreign: bool = False,
    say: Say = silent,
    progress: Report = unreported,
) -> Pack:
    """The pack of a set. If necessary, the set is downloaded (up to 200 MB) and packed, under a lock, so
    several processes may call this at once. A set that would be larger than `GZ_PACK_LIMIT` is streamed
    instead. Raises UsageError (mixed sizes, size out of range, images smaller than the patch) and
    MissingError.

    size, channels: 4 … 1024 pixels per side, and 1 or 3. None: those of the set.
    fit: how images of another shape are resized.
    patch: side of the patches, which are random in training and central elsewhere. If no size is set, the
      images may have mixed sizes. None: whole images.
    foreign: whether the user's own set is only scored. If it has no `test` split, all images are in that
      split.
    """
    if channels not in (None, 1, 3):
        raise UsageError(f"`data.channels` must be 1 (grey) or 3 (RGB), not {channels}")
    size = None if size is None else packable(size)
    if fit == "aspect" and (size is None or patch):
        hint = advice("use {}, and remove `patch` from `data.augment`", setting("data.size", 512))
        raise UsageError(
            "`data.fit: aspect` needs a `data.size`, and whole images instead of patches", hint=hint
        )
    data = locate(what).sized(size)
    form = data.form.with_options(size, channels, fit, patch)
    form = replace(form, foreign=foreign and isinstance(data, OwnSet))
    with Use(data) as use:
        if pack := find_pack(data, form):
            if form.foreign and pack.meta.notes:  # for images to judge, it is printed each time
                say(f"`{data.shown}`: {pack.meta.words}")
        else:
            data = at_hand(data, say)
            pack, is_new = _pack_now(data, form, say, progress)
            if is_new:
                say(f"`{data.shown}`: {pack.meta.words}")
        pack = Pack(pack.folder, pack.meta, patch)
        pack.use = use
        return pack


def _pack_now(data: DataSet, form: Form, say: Say, progress: Report) -> tuple[Pack, bool]:
    """The new pack of a set, and whether this process made it, not a concurrent one."""
    folder = pack_dir(data, form)
    waiting = f"waiting: another process is packing `{data.shown}`"
    try:
        with lock(folder.with_name(f".{folder.name}.lock"), on_wait=lambda: say(waiting)):
            if pack := find_pack(data, form):
                return pack, False
            remove_leftovers(folder.parent)
            return _make(data, folder, form, say, progress), True
    except OSError as e:
        if (problem := system_error(e)) is None:
            raise
        message = f"`{data.shown}` could not be packed into `{folder}`: {str(e.strerror).lower()}"
        raise MissingError(message, hint=problem.hint) from e


def _make(data: DataSet, folder: Path, form: Form, say: Say, progress: Report) -> Pack:
    """Packs a set into `folder` atomically: reads its images, measures their facts and writes the pack."""
    from gzcli.data.packs.build import build

    made_of = fingerprint(data)
    images = read(data, form, say)
    facts = measure(images) if isinstance(data, OwnSet) and not form.foreign else None
    name = data.name if isinstance(data, DataSpec) else images.title
    say(f"packing `{name}`: {counted(sum(images.counts.values()), 'image')}")
    with new_dir(folder) as part:
        extra = {"fingerprint": made_of, "rule": RULE_VERSION, "facts": facts and asdict(facts)}
        extra["covered"] = isinstance(data, OwnSet) and not has_earlier_runs(data)
        build(images, part, form, limit=pack_limit(), progress=progress, extra=extra)
    meta = PackMeta.read(PackFolder(folder))
    if meta is None or fingerprint(data) != made_of:
        hint = "try again when its files no longer change"
        raise MissingError(f"`{data.shown}` changed while it was being packed", hint=hint)
    return Pack(folder, meta)


def has_earlier_runs(data: OwnSet) -> bool:
    """Whether a run was trained on a split of the set that need not cover the classes. The set keeps that
    split: a run must not resume, or be judged, on other images."""
    for run in all_runs(data=data.key):
        record = run.environment.get("data") or {}
        if not record.get("covered") and (record or run.serving.status().get("step")):
            return True
    return False


def is_here(data: DataSet) -> bool:
    """Whether a set can be used without the network."""
    if packs_of(data):
        return True
    if isinstance(data, OwnSet):
        return data.path.exists()
    return data.embedded or any(map(is_fetched, data.versions))


# --- the facts of a set that may be packed ---


def facts_of(
    data: DataSet,
    *,
    size: Size | None = None,
    channels: int | None = None,
    n: int | None = None,
    patch: int | None = None,
    meta: PackMeta | None = None,
) -> Facts | None:
    """The facts of a set, packed or not; None if its files are missing. `meta`: that of its pack, if known.
    Raises GzError for files that cannot be packed."""
    if isinstance(data, DataSpec):
        spec = data.sized(size)
        facts = Facts(spec.size, spec.size, spec.channels, spec.trained_on)
        facts = replace(facts, classes=spec.n_classes, multilabel=spec.multilabel, extras=spec.extras)
    else:
        if meta is None and not (meta := _packed(data)):
            try:
                surveyed = _surveyed(data, fingerprint(data))[0]
            except GzError:
                if data.path.exists():  # packing would refuse them, too
                    raise
                return None
            values = surveyed and vars(surveyed)
        else:  # the pack counts the readable images
            values = {**(meta.facts or {}), "n": meta.counts["train"], "multilabel": meta.multilabel}
        if not values:
            return None
        facts = Facts(**{key: values[key] for key in Facts.__dataclass_fields__ if key in values})
        facts = replace(facts, extras=tuple(facts.extras))  # it is a list in JSON
        size, channels = size or data.size, channels or data.channels
    size = patch or size
    height, width = (facts.height, facts.width) if size is None else sides(size)
    many = facts.n if n is None else min(n, facts.n)
    channels = facts.channels if facts.channels not in (1, 3) else channels or facts.channels
    return replace(facts, height=height, width=width, channels=channels, n=many, name=data.reference)


def counts_of(data: DataSet, *, foreign: bool = False) -> dict[str, int] | None:
    """The images in each packed split of a set, packed or not; None if its files are missing. foreign: as for
    `open_pack`. Raises GzError for files that cannot be packed."""
    foreign = foreign and isinstance(data, OwnSet)
    if not foreign and (meta := _packed(data)):
        return meta.counts
    if not (isinstance(data, DataSpec) or data.path.exists()):
        return None
    from gzcli.data.packs.build import foreign_plan, rows_of, split_plan

    if foreign:
        return rows_of(foreign_plan(read(data, replace(data.form, foreign=True)).counts))
    return rows_of(split_plan(data.title, official_counts(data) or {}))


def official_counts(data: DataSet) -> dict[str, int] | None:
    """The images in each official split of a set; None if its files are missing. Raises GzError for files
    that cannot be packed."""
    if isinstance(data, DataSpec):
        return data.official
    return _surveyed(data, fingerprint(data))[1] if data.path.exists() else None


def crops_of(data: DataSet, size: Size | None, *, foreign: bool = False) -> list[str]:
    """The notes of `open_pack` on the user's images that it crops to a size; nothing is packed. Raises
    UsageError for images that need a size."""
    if not isinstance(data, OwnSet) or not data.path.exists():
        return []
    from gzcli.data.packs.build import crops

    form = replace(data.form.with_options(size, None, "crop", None), foreign=foreign)
    return crops(read(data, form), form)


@lru_cache(maxsize=1)
def _surveyed(data: OwnSet, made_of: str | None) -> tuple[Facts | None, dict[str, int]]:
    """The facts of a set that is not packed, and the images in each official split. They are cached, because
    several recipes need them, and a large archive takes seconds to read. `made_of` changes with the set's
    files."""
    images = read(data, data.form)
    return measure(images), images.counts


def _packed(data: DataSet) -> PackMeta | None:
    """A pack of the current files that contains their facts."""
    metas = [meta for pack in packs_of(data) if (meta := PackMeta.read(pack)) and meta.facts]
    now = fingerprint(data) if metas else None
    return next((meta for meta in metas if now in (meta.fingerprint, None)), None)


# --- packs in the cache ---


def pack_dir(data: DataSet, form: Form) -> Path:
    """The folder of the pack of this form: `packs/mnist/28x1`, `packs/my-photos-3f2a1c/ownxown`."""
    return cache_dir("packs") / data.key / form.folder


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

    A pack made without a requested size or channels also serves forms that request what it has. A pack
    without resized images serves every `fit`.
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
    home = cache_dir("packs") / data.key
    packs = [PackFolder(home / name) for name in dict.fromkeys(variant.folder for variant in forms)]
    metas = [(pack.path, meta) for pack in packs if (meta := PackMeta.read(pack))]
    now = fingerprint(data) if metas else None
    for folder, meta in metas:
        # `gz data verify` reads every byte of the files
        is_complete = all(_is_of_pack(folder / name, meta) for name in meta.sha256)
        if now in (meta.fingerprint, None) and _serves(meta, form) and is_complete:
            return Pack(folder, meta)
    return None


def _serves(meta: PackMeta, form: Form) -> bool:
    """Whether a pack has the images of a form."""
    c, h, w = meta.shape
    if meta.streamed and not meta.mixed:
        fits = sum(meta.counts.values()) * c * h * w <= pack_limit()  # the limit was raised
        if fits or form.mixed:
            return False
    same_fit = meta.fit == form.fit or not (meta.resized or "aspect" in (meta.fit, form.fit))
    if (meta.skipped and not form.skip_bad) or not same_fit:
        return False
    return form.size in (None, as_size(h, w)) and form.channels in (None, c)


def _is_of_pack(file: Path, meta: PackMeta) -> bool:
    """Whether a file of a pack appears whole, and an array has the rows that the metadata state."""
    split, _, kind = file.stem.partition("_")
    if file.suffix != ".npy":
        return is_list(file)
    dtype, shape = head_of(file) or ("", ())
    if not kind:
        return (dtype, shape) == ("|u1", (meta.counts[split], *meta.shape))
    return bool(shape) and (kind == "containers" or shape[0] == meta.counts[split])


def is_list(file: Path) -> bool:
    """Whether a file begins and ends like a JSON list. A list of many texts takes long to parse."""
    try:
        check_regular(file)
        with file.open("rb") as f:
            first = f.read(1)
            f.seek(-2, os.SEEK_END)
            return first == b"[" and f.read().strip() == b"]"
    except (OSError, DamagedError):
        return False


def head_of(file: Path) -> tuple[str, tuple[int, ...]] | None:
    """The dtype, such as `|u1`, and the shape of a `.npy` file; None unless its length agrees with them.

    The header is parsed without numpy, which is slow to import. It consists of a magic string, two bytes with
    the version, and a Python literal, preceded by its length, with the dtype (such as `|u1` or `<i8`) and the
    shape.
    """
    try:
        check_regular(file)
        with file.open("rb") as f:
            is_numpy, version = f.read(6) == b"\x93NUMPY", f.read(2)
            length = int.from_bytes(f.read(2 if version[:1] == b"\x01" else 4), "little")
            if not is_numpy or length > LONGEST_HEAD:
                return None
            head = ast.literal_eval(f.read(length).decode("latin1"))
            dtype, shape = head["descr"], tuple(head["shape"])
            is_whole = f.tell() + math.prod(shape) * int(dtype[2:]) == file.stat().st_size
            return (dtype, shape) if is_whole else None
    except (OSError, DamagedError, ValueError, SyntaxError, TypeError, KeyError):
        return None


def fingerprint(data: DataSet) -> str | None:
    """A hash of a pack's sources: the version of packing, and the checksums of a known set's files. For the
    user's files, it covers their names, sizes, times and layout.

    None if the path of an imported set no longer exists; its pack is then used unchecked.
    """
    digest = hashlib.sha256(str(RULE_VERSION if isinstance(data, DataSpec) else OWN_RULE).encode())
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
            hint = "try again when its files no longer change"
            raise MissingError(f"`{path}` cannot be read: {e.strerror}", hint=hint) from e
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


# --- uses: a set is not removed while a process reads or packs it ---
# A use is a file `packs/.NAME.PID.N.used`, locked by its process. The next process removes files of killed
# ones. These files are made and inspected under a lock of the set, its gate.


class Use:
    """Marks a set as used by this process, until `end` is called or the object or the process ends."""

    def __init__(self, data: DataSet):
        self._claims = contextlib.ExitStack()
        # at the end of the interpreter `__del__` might not be called, or miss modules that it needs
        self.end = weakref.finalize(self, _end_use, self._claims, os.getpid())
        file = cache_dir("packs", f".{data.key}.{os.getpid()}.{next(_uses)}.used")
        with contextlib.suppress(OSError), lock(_gate(data)):  # on a read-only disk nothing can be removed
            _other_users(data)
            self._claims.callback(file.unlink, missing_ok=True)
            self._claims.enter_context(lock(file, wait=False))

    def __enter__(self) -> Use:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        """Ends the use if the block has failed."""
        if kind:
            self.end()


def _end_use(claims: contextlib.ExitStack, pid: int) -> None:
    """Ends a use, unless this process is a child with a copy of it."""
    if os.getpid() == pid:
        with contextlib.suppress(OSError):
            claims.close()


@contextlib.contextmanager
def alone(data: DataSet) -> Iterator[None]:
    """Keeps other processes from using the set within the block. Raises UsageError if one uses it already."""
    raw = cache_dir("raw", f".{data.key}.lock") if isinstance(data, DataSpec) else None
    with lock(_gate(data)):
        if users := _other_users(data):
            raise UsageError(f"`{data.reference}` is being used by process {users[0]}", hint=WAIT_HINT)
        with lock(raw, wait=False) if raw else contextlib.nullcontext(True) as acquired:
            if not acquired:
                raise UsageError(f"`{data.reference}` is being downloaded by another process", hint=WAIT_HINT)
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
