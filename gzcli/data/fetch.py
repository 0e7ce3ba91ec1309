"""Downloads that are whole or not there: from a mirror or the publisher, checked, locked, renamed into
place."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from gzcli.data import http
from gzcli.data.http import size_of, wrong_size
from gzcli.data.library import SPLIT_FOLDERS, is_fetched, is_there, raw_dir
from gzcli.data.request import DISK, Refused, joined
from gzcli.data.sets import SPECS
from gzcli.data.specs import DataFile, DataSpec, find
from gzcli.errors import GzError, MissingError, UsageError
from gzcli.store.files import fsync, lock, need_space
from gzcli.store.paths import cache_dir
from gzcli.store.weights import offline

# bytes from which the need of disk is told before a download, and that a checksum takes its time
LARGE = 200_000_000
BLOCK = 1 << 20

Report = Callable[[int, int], None]  # report(bytes done, bytes in all)
Say = Callable[[str], None]


class _Wrong(Refused):
    """Whole, but not the publisher's bytes."""


def fetch(
    what: str | DataSpec,
    *,
    source: str | None = None,
    pack_size: int = 0,
    progress: Report = lambda done, total: None,
    say: Say = lambda text: None,
) -> Path:
    """Every file of a set, into the cache; files that are there already are not fetched again. Returns their
    folder.

    `source` (`--from`) is a folder, a file or a URL to take them from; else `GZ_MIRROR` (a folder or base URL
    that holds NAME/FILE) is asked first, then the publisher. Under `GZ_OFFLINE=1` only local files are taken.
    Those of a
    `linked` set stay where they are. `pack_size` are the bytes that will be needed beside the files.
    Raises MissingError: offline, not found, not what it should be, no space; what came so far is kept for a
    resume unless it was wrong.
    """
    spec = find(what) if isinstance(what, str) else what
    folder = raw_dir(spec)
    with (
        _disk_errors(folder),
        lock(
            cache_dir("raw", f".{spec.name}.lock"),
            on_wait=lambda: say(f"another process is downloading `{spec.name}`: waiting"),
        ),
    ):
        if not is_fetched(spec):
            _fetch_missing(spec, folder, source, pack_size, progress, say)
    return folder


def has_local_mirror() -> bool:
    """Whether `GZ_MIRROR` is a folder: then fetching needs no network."""
    mirror = os.environ.get("GZ_MIRROR", "")
    return bool(mirror) and not _is_url(mirror)


def _fetch_missing(
    spec: DataSpec, folder: Path, source: str | None, pack_size: int, progress: Report, say: Say
) -> None:
    linked = spec.linked and source is not None and _link_folders(spec, folder, _local(source))
    missing = [] if linked else [file for file in spec.files if not is_there(spec, file)]
    addresses = {file.name: _addresses(spec, file, source) for file in missing}
    if linked or any(addresses.values()):
        copied = [f for f in missing if not spec.linked or any(map(_is_url, addresses[f.name]))]
        _tell_need(spec, folder, copied, pack_size, say)
    folder.mkdir(parents=True, exist_ok=True)
    done = sum(size_of(folder / file.name) for file in spec.files if file not in missing)
    refused: dict[str, str] = {}
    for i, file in enumerate(missing):
        report = _reporter(progress, done, file, sum(f.size for f in missing[i + 1 :]))
        try:
            _fetch_file(spec, file, folder / file.name, addresses[file.name], report, say)
        except Refused as e:
            refused[file.name] = str(e)
            if not spec.page:
                break
        done += size_of(folder / file.name)
    if refused:
        kept = sum(http.held(_part(folder / name)) for name in refused)
        online = any(_is_url(address) for name in refused for address in addresses[name])
        raise _not_had(spec, refused, kept, online)
    progress(done, done)


