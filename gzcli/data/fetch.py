"""Downloads that are whole or not there: resumed by range, checked by size and checksum, locked, renamed into place."""

from __future__ import annotations

import errno
import http.client
import os
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from gzcli.data.library import raw_dir
from gzcli.data.specs import DataFile, DataSpec, find
from gzcli.errors import GzError, MissingError, UsageError
from gzcli.store.files import checksum, fsync, lock, need_space
from gzcli.store.paths import cache_dir

TIMEOUT = 30.0  # seconds without a byte until a connection counts as stalled
TRIES = 4  # attempts in a row that bring nothing new, with back-off
BACKOFF = 1.0  # seconds before the second attempt; doubled each time
BLOCK = 1 << 18

_FULL = (errno.ENOSPC, errno.EDQUOT)
_DISK = (*_FULL, errno.EROFS, errno.EACCES, errno.EPERM)

Report = Callable[[int, int], None]  # report(bytes done, bytes in all)
Got = Callable[[int], None]  # bytes of this file so far
Say = Callable[[str], None]


class _Refused(Exception):
    """This address will not serve the file: the next one is tried."""


class _Again(Exception):
    """A fault that may pass: stalled, cut off, 5xx. `wait` seconds are asked for by the server."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


def fetch(
    what: str | DataSpec,
    *,
    source: str | None = None,
    progress: Report | None = None,
    say: Say = lambda text: None,
) -> Path:
    """Every file of a set, into the cache; files that are there already are not fetched again. Returns their folder.

    `source` (`--from`) is a folder, a file or a URL to take them from; else `GZ_MIRROR` (a folder or base URL that
    holds NAME/FILE) is asked first, then the publisher. Under `GZ_OFFLINE=1` only local files are taken.
    Raises MissingError: offline, not found, not what it should be, no space; what came so far is kept for a resume
    unless it was wrong.
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
        missing = [file for file in spec.files if not _is_there(folder / file.name, file)]
        done, total = spec.download_size - sum(file.size for file in missing), spec.download_size
        need_space(folder, sum(file.size - _size(_part(folder / file.name)) for file in missing))
        for file in missing:
            folder.mkdir(parents=True, exist_ok=True)
            report = (lambda n, base=done: progress(base + n, total)) if progress else (lambda n: None)
            _fetch_file(spec, file, folder / file.name, _addresses(spec, file, source), report, say)
            done += file.size
        if progress:
            progress(total, total)
    return folder


def offline() -> bool:
    return os.environ.get("GZ_OFFLINE", "") not in ("", "0")


def has_local_mirror() -> bool:
    """Whether `GZ_MIRROR` is a folder: then fetching needs no network."""
    mirror = os.environ.get("GZ_MIRROR", "")
    return bool(mirror) and not mirror.startswith(("http://", "https://"))


def _addresses(spec: DataSpec, file: DataFile, source: str | None) -> list[str]:
    """Where to look for a file, in order: paths or http(s) URLs."""
    if source is not None:
        return _from_source(spec, file, str(source))
    addresses = list(file.urls)
    if mirror := os.environ.get("GZ_MIRROR"):
        addresses.insert(0, _join(_local(mirror), spec.name, file.name))
    if offline():
        addresses = [a for a in addresses if not _is_url(a)]
        if not addresses:
            raise MissingError(
                f"`{spec.name}` is not in the cache and `GZ_OFFLINE` is set",
                hint=f"unset `GZ_OFFLINE`, then `gz data download {spec.name}`; or `--from DIR` with `{file.name}`",
            )
    return addresses


def _from_source(spec: DataSpec, file: DataFile, source: str) -> list[str]:
    source = _local(source)
    if _is_url(source):
        if offline():
            raise MissingError(f"`{source}` is on the network and `GZ_OFFLINE` is set", hint="unset `GZ_OFFLINE`")
        whole = urllib.parse.urlsplit(source).path.rsplit("/", 1)[-1] in {f.name for f in spec.files}
        source_file = source if whole else _join(source, file.name)
        return [source_file] if whole else [source_file, _join(source, spec.name, file.name)]
    path = Path(source).expanduser()
    if path.is_dir():
        return [str(path / file.name), str(path / spec.name / file.name)]
    if not path.exists():
        raise MissingError(f"there is no `{path}`", hint="`--from` takes a folder, a file or a URL")
    if path.name != file.name and len(spec.files) > 1:
        every = ", ".join(f"`{f.name}`" for f in spec.files)
        raise UsageError(f"`{spec.name}` has {len(spec.files)} files, `{path}` is one", hint=f"give the folder of {every}")
    return [str(path)]


def _fetch_file(
    spec: DataSpec,
    file: DataFile,
    path: Path,
    addresses: list[str],
    report: Got,
    say: Say,
) -> None:
    """One file from the first address that serves it right."""
    reasons, local_only = [], not any(map(_is_url, addresses))
    if _size(_part(path)):  # left by an earlier try, perhaps of another file: if it turns out wrong, once more from zero
        addresses = [addresses[0], *addresses]
    for address in addresses:
        try:
            if _is_url(address):
                _download(address, file, _part(path), report, say)
            else:
                _copy(Path(address), file, _part(path), report)
            _check(file, _part(path))
        except _Refused as e:
            reasons.append(f"`{address}` {e}")
            continue
        fsync(_part(path))
        os.replace(_part(path), path)
        return
    again = f"`gz data download {spec.name}`"
    if kept := _size(_part(path)):
        hint = f"{again} goes on from the {kept / 1e6:,.1f} MB that came"
    elif local_only:
        hint = f"{again} takes `--from DIR`, a folder with the publisher's `{file.name}`"
    else:
        hint = f"{again} tries again; `--from DIR` or `GZ_MIRROR` take the file from elsewhere"
    raise MissingError(f"`{file.name}` of `{spec.name}` could not be had: {'; '.join(reasons)}", hint=hint)


