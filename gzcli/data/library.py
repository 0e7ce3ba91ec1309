"""What the user has: known sets, the user's own names, paths; listing, importing, checking, removing. No
numpy here."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from gzcli.data.sets import SPECS
from gzcli.data.specs import DataFile, DataSpec
from gzcli.errors import MissingError, UsageError, canonical, did_you_mean
from gzcli.store.files import checksum, lock, read_json, write_json
from gzcli.store.paths import cache_dir, user_dir

_SUFFIXES = (".zip", ".npz", ".tar", ".tgz", ".gz", ".zst", ".parquet")  # of what can only be meant as a path
SPLIT_FOLDERS = ("train", "val")  # what `raw_dir` of a linked set may hold instead of its files


@dataclass(frozen=True)
class OwnSet:
    """The user's own images: a path, with what was given at an import."""

    path: Path
    name: str | None = None
    size: int | None = None
    channels: int | None = None
    skip_bad: bool = False  # leave out pictures that do not decode
    form: str | None = None  # how its folders are meant (`layout.FORMS`); None: as they tell

    @property
    def key(self) -> str:
        """A short name that tells apart equally named folders."""
        if self.name:
            return self.name
        stem = self.path.name.split(".")[0] or "data"
        return f"{slug(stem)}-{hashlib.sha256(str(self.path).encode()).hexdigest()[:6]}"

    @property
    def title(self) -> str:
        return str(self.path)


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "data"


def locate(what: str | Path) -> DataSpec | OwnSet:
    """The set that `what` means: a known name, an imported name, else a path.

    Raises UsageError (no such name) or MissingError (no such path).
    """
    text = str(what)
    for spec in SPECS.values():
        if canonical(spec.name) == canonical(text):
            return spec
    for name, entry in _own().items():
        if canonical(name) == canonical(text):
            return _own_set(name, entry)
    path = _local(text)
    if path.exists():
        return OwnSet(path)
    if isinstance(what, Path) or "/" in text or path.suffix.lower() in _SUFFIXES:
        raise MissingError(
            f"there is no `{text}`", hint="give the path of a folder, zip, tar or npz of images"
        )
    raise UsageError(
        f"there is no data set `{text}`",
        hint=did_you_mean(text, names())
        or "`gz data list` shows the names; a path works too, as `./my_photos`",
    )


def is_set(what: str) -> bool:
    """Whether the text as it stands is the name of a set or an existing path."""
    try:
        locate(what)
    except (UsageError, MissingError):
        return False
    return True


def data_key(what: str | Path) -> str:
    """The short name of a set or path for run ids: `mnist`, or `my-photos-3f2a1c`. The path need not
    exist."""
    try:
        found = locate(what)
    except MissingError:
        found = OwnSet(Path(what).expanduser().absolute())
    return found.key if isinstance(found, OwnSet) else found.name


def names() -> list[str]:
    """Every name that `--data` takes: known sets first, then imported ones."""
    return [*SPECS, *_own()]


def listing() -> list[dict[str, Any]]:
    """One row a set: name, title, classes (how many), channels, size, larger (further sizes), cached,
    n_train, n_val (0: carved from train), n_test, licence, citation, download (bytes), multilabel, extras
    (what comes with each image), embedded, page (to get it at), path (of an imported set), lost (whether
    nothing is at that path any more). Sizes of an imported set are null until it is packed. None of its files
    is looked at: there may be millions."""
    return [_known_row(spec) for spec in SPECS.values()] + [
        _own_row(name, entry) for name, entry in _own().items()
    ]


def _known_row(spec: DataSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "title": spec.title,
        "classes": spec.n_classes,
        "channels": spec.channels,
        "size": spec.size,
        "larger": [size for size, _ in spec.larger],
        "cached": spec.embedded or bool(_packs(spec)) or any(map(is_fetched, spec.versions)),
        "n_train": spec.n_train,
        "n_val": spec.n_val,
        "n_test": spec.n_test,
        "licence": spec.licence,
        "citation": spec.citation,
        "download": spec.download_size,
        "multilabel": spec.multilabel,
        "extras": list(spec.extras),
        "embedded": spec.embedded,
        "page": spec.page or None,
        "path": None,
        "lost": False,
    }


