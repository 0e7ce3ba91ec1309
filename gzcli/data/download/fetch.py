"""Files of data sets and weights of published networks, from a mirror or the publisher, under a lock. A file
appears in the cache once it is complete and its checksum is right."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gzcli.core.errors import DISK_ERRORS, GzError, MissingError, UsageError
from gzcli.core.hints import Option, advice
from gzcli.core.types import Report, Say, silent, unreported
from gzcli.core.units import size as size_in_words
from gzcli.data.download import http
from gzcli.data.download.http import Refused, address_parts, file_bytes, join_url, wrong_size
from gzcli.data.readers.hub import parquet_files
from gzcli.data.sets import registry
from gzcli.data.sets.registry import HUB, SPLIT_FOLDERS, DataFile, DataSpec
from gzcli.store.files import fsync, lock, make_folder, need_space
from gzcli.store.hub import CLIP, DINOV2, HUB_SCHEME, INCEPTION, VGG, data_repository, offline
from gzcli.store.paths import cache_dir

# From this size in bytes, gz prints the disk space of a download, and that it computes a checksum.
ANNOUNCED_BYTES = 200_000_000
BLOCK_BYTES = 1 << 20  # bytes read at a time


def fetch(
    what: str | DataSpec,
    *,
    source: str | None = None,
    pack_size: int = 0,
    progress: Report = unreported,
    say: Say = silent,
) -> Path:
    """Fetches the missing files of a set into the cache; returns their folder. A `linked` set is linked.

    source: folder, file or URL of the files (`--from`), instead of the publisher or `GZ_MIRROR`, a folder or
      base URL with NAME/FILE.
    pack_size: bytes that the pack will need beside the files.

    Raises MissingError if a file cannot be fetched, has a wrong checksum, or does not fit on the disk;
    an incomplete file is kept for a resume.
    """
    spec = registry.find(what) if isinstance(what, str) else what
    folder = registry.raw_dir(spec)
    with _alone(spec.name, folder.with_name(f".{spec.name}.lock"), say):
        _fetch_missing(spec, folder, source, pack_size, progress, say)
    return folder


def _fetch_missing(
    spec: DataSpec, folder: Path, source: str | None, pack_size: int, progress: Report, say: Say
) -> None:
    if registry.is_fetched(spec):
        return
    linked = spec.linked and source is not None and _link_folders(spec, folder, local_path(source))
    missing = [] if linked else [file for file in spec.files if not registry.is_there(spec, file)]
    places = {file.name: _addresses_of(spec, file, source) for file in missing}
    if linked or any(places.values()):
        copied = [f for f in missing if not spec.linked or any(map(is_url, places[f.name]))]
        _say_need(spec, folder, copied, pack_size, say)
    make_folder(folder)
    before = sum(file_bytes(folder / file.name) for file in spec.files if file not in missing)
    after = sum(file.size for file in missing)
    refused: dict[str, str] = {}

    def report(received: int, total: int) -> None:
        progress(before + received, before + total + after)

    for file in missing:
        after -= file.size
        try:
            _fetch_file(file, folder / file.name, places[file.name], report, say, linked=spec.linked)
        except Refused as e:
            refused[file.name] = str(e)
            if not spec.page:
                break
        before += file_bytes(folder / file.name)
    if refused:
        received = sum(file_bytes(_part(folder / name)) for name in refused)
        online = any(is_url(address) for name in refused for address in places[name])
        raise _unobtainable(spec, refused, received, online)
    progress(before, before)


def _say_need(spec: DataSpec, folder: Path, files: list[DataFile], pack_size: int, say: Say) -> None:
    """Reports how much disk space a large download needs; raises MissingError if there is less."""
    need = sum(max(0, file.size - file_bytes(_part(folder / file.name))) for file in files)
    if max(need, pack_size) > ANNOUNCED_BYTES:
        free = shutil.disk_usage(folder.parent).free
        parts = [f"downloading {size_in_words(need)} to `{folder}`"] if need else []
        parts += [f"the pack will take {size_in_words(pack_size)}"] if pack_size else []
        say(f"`{spec.name}`: {', '.join(parts)}; {size_in_words(free)} free")
    need_space(folder, need + pack_size)


def _unobtainable(spec: DataSpec, refused: dict[str, str], received: int, online: bool) -> MissingError:
    """The error for files that no address provides, with other ways to get them."""
    names, hints = ", ".join(f"`{name}`" for name in refused), []
    command = f"gz data download {spec.name}"
    if spec.size != registry.SPECS.get(spec.name, spec).size:  # the set in another of its publisher's sizes
        command += f" --size {spec.size}"
    if spec.page:
        hints.append(f"download {names} from {spec.page} in a browser, then run `{command} --from DIR`")
    if spec.linked:
        hints.append("DIR may instead contain `train` and `val`, each with a folder for each class")
        if spec.hub:
            hints.append(f"or set `HF_TOKEN` and run `{command} --from {HUB_SCHEME}{spec.hub}`")
    if received:
        hints.append(f"run `{command}` to resume after {size_in_words(received)}")
    elif not spec.page and online:
        hints.append(f"run `{command}` to try again; `--from DIR` and `GZ_MIRROR` set another source")
    elif not spec.page:
        hints.append(f"run `{command} --from DIR`, where DIR contains the publisher's {names}")
    reasons = "; ".join(dict.fromkeys(refused.values()))
    return MissingError(f"{names} of `{spec.name}` could not be downloaded: {reasons}", hint="; ".join(hints))


# --- sources of a file ---


def is_url(address: str) -> bool:
    return address.startswith(("http://", "https://"))


def local_path(address: str) -> str:
    """The path of a `file://` URL; anything else unchanged except for `~`."""
    if not address.startswith("file://"):
        return os.path.expanduser(address)
    return urllib.request.url2pathname(address_parts(address).path)


def has_local_mirror() -> bool:
    """Whether `GZ_MIRROR` is a folder: then fetching needs no network."""
    mirror = os.environ.get("GZ_MIRROR", "")
    return bool(mirror) and not is_url(mirror)


def _addresses(folder: str, file: DataFile) -> list[str]:
    """The addresses of a file: in the mirror as WEIGHTS_FOLDER/FILE, then at its publisher. Under
    `GZ_OFFLINE`, only paths."""
    mirror = os.environ.get("GZ_MIRROR")
    every = [*([_join(local_path(mirror), folder, file.name)] if mirror else []), *file.urls]
    return [address for address in every if not (offline() and is_url(address))]


def _addresses_of(spec: DataSpec, file: DataFile, source: str | None) -> list[str]:
    """The paths or URLs at which gz looks for a file of a set, in order. The user's source is a folder with
    FILE or NAME/FILE, or the file itself."""
    if source is None:
        addresses = _addresses(spec.name, file)
        if not addresses and (file.urls or os.environ.get("GZ_MIRROR")):
            command = f"`gz data download {spec.name}`; or add `--from DIR` if DIR contains `{file.name}`"
            message = f"`{spec.name}` is not in the cache and `GZ_OFFLINE` is set"
            raise MissingError(message, hint=f"unset `GZ_OFFLINE`, then run {command}")
        return addresses
    source = local_path(source)
    if is_url(source):
        if offline():
            hint = "unset `GZ_OFFLINE`"
            raise MissingError(f"`{source}` is a URL, but `GZ_OFFLINE` is set", hint=hint)
        last = address_parts(source).path.rsplit("/", 1)[-1]
        is_folder = last not in {f.name for f in spec.files}
    elif os.path.exists(source):
        last, is_folder = os.path.basename(source), os.path.isdir(source)
    else:
        raise MissingError(
            f"`{source}` does not exist", hint=advice("give {} a folder, a file or a URL", Option("from"))
        )
    if is_folder:
        local_names = [_join(source, file.name), _join(source, spec.name, file.name)]
        return local_names if is_url(source) else [next(filter(os.path.exists, local_names), local_names[0])]
    if last != file.name and len(spec.files) > 1:
        every = ", ".join(f"`{f.name}`" for f in spec.files)
        hint = f"give the folder that contains {every}"
        raise UsageError(f"`{spec.name}` has {len(spec.files)} files, but `{source}` is one file", hint=hint)
    return [source]


def _join(base: str, *parts: str) -> str:
    return join_url(base, *parts) if is_url(base) else "/".join([base.rstrip("/"), *parts])


# --- one file ---


class _Wrong(Refused):
    """The file is complete, but its checksum is not the publisher's."""