def _tell_need(spec: DataSpec, folder: Path, files: list[DataFile], pack_size: int, say: Say) -> None:
    """Says what is to be fetched and how much disk that takes, if it is much. Raises MissingError if it is
    not free."""
    need = sum(max(0, file.size - http.held(_part(folder / file.name))) for file in files)
    if max(need, pack_size) > LARGE:
        free = shutil.disk_usage(folder.parent).free
        parts = [f"fetching {need / 1e6:,.0f} MB into `{folder}`"] if need else []
        parts += [f"its pack will take {pack_size / 1e6:,.0f} MB"] if pack_size else []
        say(f"`{spec.name}`: {', '.join(parts)}; {free / 1e6:,.0f} MB are free")
    joining = max(
        (file.size // http.PIECES for file in files if file.size >= http.LARGE), default=0
    )  # a piece twice
    need_space(folder, need + max(joining, pack_size))


def _reporter(progress: Report, before: int, file: DataFile, after: int) -> http.Report:
    """report(bytes of this file, its size if the server told it) as progress over the whole set."""
    return lambda n, size: progress(before + n, before + max(n, size or file.size) + after)


def _addresses(spec: DataSpec, file: DataFile, source: str | None) -> list[str]:
    """Where to look for a file, in order: paths or http(s) URLs."""
    if source is not None:
        return _from_source(spec, file, _local(source))
    addresses = list(file.urls)
    if mirror := os.environ.get("GZ_MIRROR"):
        addresses.insert(0, _join(_local(mirror), spec.name, file.name))
    if offline() and any(map(_is_url, addresses)):
        addresses = [a for a in addresses if not _is_url(a)]
        if not addresses:
            raise MissingError(
                f"`{spec.name}` is not in the cache and `GZ_OFFLINE` is set",
                hint=f"unset `GZ_OFFLINE`, then `gz data download {spec.name}`; or `--from DIR` with "
                f"`{file.name}`",
            )
    return addresses


def _from_source(spec: DataSpec, file: DataFile, source: str) -> list[str]:
    if _is_url(source):
        if offline():
            raise MissingError(
                f"`{source}` is on the network and `GZ_OFFLINE` is set", hint="unset `GZ_OFFLINE`"
            )
        last = urllib.parse.urlsplit(source).path.rsplit("/", 1)[-1]
        is_folder = last not in {f.name for f in spec.files}
    elif os.path.exists(source):
        last, is_folder = os.path.basename(source), os.path.isdir(source)
    else:
        raise MissingError(f"there is no `{source}`", hint="`--from` takes a folder, a file or a URL")
    if is_folder:
        both = [_join(source, file.name), _join(source, spec.name, file.name)]
        return both if _is_url(source) else [next(filter(os.path.exists, both), both[0])]
    if last != file.name and len(spec.files) > 1:
        every = ", ".join(f"`{f.name}`" for f in spec.files)
        raise UsageError(
            f"`{spec.name}` has {len(spec.files)} files, `{source}` is one",
            hint=f"give the folder of {every}",
        )
    return [source]


def _fetch_file(
    spec: DataSpec, file: DataFile, path: Path, addresses: list[str], report: http.Report, say: Say
) -> None:
    """One file from the first address that serves it right. Raises Refused."""
    reasons = [] if addresses else ["the publisher gives it out after a log-in only"]
    for address in addresses:
        try:
            if spec.linked and not _is_url(address):
                return _link(Path(address), file, path, report, say)
            return _bring(address, file, path, report, say)
        except Refused as e:
            reasons.append(f"`{address}` {e}")
    raise Refused("; ".join(reasons))


def _bring(address: str, file: DataFile, path: Path, report: http.Report, say: Say) -> None:
    """The bytes into the cache, whole and right."""
    part, kept = _part(path), http.held(_part(path))
    while True:
        if _is_url(address):
            http.download(address, part, file.size, exact=file.exact, report=report, say=say)
        else:
            _copy(Path(address), file, part, report)
        try:
            _check(file, part, say)
            break
        except _Wrong:
            http.drop(part)
            if not kept:
                raise
            kept = (
                0  # bytes of an earlier try, perhaps of another file, were among them: once more, from zero
            )
    fsync(part)
    os.replace(part, path)
    http.drop(part)


def _copy(source: Path, file: DataFile, part: Path, report: http.Report) -> None:
    size = _size_at(source, file)
    with open(source, "rb") as src, open(part, "wb") as out:
        while block := src.read(BLOCK):
            out.write(block)
            report(out.tell(), size)


def _link(source: Path, file: DataFile, path: Path, report: http.Report, say: Say) -> None:
    """A link at `path` to the user's file, once that is found right."""
    _size_at(source, file)
    _check(file, source, say, report)
    _symlink(source, path)


def _link_folders(spec: DataSpec, folder: Path, source: str) -> bool:
    """Links to `train` and `val` of the source, if these are folders of class folders."""
    for root in (Path(source), Path(source, spec.name)):
        splits = [root / name for name in SPLIT_FOLDERS]
        if all(split.is_dir() and any(entry.is_dir() for entry in os.scandir(split)) for split in splits):
            folder.mkdir(parents=True, exist_ok=True)
            for split in splits:
                _symlink(split, folder / split.name)
            return True
    return False


def _symlink(target: Path, path: Path) -> None:
    new = path.with_name(f"{path.name}.link")
    new.unlink(missing_ok=True)
    new.symlink_to(target.absolute())
    os.replace(new, path)


def _size_at(source: Path, file: DataFile) -> int:
    if not source.is_file():
        raise Refused("does not exist")
    if (size := source.stat().st_size) != file.size and file.exact:
        raise Refused(wrong_size(size, file.size))
    return size


def _check(file: DataFile, path: Path, say: Say, report: http.Report = lambda done, size: None) -> None:
    """Raises Refused (_Wrong) unless the checksum is the publisher's."""
    kind, want, size = "sha256" if file.sha256 else "md5", file.sha256 or file.md5, size_of(path)
    if size > LARGE:
        say(f"checking the {kind} of `{file.name}`, {size / 1e6:,.0f} MB")
    digest, head, done = hashlib.new(kind), b"", 0
    with open(path, "rb") as f:
        while block := f.read(BLOCK):
            head, done = head or block[:512].lstrip().lower(), done + len(block)
            digest.update(block)
            report(done, size)
    if digest.hexdigest() != want:
        if head.startswith((b"<!doctype html", b"<html")):
            raise _Wrong("answers with an HTML page instead of the file")
        raise _Wrong(f"has the wrong checksum: {kind} {digest.hexdigest()}, not {want}")


def _not_had(spec: DataSpec, refused: dict[str, str], kept: int, online: bool) -> MissingError:
    """What is missing, why, and how the user comes by it."""
    names, hints = ", ".join(f"`{name}`" for name in refused), []
    again = f"gz data download {spec.name}"
    if spec.size != SPECS.get(spec.name, spec).size:  # another of its publisher's sizes
        again += f" --size {spec.size}"
    if spec.page:
        hints.append(f"get {names} at {spec.page} with a browser, then `{again} --from DIR`")
    if spec.linked:
        hints.append("DIR may instead hold `train` and `val`, folders of class folders")
    if kept:
        hints.append(f"`{again}` goes on from the {kept / 1e6:,.1f} MB that came")
    elif not spec.page and online:
        hints.append(f"`{again}` tries again; `--from DIR` or `GZ_MIRROR` take the file from elsewhere")
    elif not spec.page:
        hints.append(f"`{again}` takes `--from DIR`, a folder with the publisher's {names}")
    reasons = "; ".join(dict.fromkeys(refused.values()))
    return MissingError(f"{names} of `{spec.name}` could not be had: {reasons}", hint="; ".join(hints))


def _is_url(address: str) -> bool:
    return address.startswith(("http://", "https://"))


def _local(address: str) -> str:
    """A `file://` URL as a path; anything else as it is."""
    if not address.startswith("file://"):
        return os.path.expanduser(address)
    return urllib.request.url2pathname(urllib.parse.urlsplit(address).path)


def _join(base: str, *parts: str) -> str:
    return joined(base, *parts) if _is_url(base) else "/".join([base.rstrip("/"), *parts])


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


@contextmanager
def _disk_errors(folder: Path):
    """A disk that is full or read-only, as a message."""
    try:
        yield
    except GzError:
        raise
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MissingError(
                f"the disk of `{folder}` is full", hint="free some space, or set `GZ_HOME` elsewhere"
            ) from e
        if e.errno in DISK:
            raise MissingError(
                f"`{folder}` cannot be written", hint="set `GZ_HOME` to a folder that can"
            ) from e
        raise