def _own_row(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """By the set's newest pack, whatever has become of its files since."""
    metas = [folder / "meta.json" for folder in _packs(_own_set(name, entry))]
    meta = read_json(max(metas, key=lambda path: path.stat().st_mtime)) if metas else None
    counts = meta["counts"] if meta else {}
    return {
        "name": name,
        "title": entry["path"],
        "classes": len(meta["classes"]) if meta else entry["classes"],
        "channels": meta["shape"][0] if meta else entry["channels"],
        "size": meta["shape"][-1] if meta else entry["size"],
        "larger": [],
        "cached": meta is not None,
        "n_train": counts["train"] + counts["val"] if meta else None,
        "n_val": 0 if meta else None,
        "n_test": counts["test"] if meta else None,
        "licence": None,
        "citation": None,
        "download": 0,
        "multilabel": bool(meta and meta["multilabel"]),
        "extras": meta.get("extras", []) if meta else [],
        "embedded": False,
        "page": None,
        "path": entry["path"],
        "lost": not Path(entry["path"]).exists(),
    }


def _own_set(name: str, entry: dict[str, Any]) -> OwnSet:
    given = {key: entry.get(key) for key in ("size", "channels", "form")}
    return OwnSet(Path(entry["path"]), name, skip_bad=entry.get("skip_bad", False), **given)


def import_set(
    path: str | Path,
    name: str,
    *,
    size: int | None = None,
    channels: int | None = None,
    skip_bad: bool = False,
    form: str | None = None,
) -> dict[str, Any]:
    """Registers the images at `path` as `name`, after a look at their layout (`form`: how it is meant, of
    `layout.FORMS`). Returns name, path, classes, counts.

    Raises UsageError for a name that is taken or malformed, MissingError for a path without images.
    """
    from gzcli.data.folder import open_path

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", name):
        raise UsageError(
            f"`{name}` cannot be a data set's name", hint="use letters, digits, `-` and `_`, as `my-photos`"
        )
    if canonical(name) in map(canonical, SPECS):
        raise UsageError(f"`{name}` is a data set of gz already", hint="choose another `--name`")
    path = _local(str(path))
    if not path.exists():
        raise MissingError(
            f"there is no `{path}`", hint="give the path of a folder, zip, tar or npz of images"
        )
    source = open_path(path, form)
    given = {"size": size, "channels": channels, "skip_bad": skip_bad, "form": form}
    entry = {"path": str(path), **given, "classes": len(source.classes)}
    with lock(user_dir(".data.lock")):
        own = _own()
        if name not in own and canonical(name) in map(canonical, own):
            raise UsageError(f"`{name}` is taken", hint=f"`gz data remove {name}` frees it")
        if name in own and own[name]["path"] != str(path):
            raise UsageError(
                f"`{name}` is taken by `{own[name]['path']}`", hint=f"`gz data remove {name}` frees it"
            )
        write_json(user_dir("data.json"), {**own, name: entry})
    return {"name": name, "path": str(path), "classes": list(source.classes), "counts": source.counts}


def data_path(what: str | Path) -> Path:
    """Where a set lies: its pack, else its downloaded files, else the user's path. Raises MissingError if
    nowhere."""
    from gzcli.data.open import find_pack

    found = locate(what)
    if packed := find_pack(found):
        return packed.folder
    if isinstance(found, OwnSet):
        return found.path
    if any(map(is_fetched, found.versions)):
        return raw_dir(found)
    raise MissingError(f"`{found.name}` is not in the cache", hint=f"`gz data download {found.name}`")


def remove(what: str | Path) -> list[Path]:
    """Removes packs, downloaded files and the imported name; never the user's own files. Returns what was
    removed."""
    found = locate(what)
    gone = [folder for folder in _packs(found) if _remove_tree(folder)]
    if isinstance(found, DataSpec):
        gone += [raw_dir(found)] if _remove_tree(raw_dir(found)) else []
    elif found.name:
        with lock(user_dir(".data.lock")):
            write_json(user_dir("data.json"), {k: v for k, v in _own().items() if k != found.name})
        gone.append(user_dir("data.json"))  # the line in it
    return gone


def verify(what: str | Path, *, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Re-reads every byte of the downloaded files and packs. Returns {name, files, packs}, the paths that
    were checked.

    Raises MissingError that names the first damaged file, or that there is nothing to check.
    """
    found = locate(what)
    name = found.name or str(found.path)
    files, packs = [], []
    for file in chain(*(version.files for version in found.versions)) if isinstance(found, DataSpec) else ():
        path = raw_dir(found) / file.name
        if path.exists():
            say(f"checking `{path}`")
            kind = "sha256" if file.sha256 else "md5"
            if not is_there(found, file) or checksum(path, kind) != (file.sha256 or file.md5):
                again = f"`gz data remove {name}`, then `gz data download {name}`"
                raise MissingError(f"`{path}` is damaged: its {kind} is not the publisher's", hint=again)
            files.append(str(path))
    for folder in _packs(found):
        say(f"checking `{folder}`")
        for part, digest in (read_json(folder / "meta.json") or {}).get("sha256", {}).items():
            if not (folder / part).exists() or checksum(folder / part) != digest:
                again = f"`gz data remove {name}` drops it; the next use packs it again"
                raise MissingError(f"the pack `{folder / part}` is damaged", hint=again)
        packs.append(str(folder))
    if isinstance(found, OwnSet) and not packs and not found.path.exists():
        raise MissingError(
            f"`{found.path}`, imported as `{name}`, is gone",
            hint=f"`gz data remove {name}`, or bring it back",
        )
    if (
        not files
        and not packs
        and not (isinstance(found, DataSpec) and (found.embedded or is_fetched(found)))
    ):
        hint = (
            f"`gz data download {name}`"
            if isinstance(found, DataSpec)
            else f"`gz train vae --data {name}` packs it"
        )
        raise MissingError(f"nothing of `{name}` is in the cache", hint=hint)
    return {"name": name, "files": files, "packs": packs}


def raw_dir(spec: DataSpec) -> Path:
    """The files of a set, in whatever sizes its publisher has it."""
    return cache_dir("raw", spec.name)


def is_fetched(spec: DataSpec) -> bool:
    """Whether every file is there, or of a linked set the folders in their place."""
    if spec.linked and all((raw_dir(spec) / name).is_dir() for name in SPLIT_FOLDERS):
        return True
    return bool(spec.files) and all(is_there(spec, file) for file in spec.files)


def is_there(spec: DataSpec, file: DataFile) -> bool:
    """Whether a file is there, with its size if that is known; the checksum was checked when it was
    fetched."""
    path = raw_dir(spec) / file.name
    return path.exists() and (not file.exact or path.stat().st_size == file.size)


def _packs(found: DataSpec | OwnSet) -> list[Path]:
    key = found.key if isinstance(found, OwnSet) else found.name
    folder = cache_dir("packs", key)
    return sorted(p for p in folder.iterdir() if (p / "meta.json").exists()) if folder.is_dir() else []


def _own() -> dict[str, dict[str, Any]]:
    return read_json(user_dir("data.json")) or {}


def _local(text: str) -> Path:
    """A path as it was typed. Raises UsageError for a URL."""
    if "://" in text:
        raise UsageError(f"`{text}` is a URL", hint="download it yourself, then give the path of what came")
    return Path(text).expanduser().absolute()


def _remove_tree(path: Path) -> bool:
    there = path.exists()
    shutil.rmtree(path, ignore_errors=True)
    return there