def _fetch_file(
    file: DataFile, path: Path, addresses: list[str], report: Report, say: Say, *, linked: bool = False
) -> None:
    """Downloads a file from the first address with the right bytes, or links to it. Raises Refused if there
    is none."""
    reasons = [] if addresses else ["the publisher requires a login"]
    for address in addresses:
        try:
            if linked and not is_url(address):
                _refuse_size(Path(address), file)
                _check(file, Path(address), say, report)
                _link(Path(address), path)
            else:
                _copy(address, file, path, report, say)
            return
        except Refused as e:
            reasons.append(f"`{address}` {e}")
    raise Refused("; ".join(reasons))


def _copy(address: str, file: DataFile, path: Path, report: Report, say: Say) -> None:
    """Copies a file into the cache. It appears there once it is complete and its checksum is right."""
    part, anew = _part(path), False
    http.clear(part)
    while True:
        resumed = False
        if is_url(address):
            resumed = http.download(address, part, file.size, exact=file.exact, report=report, say=say)
        else:
            _refuse_size(Path(address), file)
            with open(address, "rb") as source, open(part, "wb") as out:
                while block := source.read(BLOCK_BYTES):
                    out.write(block)
                    report(out.tell(), max(out.tell(), file.size))
        try:
            _check(file, part, say)
            break
        except _Wrong:
            part.unlink(missing_ok=True)
            if anew or not resumed:
                raise
            anew = True  # it came in parts, one of which may be from another file: download again from zero
    fsync(part)
    os.replace(part, path)
    part.unlink(missing_ok=True)