def _copy(source: Path, file: DataFile, part: Path, report: Got) -> None:
    """A local file into `part`."""
    if not source.is_file():
        raise _Refused("does not exist")
    if (size := source.stat().st_size) != file.size:
        raise _Refused(_wrong_size(size, file))
    with open(source, "rb") as src, open(part, "wb") as out:
        _pour(src, out, file, report)


def _download(url: str, file: DataFile, part: Path, report: Got, say: Say) -> None:
    """A file over HTTP into `part`, from where the part ends; tries again while it may help. An attempt that brought
    bytes does not count."""
    failures, had = 0, _size(part)
    while _size(part) != file.size:
        try:
            _attempt(url, file, part, report)
        except _Again as e:
            failures = 0 if _size(part) > had else failures + 1
            had = _size(part)
            if failures >= TRIES:
                raise _Refused(f"{e}, {TRIES} times in a row") from e
            wait = max(min(e.wait, 60.0), BACKOFF * 2 ** max(failures - 1, 0))
            say(f"{url}: {e}; trying again in {wait:.0f} s")
            time.sleep(wait)


def _attempt(url: str, file: DataFile, part: Path, report: Got) -> None:
    """One request for what is missing of the part. A server that ignores the range sends the whole file: start anew."""
    start = _size(part)
    request = urllib.request.Request(url, headers={"User-Agent": "gz", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            if "text/html" in answer.headers.get("Content-Type", ""):
                raise _Refused("answers with an HTML page instead of the file")
            resumed = answer.status == 206 and _range_start(answer.headers.get("Content-Range")) == start
            if start and answer.status == 206 and not resumed:
                part.unlink()
                raise _Again("sent another range than asked for")
            length = answer.headers.get("Content-Length")
            if length is not None and (size := int(length) + (start if resumed else 0)) != file.size:
                part.unlink(missing_ok=True)
                raise _Refused(_wrong_size(size, file))
            with open(part, "ab" if resumed else "wb") as out:
                _pour(answer, out, file, report)
        if (got := _size(part)) < file.size:
            raise _Again(f"cut off after {got:,} of {file.size:,} bytes")
    except urllib.error.HTTPError as e:
        if e.code == 416:  # the part does not fit this server's file
            part.unlink(missing_ok=True)
            raise _Again("refused the range") from e
        if e.code in (408, 425, 429) or e.code >= 500:
            wait = e.headers.get("Retry-After", "") if e.headers else ""
            raise _Again(f"answers {e.code} {e.reason}", float(wait) if wait.isdigit() else 0.0) from e
        raise _Refused(f"answers {e.code} {e.reason}") from e
    except TimeoutError as e:
        raise _Again(f"stalled for {TIMEOUT:g} s") from e
    except (http.client.HTTPException, OSError) as e:
        reason = getattr(e, "reason", None) or e
        if isinstance(e, OSError) and e.errno in _DISK:
            raise
        if isinstance(reason, socket.gaierror):
            raise _Refused(f"cannot be reached ({reason.strerror})") from e
        raise _Again(f"cannot be read ({str(reason) or type(reason).__name__})") from e


def _pour(src: Any, out: BinaryIO, file: DataFile, report: Got) -> None:
    """Bytes from `src` to `out`, never more than the file should have."""
    done = out.tell()
    read = getattr(src, "read1", src.read)  # what is there now, so that a stall loses nothing
    while block := read(BLOCK):
        done += len(block)
        if done > file.size:
            out.close()
            Path(out.name).unlink()
            raise _Refused(f"sends more than the {file.size:,} bytes expected")
        out.write(block)
        report(done)


def _check(file: DataFile, part: Path) -> None:
    """The checksum of a whole part; a wrong one is removed, for it cannot be resumed."""
    kind = "sha256" if file.sha256 else "md5"
    want, got = file.sha256 or file.md5, checksum(part, kind)
    if got == want:
        return
    with open(part, "rb") as f:
        head = f.read(512).lstrip().lower()
    part.unlink()
    if head.startswith((b"<!doctype html", b"<html")):
        raise _Refused("answers with an HTML page instead of the file")
    raise _Refused(f"has the wrong checksum: {kind} {got}, not {want}")


def _wrong_size(size: int, file: DataFile) -> str:
    return f"has the wrong size: {size:,} bytes where {file.size:,} are expected"


def _is_there(path: Path, file: DataFile) -> bool:
    return _size(path) == file.size


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _range_start(content_range: str | None) -> int | None:
    """`bytes 100-999/1000` → 100"""
    try:
        return int((content_range or "").split()[1].split("-")[0])
    except (IndexError, ValueError):
        return None


def _is_url(address: str) -> bool:
    return address.startswith(("http://", "https://"))


def _local(address: str) -> str:
    """A `file://` URL as a path; anything else as it is."""
    if not address.startswith("file://"):
        return os.path.expanduser(address)
    return urllib.request.url2pathname(urllib.parse.urlsplit(address).path)


def _join(base: str, *parts: str) -> str:
    return "/".join([base.rstrip("/"), *(map(urllib.parse.quote, parts) if _is_url(base) else parts)])


@contextmanager
def _disk_errors(folder: Path):
    """A disk that is full or read-only, as a message."""
    try:
        yield
    except GzError:
        raise
    except OSError as e:
        if e.errno in _FULL:
            raise MissingError(f"the disk of `{folder}` is full", hint="free some space, or set `GZ_HOME` elsewhere") from e
        if e.errno in _DISK:
            raise MissingError(f"`{folder}` cannot be written", hint="set `GZ_HOME` to a folder that can") from e
        raise
