"""One HTTP request: its address without the password, its answer, and what its faults mean for a download."""

from __future__ import annotations

import base64
import errno
import http.client
import re
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from gzcli.core.errors import UsageError, redacted

TIMEOUT = 30.0  # seconds without a byte until a connection counts as stalled

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class Refused(Exception):
    """This address will not serve the file: the next one is tried."""


class Again(Exception):
    """A fault that may pass: stalled, cut off, 5xx.

    wait: seconds that the server asks for.
    """

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


class BadRange(Again):
    """The server's file does not have the bytes that were asked for."""


def request(url: str, method: str = "GET") -> urllib.request.Request:
    """A request to an address. `https://USER:PASSWORD@host/…` becomes basic authentication (RFC 7617), which
    no redirection carries to another host and no exception shows."""
    parts = urllib.parse.urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    asked = urllib.request.Request(
        parts._replace(netloc=host).geturl(), headers={"User-Agent": "gz"}, method=method
    )
    if at:
        token = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
        asked.add_unredirected_header("Authorization", f"Basic {token}")
    return asked


@contextmanager
def answer(url: str, asked: str | None) -> Iterator[http.client.HTTPResponse]:
    """The answer to a request. Faults become Refused or Again, also those that come while it is read.

    asked: the range of bytes, as the header `Range` has it; None: all.
    """
    try:
        with _opened(url, asked) as found:
            if "text/html" in found.headers.get("Content-Type", ""):
                raise Refused("answers with an HTML page instead of the file")
            yield found
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


def _opened(url: str, asked: str | None) -> http.client.HTTPResponse:
    """The answer, before it is read. Raises Refused where the address, or one that it redirects to, is
    none."""
    try:
        wanted = request(url)
        wanted.add_header("Accept-Encoding", "identity")
        if asked:
            wanted.add_header("Range", asked)
        opened: http.client.HTTPResponse = urllib.request.urlopen(wanted, timeout=TIMEOUT)
        return opened
    except ValueError:  # as for `http://[::1`; its text may hold a password
        raise Refused("is no address, or leads to one that is none") from None


def content_range(found: http.client.HTTPResponse) -> tuple[int | None, int | None]:
    """The first byte and the total bytes in the header `Content-Range`: `bytes 100-999/1000` → 100, 1000.

    None stands for what it does not say.
    """
    range_ = re.match(r"bytes (\d+)-\d+/(\d+|\*)", found.headers.get("Content-Range", ""))
    if not range_:
        return None, None
    return int(range_[1]), None if range_[2] == "*" else int(range_[2])


def joined(base: str, *parts: str) -> str:
    """An address below another one. The parts are quoted and stand before the query of the base, which may
    hold a token."""
    whole = split(base)
    path = "/".join([whole.path.rstrip("/"), *map(urllib.parse.quote, parts)])
    return whole._replace(path=path).geturl()


def split(address: str) -> urllib.parse.SplitResult:
    """The parts of an address that the user gave. Raises UsageError where it is none."""
    try:
        return urllib.parse.urlsplit(address)
    except ValueError:  # as for `http://[::1`; its text may hold a password
        hint = "an address is like `https://host/folder`"
        raise UsageError(f"`{redacted(address)}` is no address", hint=hint) from None
