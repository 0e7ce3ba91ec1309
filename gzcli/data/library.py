"""Lists, imports, checks and removes data sets. No heavy import at the top."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from gzcli.core.errors import MissingError, UsageError, matching
from gzcli.core.hints import Option, advice, gz
from gzcli.core.types import Say, silent
from gzcli.core.units import as_size, canonical_size
from gzcli.data.packs.open import alone, find_pack, is_here, packs_of
from gzcli.data.packs.pack import PackMeta
from gzcli.data.packs.source import at_hand
from gzcli.data.readers.images import content_of
from gzcli.data.readers.texts import lines_of, text_of
from gzcli.data.sets.benchmarks import Benchmark
from gzcli.data.sets.registry import (
    REGISTER,
    SPECS,
    DataSet,
    DataSpec,
    Form,
    OwnSet,
    check_files,
    imports,
    is_fetched,
    local,
    locate,
    own_set,
    raw_dir,
)
from gzcli.store import files
from gzcli.store.hub import HUB_SCHEME
from gzcli.store.paths import cache_dir, user_dir

LOCK_NAME = ".data.lock"  # in the user's folder: locked while the register is written
LISTED_KEYS = "name title classes channels size larger cached n_train n_val n_test licence citation download"
LISTED_KEYS += " multilabel extras embedded page path lost"
_ROW: dict[str, Any] = dict.fromkeys(LISTED_KEYS.split()) | {"larger": [], "cached": False, "download": 0}
_ROW |= {"multilabel": False, "extras": [], "embedded": False, "lost": False}


def listing() -> list[dict[str, Any]]:
    """A row for each set, known sets first, as dicts with these keys.

    name, title: the name for `--data`, and a description or the path.
    classes: number of classes.
    channels, size: channels and size of an image; None for an imported set that is not packed.
    larger: sizes that the publisher offers besides `size`.
    cached: whether it can be used without the network.
    n_train, n_val, n_test: number of images. n_val 0: validation images are split off from train.
    licence, citation, page: the publisher's terms, the paper, and the web page of the files.
    download: size of the download in bytes.
    multilabel, embedded, extras: as in `DataSpec`.
    path, lost: path of an imported set, and whether it no longer exists.

    The files of an imported set are not looked at, because there may be millions.
    """
    rows = []
    for spec in SPECS.values():
        row = {key: getattr(spec, key, value) for key, value in _ROW.items()}
        row |= {"classes": spec.n_classes, "larger": [size for size, _ in spec.larger]}
        row |= {"cached": is_here(spec)}
        row |= {"download": spec.download_size, "extras": list(spec.extras), "page": spec.page or None}
        rows.append(row)
    return rows + [_own_row(name, line) for name, line in imports().items()]


def _own_row(name: str, line: dict[str, Any]) -> dict[str, Any]:
    """The row of an imported set, from its newest pack even if its files have changed since."""
    own_images = own_set(name, line)
    newest = max(packs_of(own_images), key=lambda pack: pack.meta_file.stat().st_mtime, default=None)
    row = {key: line.get(key, value) for key, value in _ROW.items()}
    row |= {"name": name, "title": line["path"], "lost": not own_images.path.exists()}
    if newest and (meta := PackMeta.read(newest)):
        row |= {"classes": len(meta.classes), "channels": meta.shape[0], "size": as_size(*meta.shape[1:])}
        row |= {"n_train": meta.counts["train"] + meta.counts["val"], "n_val": 0}
        row |= {"n_test": meta.counts["test"], "cached": True}
        row |= {"multilabel": meta.multilabel, "extras": list(meta.extras)}
    return row


def import_set(what: str | Path, name: str, form: Form | None = None) -> dict[str, Any]:
    """Checks the layout of images and registers them under a name.

    Returns name, path, classes, counts and `replaced`. If the same path had this name before, `replaced` has
    the changed settings, each as [before, now]; otherwise it is None.
    """
    from gzcli.data.readers.folder import open_path

    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", name):
        hint = "use letters, digits, `-` and `_`, such as `my-photos`"
        raise UsageError(f"`{name}` is not a valid name for a data set", hint=hint)
    if matching(name, SPECS):
        raise UsageError(
            f"gz has a data set named `{name}`", hint=advice("choose another {}", Option("name"))
        )
    on_hub = str(what).startswith(HUB_SCHEME)
    data_set = at_hand(locate(what)) if on_hub else None
    path = data_set.path if isinstance(data_set, OwnSet) else local(str(what))
    form = form or Form()
    if not path.exists():
        hint = "give the path of a folder, zip, tar or npz of images"
        raise MissingError(f"`{path}` does not exist", hint=hint)
    images = open_path(path, form)
    line = {"path": str(path), "size": form.size and canonical_size(form.size), "channels": form.channels}
    line |= {"skip_bad": form.skip_bad, "form": form.layout, "fit": form.fit, "classes": len(images.classes)}
    with files.lock(user_dir(LOCK_NAME)):
        files.remove_leftovers(user_dir())
        imported = imports()
        if name not in imported and matching(name, imported):
            hint = advice("choose another {}, or run {}", Option("name"), gz("data remove", name))
            raise UsageError(f"the name `{name}` is already used", hint=hint)
        if name in imported and imported[name]["path"] != str(path):
            hint = advice("choose another {}, or run {}", Option("name"), gz("data remove", name))
            raise UsageError(f"the name `{name}` is already used for `{imported[name]['path']}`", hint=hint)
        files.write_json(user_dir(REGISTER), {**imported, name: line})
    row = {"name": name, "path": str(path), "classes": list(images.classes), "counts": images.counts}
    before = imported.get(name)
    changes = {key: [before.get(key), line[key]] for key in line if before and before.get(key) != line[key]}
    return row | {"replaced": changes if before else None}


def data_path(what: DataSet | str | Path) -> Path:
    """The folder or file of a set: its pack, otherwise its downloaded files, otherwise the user's path."""
    data = locate(what)
    if pack := find_pack(data):
        return pack.folder
    if isinstance(data, OwnSet):
        return data.path
    if any(map(is_fetched, data.versions)):
        return raw_dir(data)
    raise MissingError(
        f"`{data.name}` is not in the cache", hint=advice("{}", gz("data download", data.name))
    )


