"""Downloads over HTTP: resumed by range, over several connections if that helps, retried with back-off.

An incomplete file is `NAME.part`. Of a file in pieces that is the first one, and `NAME.part1` and so on are
the others. Each is resumed from its own size, and they are appended when all are complete. The caller
verifies the checksum.
"""

from __future__ import annotations

import base64
import http.client
import os
import re
import shutil
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gzcli.core.errors import DISK, UsageError, redacted
from gzcli.core.types import Report, Say

TIMEOUT = 30.0  # seconds without a byte until a connection counts as stalled
TRIES = 4  # attempts in a row that bring nothing new, with back-off
BACKOFF = 1.0  # seconds before the second attempt; doubled each time
BLOCK = 1 << 18
LARGE = 64_000_000  # bytes from which a file comes in pieces, if the server serves ranges
PIECES = 4


class Refused(Exception):
    """This address will not serve the file: the next one is tried."""


class Again(Exception):
    """A fault that may pass: stalled, cut off, 5xx."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


class BadRange(Again):
    """The server's file lacks the requested bytes."""


def request(url: str, method: str = "GET") -> urllib.request.Request:
    """A request to an address. `https://USER:PASSWORD@host/…` becomes basic authentication (RFC 7617), which
    no redirection carries to another host and no exception shows."""
    parts = urllib.parse.urlsplit(url)
    user, separator, host = parts.netloc.rpartition("@")
    address = parts._replace(netloc=host).geturl()
    request_ = urllib.request.Request(address, headers={"User-Agent": "gz"}, method=method)
    if separator:
        token = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
        request_.add_unredirected_header("Authorization", f"Basic {token}")
    return request_


@contextmanager
def answer(url: str, byte_range: str | None) -> Iterator[http.client.HTTPResponse]:
    """The response to a request. Faults, also those while it is read, become Refused or Again."""
    try:
        try:
            http_request = request(url)
            http_request.add_header("Accept-Encoding", "identity")
            if byte_range:
                http_request.add_header("Range", byte_range)
            response = urllib.request.urlopen(http_request, timeout=TIMEOUT)
        except ValueError:  # as for `http://[::1`; its text may contain a password
            raise Refused("is not an address, or leads to one that is none") from None
        with response:
            if "text/html" in response.headers.get("Content-Type", ""):
                raise Refused("answers with an HTML page instead of the file")
            yield response
    except urllib.error.HTTPError as e:
        if e.code == 416:
            raise BadRange("refused the range") from e
        if e.code in (408, 425, 429) or e.code >= 500:
            wait = e.headers.get("Retry-After", "") if e.headers else ""
            raise Again(f"answers {e.code} {e.reason}", float(wait) if wait.isdigit() else 0.0) from e
        raise Refused(f"answers {e.code} {e.reason}") from e
    except TimeoutError as e:
        raise Again(f"stalled for {TIMEOUT:g} s") from e
    except http.client.InvalidURL as e:
        raise Refused("is not an address") from e
    except (http.client.HTTPException, OSError) as e:
        reason = getattr(e, "reason", None) or e
        if isinstance(e, OSError) and e.errno in DISK:
            raise
        if isinstance(reason, socket.gaierror):
            raise Refused(f"cannot be reached ({reason.strerror})") from e
        raise Again(f"cannot be read ({str(reason) or type(reason).__name__})") from e


