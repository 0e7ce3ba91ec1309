"""Downloads over HTTP: resumed by range from the size of an incomplete file `NAME.part`, and retried with
back-off. The caller verifies the checksum.
"""

from __future__ import annotations

import base64
import http.client
import re
import shutil
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from gzcli.core.errors import DISK_ERRORS, UsageError, redacted
from gzcli.core.types import Report, Say

T = TypeVar("T")
STALL_SECONDS = 30.0  # seconds without a byte after which a connection counts as stalled
MAX_TRIES = 4  # consecutive attempts without progress, with back-off
BACKOFF_SECONDS = 1.0  # seconds before the second attempt; doubled each time
BLOCK_BYTES = 1 << 18


class Refused(Exception):
    """The file is not at this address, so the next one is tried."""


class Again(Exception):
    """A temporary fault: stalled, truncated, 5xx."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


class BadRange(Again):
    """The server's file lacks the requested bytes."""


def request(url: str, method: str = "GET") -> urllib.request.Request:
    """A request to an address. `https://USER:PASSWORD@host/…` becomes basic authentication (RFC 7617).
    Redirections do not forward it to another host, and exceptions do not show it."""
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
    """The response to a request. Errors, including those during reading, become Refused or Again."""
    try:
        try:
            http_request = request(url)
            http_request.add_header("Accept-Encoding", "identity")
            if byte_range:
                http_request.add_header("Range", byte_range)
            response = urllib.request.urlopen(http_request, timeout=STALL_SECONDS)
        except ValueError:  # as for `http://[::1`; its text may contain a password
            raise Refused("is not a valid URL, or redirects to an invalid one") from None
        with response:
            if "text/html" in response.headers.get("Content-Type", ""):
                raise Refused("returned an HTML page instead of the file")
            yield response
    except urllib.error.HTTPError as e:
        if e.code == 416:
            raise BadRange("refused the range of bytes") from e
        if e.code in (408, 425, 429) or e.code >= 500:
            wait = e.headers.get("Retry-After", "") if e.headers else ""
            raise Again(f"returned {e.code} {e.reason}", float(wait) if wait.isdigit() else 0.0) from e
        raise Refused(f"returned {e.code} {e.reason}") from e
    except TimeoutError as e:
        raise Again(f"sent nothing for {STALL_SECONDS:g} s") from e
    except http.client.InvalidURL as e:
        raise Refused("is not a valid URL") from e
    except (http.client.HTTPException, OSError) as e:
        reason = getattr(e, "reason", None) or e
        if isinstance(e, OSError) and e.errno in DISK_ERRORS:
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
    address = address_parts(base)
    path = "/".join([address.path.rstrip("/"), *map(urllib.parse.quote, parts)])
    return address._replace(path=path).geturl()


def address_parts(address: str) -> urllib.parse.SplitResult:
    """The parts of an address. Raises UsageError if it is malformed."""
    try:
        return urllib.parse.urlsplit(address)
    except ValueError:  # as for `http://[::1`; its text may contain a password
        hint = "give a URL such as `https://host/folder`"
        raise UsageError(f"`{redacted(address)}` is not a valid URL", hint=hint) from None


def download(url: str, part: Path, size: int, *, exact: bool, report: Report, say: Say) -> bool:
    """Downloads about `size` bytes into `part`, resuming an earlier attempt. Returns whether some bytes are
    from an earlier request, and so perhaps from a different file. Raises Refused."""
    total = size if exact else _patiently(url, lambda: _look(url), lambda: 0, say)
    if file_bytes(part) > (total or 0):
        part.unlink()  # from another file, or from one of unknown size that cannot be resumed
    if total is not None and file_bytes(part) == total:
        return True

    def received(count: int) -> None:
        report(count, max(count, total or size))

    return _patiently(url, lambda: _attempt(url, part, total, received), lambda: file_bytes(part), say)


def clear(part: Path) -> None:
    """Removes folders and broken links at the path of an incomplete file. Also removes the pieces of a file
    that an earlier version fetched over several connections."""
    for piece in part.parent.glob(f"{part.name}*"):
        if piece.is_dir() and not piece.is_symlink():
            shutil.rmtree(piece)
        elif not piece.is_file() or piece != part:
            piece.unlink()


def file_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def wrong_size(size: int, expected: int) -> str:
    return f"has the wrong size: {size:,} bytes instead of {expected:,}"


def _look(url: str) -> int | None:
    """The size of the file, from a request for one byte; None if the server does not report it."""
    with answer(url, "bytes=0-0") as response:
        return content_range(response)[1] if response.status == 206 else response.length


def _patiently(url: str, attempt: Callable[[], T], got: Callable[[], int], say: Say) -> T:
    """Calls `attempt` until it succeeds or is hopeless. Failures are counted as long as the number of bytes
    does not exceed its earlier maximum, because repeated bytes are no progress."""
    failures, most = 0, got()
    while True:
        try:
            return attempt()
        except Again as e:
            failures = 0 if got() > most else failures + 1
            most = max(most, got())
            if failures >= MAX_TRIES:
                raise Refused(f"{e}, {MAX_TRIES} times in a row") from e
            wait = max(min(e.wait, 60.0), BACKOFF_SECONDS * 2 ** max(failures - 1, 0))
            say(f"{redacted(url)}: {e}; trying again in {wait:.0f} s")
            time.sleep(wait)


def _attempt(url: str, part: Path, total: int | None, report: Callable[[int], None]) -> bool:
    """Requests the missing part of a file; starts over if a server ignores the range. Returns whether the
    file already had bytes."""
    before = file_bytes(part)
    byte_range = f"bytes={before}-" if before and total is not None else None
    try:
        with answer(url, byte_range) as response:
            resumed = byte_range is not None and response.status == 206
            start, length = content_range(response) if resumed else (0, response.length)
            if resumed and start != before:
                raise BadRange("sent a different range of bytes than requested")
            if length is not None and total is not None and length != total:
                raise Refused(wrong_size(length, total))
            with open(part, "ab" if resumed else "wb") as out:
                _pour(response, out, total, report)
    except BadRange:  # the received bytes do not match this server's file
        part.unlink(missing_ok=True)
        raise
    if total is not None and (size := file_bytes(part)) != total:
        raise Again(f"was truncated after {size:,} of {total:,} bytes")
    return resumed


def _pour(
    response: http.client.HTTPResponse, out: Any, size: int | None, report: Callable[[int], None]
) -> None:
    """Writes bytes of the response to `out`, up to `size`, as they arrive, so that a stall loses nothing."""
    while size is None or out.tell() < size:
        block = response.read1(BLOCK_BYTES if size is None else min(BLOCK_BYTES, size - out.tell()))
        if not block:
            return
        out.write(block)
        report(out.tell())