def remove(what: DataSet | str | Path) -> list[Path]:
    """Removes packs, downloads and the imported name, but never the user's files. Returns what it removed."""
    data = locate(what)
    with alone(data):
        files.remove_leftovers(cache_dir("packs", data.key))
        folders = [pack.path for pack in packs_of(data)]
        if isinstance(data, DataSpec):
            folders += [raw_dir(data)]
            files.remove_leftovers(cache_dir("raw"))
        gone = [folder for folder in folders if folder.exists()]
        for folder in gone:
            try:
                files.remove_tree(folder)
            except OSError as e:
                message = f"`{folder}` cannot be removed: {e.strerror}"
                raise MissingError(message, hint="check whether the disk is read-only") from e
        if isinstance(data, OwnSet) and data.name:
            with files.lock(user_dir(LOCK_NAME)):
                files.write_json(user_dir(REGISTER), {k: v for k, v in imports().items() if k != data.name})
            gone.append(user_dir(REGISTER))  # the line in it
    return gone


def verify(what: DataSet | str | Path, *, say: Say = silent) -> dict[str, Any]:
    """Verifies every byte of files and packs. Returns {name, files, packs}, the checked paths."""
    data = locate(what)
    name, packs = data.reference, packs_of(data)
    versions = data.versions if isinstance(data, DataSpec) else ()
    sources = [str(path) for version in versions for path in check_files(version, say)]
    for pack in packs:
        say(f"checking `{pack.path}`")
        for part, digest in files.read_object(pack.meta_file).get("sha256", {}).items():
            file = pack.path / part
            if not file.exists() or files.checksum(file) != digest:
                remedy = f"run `gz data remove {name}`; gz will pack the set again when you use it"
                raise MissingError(f"the pack `{file}` is damaged", hint=remedy)
    if not sources and not packs:
        hint = advice("{}", gz("data download", name))
        if isinstance(data, OwnSet):
            if not data.path.exists():
                hint = advice("restore it, or run {}", gz("data remove", name))
                raise MissingError(f"`{data.path}`, imported as `{name}`, no longer exists", hint=hint)
            hint = advice("run {} to pack it", gz("train", "vae", data=name))
        if isinstance(data, OwnSet) or not (data.embedded or is_fetched(data)):
            raise MissingError(f"`{name}` is not in the cache", hint=hint)
    return {"name": name, "files": sources, "packs": [str(pack.path) for pack in packs]}


# --- OpenOOD's image lists (Zhang et al. 2023, arXiv:2306.09301) ---
# Its `data` folder holds `benchmark_imglist/cifar10/test_tin.txt`, whose lines are an image and a label, and
# the images below `images_classic`.

LISTS_FOLDER, PICTURES_FOLDER = "benchmark_imglist", "images_classic"
OPENOOD_NAMES = {"tinyimagenet": "tin", "dtd": "texture"}  # sets that have other names in OpenOOD


def list_of(root: Path, benchmark: Benchmark, name: str) -> Path | None:
    """The list of a set's test images in a benchmark; None if there is none."""
    if not (root / LISTS_FOLDER).is_dir():
        hint = f"give OpenOOD's `data` folder, which contains `{LISTS_FOLDER}` and `{PICTURES_FOLDER}`"
        raise MissingError(f"`{root}` has no `{LISTS_FOLDER}`", hint=hint)
    path = root / LISTS_FOLDER / benchmark.inside / f"test_{OPENOOD_NAMES.get(name, name)}.txt"
    return path if path.is_file() else None


def _is_linked(link: Path, source: Path) -> bool:
    """Whether a link, or a copy, of an image is whole."""
    return link.is_file() and link.stat().st_size == source.stat().st_size


def listed_images(root: Path, benchmark: Benchmark, name: str) -> OwnSet:
    """The images of a list, in its order, as a data set of links in the cache."""
    path = list_of(root, benchmark, name)
    if path is None:
        raise MissingError(f"`{root}` has no list of `{name}` for `{benchmark.name}`")
    text = text_of(content_of(path), path.name, str(root))
    lines = [line.strip().rsplit(maxsplit=1)[0] for line in lines_of(text) if line.strip()]
    below = root / PICTURES_FOLDER
    sources = [(below / line).absolute() for line in lines]
    if lost := [source for source in sources if not files.is_below(source, below)]:
        hint = "download them with OpenOOD's download script"
        some = f"{len(lost):,} of the {len(sources):,} images in `{path}`"
        raise MissingError(f"{some} are not files below `{below}`, such as `{lost[0]}`", hint=hint)
    digest = hashlib.sha256(os.fsencode("\n".join(map(str, sources)))).hexdigest()[:16]
    folder = cache_dir("imglists", f"{name}-{digest}")
    links = {f"{i:06d}{source.suffix}": source for i, source in enumerate(sources)}
    with files.lock(folder.with_name(f".{folder.name}.lock")):
        if not all(_is_linked(folder / link, source) for link, source in links.items()):
            files.remove_leftovers(folder.parent)
            with files.new_dir(folder) as part:
                for link, source in links.items():
                    files.link_or_copy(source, part / link)
    return OwnSet(folder, form=Form(layout="flat"))
