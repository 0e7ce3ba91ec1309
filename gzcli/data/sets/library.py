"""Lists data sets, imports the user's own, checks and removes them. No heavy import at the top."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gzcli.core.errors import MissingError, UsageError, matching
from gzcli.core.units import as_size, canonical_size
from gzcli.data.download.raw import check_files, is_fetched, raw_dir
from gzcli.data.packs import in_use
from gzcli.data.packs.cached import find_pack, meta_of, packs_of
from gzcli.data.packs.forms import Form, Say, silent
from gzcli.data.sets.names import REGISTER, DataSet, OwnSet, imports, local, locate, own_set
from gzcli.data.sets.sets import SPECS
from gzcli.data.sets.specs import DataSpec
from gzcli.store.files import checksum, lock, read_object, remove_tree, sweep, write_json
from gzcli.store.paths import cache_dir, user_dir

LOCK = ".data.lock"  # in the user's folder: held while the register is written


def listing() -> list[dict[str, Any]]:
    """A row for each set, known sets first, as dicts with these keys.

    name, title: as `--data` takes it, and what it shows or its path.
    classes: how many.
    channels, size: of an image, as `data.size` has it; None for an imported set that is not packed.
    larger: sizes that the publisher offers beside `size`.
    cached: whether it can be used without the network.
    n_train, n_val, n_test: images; n_val 0: validation is carved from train.
    licence, citation, page: the publisher's terms, the paper, and where a browser gets the files.
    download: bytes.
    multilabel, embedded: as in `DataSpec`.
    extras: what comes with each image.
    path, lost: of an imported set, and whether nothing is there any more.

    None of the files of an imported set is looked at: there may be millions.
    """
    return [_known_row(spec) for spec in SPECS.values()] + [
        _own_row(name, line) for name, line in imports().items()
    ]


def _known_row(spec: DataSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "title": spec.title,
        "classes": spec.n_classes,
        "channels": spec.channels,
        "size": spec.size,
        "larger": [size for size, _ in spec.larger],
        "cached": spec.embedded or bool(packs_of(spec)) or any(map(is_fetched, spec.versions)),
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


def _own_row(name: str, line: dict[str, Any]) -> dict[str, Any]:
    """What the newest pack of an imported set holds, whatever has become of its files since."""
    metas = [folder / "meta.json" for folder in packs_of(own_set(name, line))]
    meta = meta_of(max(metas, key=lambda path: path.stat().st_mtime).parent) if metas else None
    counts = meta["counts"] if meta else {}
    return {
        "name": name,
        "title": line["path"],
        "classes": len(meta["classes"]) if meta else line["classes"],
        "channels": meta["shape"][0] if meta else line["channels"],
        "size": as_size(*meta["shape"][1:]) if meta else line["size"],
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
        "path": line["path"],
        "lost": not Path(line["path"]).exists(),
    }


def import_set(what: str | Path, name: str, form: Form | None = None) -> dict[str, Any]:
    """Registers images under a name, after a look at their layout. Returns name, path, classes and counts.

    what: the path of a folder, zip, tar, npz or dataset folder.
    name: the name.
    form: how the images are read and packed from now on.

    Raises UsageError for a name that is taken or malformed, MissingError for a path without images.
    """
    from gzcli.data.readers.own import open_path

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", name):
        raise UsageError(
            f"`{name}` cannot be a data set's name", hint="use letters, digits, `-` and `_`, as `my-photos`"
        )
    if matching(name, SPECS):
        raise UsageError(f"`{name}` is a data set of gz already", hint="choose another `--name`")
    path, form = local(str(what)), form or Form()
    if not path.exists():
        raise MissingError(
            f"there is no `{path}`", hint="give the path of a folder, zip, tar or npz of images"
        )
    found = open_path(path, form)
    line = {
        "path": str(path),
        "size": form.size and canonical_size(form.size),
        "channels": form.channels,
        "skip_bad": form.skip_bad,
        "form": form.layout,
        "classes": len(found.classes),
    }
    with lock(user_dir(LOCK)):
        sweep(user_dir())
        imported = imports()
        if name not in imported and matching(name, imported):
            raise UsageError(f"`{name}` is taken", hint=f"`gz data remove {name}` frees it")
        if name in imported and imported[name]["path"] != str(path):
            raise UsageError(
                f"`{name}` is taken by `{imported[name]['path']}`", hint=f"`gz data remove {name}` frees it"
            )
        write_json(user_dir(REGISTER), {**imported, name: line})
    return {"name": name, "path": str(path), "classes": list(found.classes), "counts": found.counts}


def data_path(what: DataSet | str | Path) -> Path:
    """The folder or file of a set: its pack, else its downloaded files, else the user's path. Raises
    MissingError where there is none of these."""
    found = locate(what)
    if packed := find_pack(found):
        return packed.folder
    if isinstance(found, OwnSet):
        return found.path
    if any(map(is_fetched, found.versions)):
        return raw_dir(found)
    raise MissingError(f"`{found.name}` is not in the cache", hint=f"`gz data download {found.name}`")


def remove(what: DataSet | str | Path) -> list[Path]:
    """Removes packs, downloaded files and the imported name; never the user's own files. Returns what was
    removed.

    Raises UsageError where another process uses the set.
    """
    found = locate(what)
    with in_use.alone(found):
        sweep(cache_dir("packs", found.key))
        gone = [folder for folder in packs_of(found) if _remove_tree(folder)]
        if isinstance(found, DataSpec):
            gone += [raw_dir(found)] if _remove_tree(raw_dir(found)) else []
            sweep(cache_dir("raw"))
        elif found.name:
            with lock(user_dir(LOCK)):
                write_json(user_dir(REGISTER), {k: v for k, v in imports().items() if k != found.name})
            gone.append(user_dir(REGISTER))  # the line in it
    return gone


def verify(what: DataSet | str | Path, *, say: Say = silent) -> dict[str, Any]:
    """Re-reads every byte of the downloaded files and packs. Returns {name, files, packs}, the paths that
    were checked.

    Raises MissingError that names the first damaged file, or that there is nothing to check.
    """
    found = locate(what)
    name, packs = found.reference, packs_of(found)
    versions = found.versions if isinstance(found, DataSpec) else ()
    files = [str(path) for version in versions for path in check_files(version, say)]
    for folder in packs:
        say(f"checking `{folder}`")
        for part, digest in read_object(folder / "meta.json").get("sha256", {}).items():
            if not (folder / part).exists() or checksum(folder / part) != digest:
                again = f"`gz data remove {name}` drops it; the next use packs it again"
                raise MissingError(f"the pack `{folder / part}` is damaged", hint=again)
    if not files and not packs:
        _explain_nothing(found)
    return {"name": name, "files": files, "packs": list(map(str, packs))}


def _explain_nothing(found: DataSet) -> None:
    """Raises MissingError for a set without files and packs, unless it needs none in the cache."""
    name = found.reference
    if isinstance(found, DataSpec):
        if found.embedded or is_fetched(found):
            return
        hint = f"`gz data download {name}`"
    elif found.path.exists():
        hint = f"`gz train vae --data {name}` packs it"
    else:
        raise MissingError(
            f"`{found.path}`, imported as `{name}`, is gone",
            hint=f"`gz data remove {name}`, or bring it back",
        )
    raise MissingError(f"nothing of `{name}` is in the cache", hint=hint)


def _remove_tree(path: Path) -> bool:
    """Whether there was such a folder, which is gone now. Raises MissingError where it cannot be removed."""
    if not path.exists():
        return False
    try:
        remove_tree(path)
    except OSError as e:
        raise MissingError(f"`{path}` cannot be removed: {e.strerror}", hint="is the disk read-only?") from e
    return True