def _refuse_size(source: Path, file: DataFile) -> None:
    """Raises Refused if the size of a local file differs from the publisher's."""
    if not source.is_file():
        raise Refused("does not exist")
    if (size := source.stat().st_size) != file.size and file.exact:
        raise Refused(wrong_size(size, file.size))


def _check(file: DataFile, path: Path, say: Say, report: Report = unreported) -> None:
    """Raises _Wrong unless the checksum is the publisher's."""
    kind, checksum, size = "sha256" if file.sha256 else "md5", file.sha256 or file.md5, file_bytes(path)
    if size > ANNOUNCED_BYTES:
        say(f"checking the {kind} of `{file.name}` ({size_in_words(size)})")
    digest, head = hashlib.new(kind), b""
    with open(path, "rb") as f:
        while block := f.read(BLOCK_BYTES):
            head = head or block[:512].lstrip().lower()
            digest.update(block)
            report(f.tell(), size)
    if digest.hexdigest() != checksum:
        if head.startswith((b"<!doctype html", b"<html")):
            raise _Wrong("returned an HTML page instead of the file")
        raise _Wrong(f"has the wrong checksum: {kind} {digest.hexdigest()} instead of {checksum}")


def _link_folders(spec: DataSpec, folder: Path, source: str) -> bool:
    """Links to the hub's copy or to folders `train` and `val`, if the source contains one of these."""
    targets: dict[str, Path] = {}
    if source.startswith(HUB_SCHEME):
        targets[HUB] = data_repository(source.removeprefix(HUB_SCHEME))
    else:
        for root in (Path(source), Path(source, spec.name)):
            splits = [root / name for name in SPLIT_FOLDERS]
            if not targets and all(s.is_dir() and any(e.is_dir() for e in os.scandir(s)) for s in splits):
                targets = {split.name: split for split in splits}
        if not targets and Path(source).is_dir() and parquet_files(Path(source)):
            targets[HUB] = Path(source)
    for name, target in targets.items():
        make_folder(folder)
        _link(target, folder / name)
    return bool(targets)


def _link(target: Path, path: Path) -> None:
    """Replaces `path` by a link."""
    new = path.with_name(f"{path.name}.link")
    new.unlink(missing_ok=True)
    new.symlink_to(target.absolute())
    os.replace(new, path)


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


@contextmanager
def _alone(name: str, lock_file: Path, say: Say) -> Iterator[None]:
    """Within the block, no other process downloads the same files. Errors of a full or read-only disk become
    messages."""
    try:
        with lock(lock_file, on_wait=lambda: say(f"waiting: another process is downloading `{name}`")):
            yield
    except GzError:
        raise
    except OSError as e:
        if e.errno not in DISK_ERRORS:
            raise
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free some space, or set `GZ_HOME` to a folder on another disk"
            raise MissingError(f"the disk of `{lock_file.parent}` is full", hint=hint) from e
        hint = "set `GZ_HOME` to a folder that you can write to"
        raise MissingError(f"`{lock_file.parent}` is not writable", hint=hint) from e


# --- weights of published networks ---

WEIGHTS_FOLDER = "weights"  # its name in the cache and in a mirror


@dataclass(frozen=True)
class Weights:
    """A file of weights."""

    file: DataFile
    title: str  # its content, in a line
    licence: str  # the publisher's terms, in a line
    otherwise: str = ""  # alternatives for the user, for the hint


def _weights(name: str, *, urls: list[str], size: int, sha256: str, **further: str) -> Weights:
    """The file of this name that an entry of `weights.json` describes."""
    return Weights(DataFile(name, tuple(urls), size, sha256=sha256), **further)


_ROWS = json.loads(Path(__file__).with_name("weights.json").read_bytes())
_NAMES = {"inception": INCEPTION, "vgg16": VGG, "dinov2": DINOV2, "clip": CLIP}
JUDGE_WEIGHTS = {key: _weights(name, **_ROWS[key]) for key, name in _NAMES.items()}


def fetch_weights(name: str, *, progress: Report = unreported, say: Say = silent) -> Path | None:
    """The path of a file of JUDGE_WEIGHTS in the cache, downloaded from `GZ_MIRROR` (weights/FILE) or its
    publisher if it is missing; None if `GZ_OFFLINE` forbids that."""
    weights = JUDGE_WEIGHTS[name]
    file, path = weights.file, cache_dir(WEIGHTS_FOLDER, weights.file.name)
    addresses = _addresses(WEIGHTS_FOLDER, file)
    if path.is_file() or not addresses:
        return path if path.is_file() else None
    with _alone(file.name, path.with_name(f".{file.name}.lock"), say):
        if path.is_file():
            return path
        what = f"{weights.title} ({size_in_words(file.size)}, licence: {weights.licence})"
        say(f"downloading {what} from {addresses[0]}")
        need_space(path.parent, file.size - file_bytes(_part(path)))
        try:
            _fetch_file(file, path, addresses, progress, say)
        except Refused as e:
            hint = f"save the file as `{path}` {weights.otherwise}".rstrip()
            raise MissingError(f"`{file.name}` could not be downloaded: {e}", hint=hint) from e
    return path