def content_range(response: http.client.HTTPResponse) -> tuple[int | None, int | None]:
    """The first byte and the total bytes in `Content-Range`, `bytes 100-999/1000` → 100, 1000, or None."""
    range_ = re.match(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if not range_:
        return None, None
    return int(range_[1]), None if range_[2] == "*" else int(range_[2])


def join_url(base: str, *parts: str) -> str:
    """An address below another one. The query, which may contain a token, stays at the end."""
    address = split(base)
    path = "/".join([address.path.rstrip("/"), *map(urllib.parse.quote, parts)])
    return address._replace(path=path).geturl()


def split(address: str) -> urllib.parse.SplitResult:
    """The parts of an address. Raises UsageError where it is malformed."""
    try:
        return urllib.parse.urlsplit(address)
    except ValueError:  # as for `http://[::1`; its text may contain a password
        hint = "an address is like `https://host/folder`"
        raise UsageError(f"`{redacted(address)}` is not an address", hint=hint) from None


class _NoRanges(Exception):
    """The server ignores ranges and sends the whole file."""


class _Stopped(Exception):
    """The user pressed Ctrl-C."""


@dataclass(frozen=True)
class _Piece:
    """A range of a file being downloaded."""

    path: Path  # file of its bytes
    start: int  # bytes of the file before it
    end: int | None  # bytes of the file up to its end; None where the server does not say
    total: int | None  # bytes of the file; None where the server does not say

    @property
    def size(self) -> int:
        return size_of(self.path)

    @property
    def is_whole(self) -> bool:
        return self.end is not None and self.size == self.end - self.start

    @property
    def is_file(self) -> bool:
        """Whether the piece is the whole file."""
        return self.start == 0 and self.end == self.total

    @property
    def byte_range(self) -> str | None:
        """The missing range; None: the file from its beginning."""
        if self.total is None or (self.is_file and not self.size):
            return None
        last = "" if self.end is None or self.end == self.total else self.end - 1
        return f"bytes={self.start + self.size}-{last}"


def download(url: str, part: Path, size: int, *, exact: bool, report: Report, say: Say) -> bool:
    """Downloads about `size` bytes into `part`, resuming an earlier attempt. Returns whether any bytes were
    there before the last request, so that the file may be of two. Raises Refused."""
    if exact and size_of(part) == size:
        return True
    total, ranges = size if exact else None, False
    if size >= LARGE or not exact:
        found_size, ranges = _patiently(url, lambda: _look(url), lambda: 0, threading.Event(), say)
        if exact and found_size is not None and found_size != size:
            raise Refused(wrong_size(found_size, size))
        total = found_size or total
    pieces = _pieces(part, total, PIECES if ranges and (total or 0) >= LARGE else 1)

    def report_all(received: int, total: int) -> None:
        report(received, max(received, total or size))

    try:
        resumed = _fill(url, pieces, report_all, say)
    except _NoRanges:
        pieces = _pieces(part, total, 1)
        resumed = _fill(url, pieces, report_all, say)
    _join(pieces)
    return resumed


def held(part: Path) -> int:
    """The number of bytes received so far, in all pieces."""
    return sum(map(size_of, part.parent.glob(f"{part.name}*")))


def drop(part: Path) -> None:
    """Removes all pieces received so far."""
    for piece in part.parent.glob(f"{part.name}*"):
        piece.unlink()


def clear(part: Path) -> None:
    """Removes folders and broken links from the paths of an incomplete file and its pieces."""
    for piece in part.parent.glob(f"{part.name}*"):
        if piece.is_dir() and not piece.is_symlink():
            shutil.rmtree(piece)
        elif not piece.is_file():
            piece.unlink()


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def wrong_size(size: int, expected: int) -> str:
    return f"has the wrong size: {size:,} bytes where {expected:,} are expected"


def _look(url: str) -> tuple[int | None, bool]:
    """The size of the file, if known, and whether the server supports ranges, by a request of one byte."""
    with answer(url, "bytes=0-0") as response:
        if response.status != 206:
            return response.length, False
        _, total = content_range(response)
        return total, total is not None


def _pieces(part: Path, total: int | None, count: int) -> list[_Piece]:
    """The file in `count` equal ranges, the last a little shorter. Those that `part` covers already are one.

    `part` reaches into a later range in two cases. If the file of that range is complete, appending it was
    interrupted: `part` is truncated to the start of the range. Else a single connection wrote `part`, and
    continues to the end of that range.
    """
    if size_of(part) > (total or 0):
        part.unlink()  # of another file, or of one whose size is not known and that cannot be resumed
    step = -(-(total or 0) // count)
    starts = [step * i for i in range(count)]
    paths = [part, *(part.with_name(f"{part.name}{i}") for i in range(1, count))]
    ends = [*starts[1:], total]
    rows = [_Piece(path, start, end, total) for path, start, end in zip(paths, starts, ends, strict=True)]
    for row in rows[1:]:
        if row.end is not None and row.size > row.end - row.start:
            row.path.unlink()
    reached = max(0, -(-size_of(part) // step) - 1) if step else 0
    if reached and rows[reached].is_whole:
        os.truncate(part, rows[reached].start)
        reached -= 1
    return [_Piece(part, 0, rows[reached].end, total), *rows[reached + 1 :]]


def _join(pieces: list[_Piece]) -> None:
    """Appends the pieces to the first. Each is removed only when its bytes are on the disk: if this is
    killed, the piece is appended again (see `_pieces`)."""
    first, *others = pieces
    for piece in others:
        with open(piece.path, "rb") as src, open(first.path, "r+b") as out:
            out.seek(piece.start)
            shutil.copyfileobj(src, out, BLOCK)
            out.flush()
            os.fsync(out.fileno())
        piece.path.unlink()


def _fill(url: str, pieces: list[_Piece], report: Report, say: Say) -> bool:
    """Fetches all pieces at once, or one after the other if the server refuses several connections. Returns
    whether bytes of any were there before its last request."""
    try:
        return _together(url, pieces, pieces, report, say)
    except (Refused, _NoRanges) as e:
        if len(pieces) == 1:
            raise
        say(f"{redacted(url)}: {e}; continuing with one connection")
        for piece in pieces:
            _together(url, [piece], pieces, report, say)
        return True


def _together(url: str, some: list[_Piece], pieces: list[_Piece], report: Report, say: Say) -> bool:
    """Fetches `some` of the pieces, each in a thread; raises the first error when all threads have ended.
    Returns whether bytes of any were there before its last request."""
    stop, errors = threading.Event(), []
    resumed = [piece.is_whole for piece in some]

    def work(piece: _Piece) -> None:
        try:
            resumed.append(_patiently(url, lambda: _attempt(url, piece, stop), lambda: piece.size, stop, say))
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(p,), daemon=True) for p in some if not p.is_whole]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.1)
                report(sum(piece.size for piece in pieces), pieces[0].total or 0)
    except BaseException:
        # Ctrl-C. A thread that hangs in a read is left behind: it sees `stop` before it writes again.
        stop.set()
        for thread in filter(threading.Thread.is_alive, threads):
            thread.join(0.25)
        raise
    if errors:
        raise errors[0]
    return any(resumed)


def _patiently(
    url: str, attempt: Callable[[], Any], got: Callable[[], int], stop: threading.Event, say: Say
) -> Any:
    """Calls `attempt` until it succeeds or is hopeless. Failures count only while no more bytes are there
    than ever before: bytes that were dropped and came again are no progress."""
    failures, most = 0, got()
    while True:
        try:
            return attempt()
        except Again as e:
            failures = 0 if got() > most else failures + 1
            most = max(most, got())
            if failures >= TRIES:
                raise Refused(f"{e}, {TRIES} times in a row") from e
            wait = max(min(e.wait, 60.0), BACKOFF * 2 ** max(failures - 1, 0))
            say(f"{redacted(url)}: {e}; trying again in {wait:.0f} s")
            if stop.wait(wait):
                raise _Stopped from e


def _attempt(url: str, piece: _Piece, stop: threading.Event) -> bool:
    """Requests what is missing of a piece; starts again where a server ignores the range. Returns whether
    bytes of the piece were there before."""
    byte_range = piece.byte_range
    try:
        with answer(url, byte_range) as response:
            resumed = byte_range is not None and response.status == 206
            held_some = resumed and piece.size > 0
            if resumed:
                start, total = content_range(response)
                if start != piece.start + piece.size:
                    raise BadRange("sent another range than asked for")
            elif piece.is_file:
                total = response.length
            else:
                raise _NoRanges("sends the whole file instead of a piece")
            if total is not None and piece.total is not None and total != piece.total:
                raise Refused(wrong_size(total, piece.total))
            with open(piece.path, "ab" if resumed else "wb") as out:
                _pour(response, out, None if piece.end is None else piece.end - piece.start, stop)
    except BadRange:  # what came does not fit this server's file
        piece.path.unlink(missing_ok=True)
        raise
    if piece.end is not None and not piece.is_whole:
        raise Again(f"cut off after {piece.start + piece.size:,} of {piece.total:,} bytes")
    return held_some


def _pour(response: http.client.HTTPResponse, out: Any, size: int | None, stop: threading.Event) -> None:
    """Writes bytes of the answer to `out`, up to `size`, as they arrive, so that a stall loses nothing."""
    while size is None or out.tell() < size:
        block = response.read1(BLOCK if size is None else min(BLOCK, size - out.tell()))
        if stop.is_set():
            raise _Stopped
        if not block:
            return
        out.write(block)
