"""Access control for the server of `gz demo`: it serves only its own page. Plain ASGI, without importing
Gradio.

A page from elsewhere can make a browser send requests to this machine: by a form, an image, a stream of
events, or under its own name that resolves to 127.0.0.1. Three headers that no script can set reveal such
requests: Host, Origin and Sec-Fetch-Site.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LARGEST_FILE = 20_000_000  # maximum bytes of a dropped image
LARGEST_BODY = LARGEST_FILE + 1_000_000  # maximum bytes of a request, which contains a file and its header
LOOPBACK = ("127.0.0.1", "localhost", "::1")
COOKIE = "gz-demo"
# gradio asks itself for this while it starts, without a token; it runs what is to run at the start, once
STARTUP_PATH = "/gradio_api/startup-events"
# What the browser may load: from here alone, whatever gradio's own page asks for. No page may frame this one.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob:; "
    "frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"same-origin"),  # an address may contain the token
    (b"x-content-type-options", b"nosniff"),
)
ANOTHER_PAGE = 403, "this request comes from another page"
TOO_LARGE = 413, "this request is too large"


class _TooLarge(Exception):
    """The body of a request has more bytes than LARGEST_BODY."""


class Guard:
    """Refuses requests that do not come from the server's own page at one of its `addresses`, such as
    "https://abc.gradio.live"; the list may grow later. With a `token`, also refuses requests that have it
    neither in their address nor as a cookie."""

    def __init__(self, app: App, *, addresses: set[str], token: str | None = None):
        self.app, self.addresses, self.token = app, addresses, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        started, size = False, 0

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], *HEADERS, *self._cookie(scope)]
            await send(message)

        async def limited() -> Message:  # a body sent in chunks does not state its length
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > LARGEST_BODY:
                raise _TooLarge
            return message

        if refusal := self._refusal(scope):
            return await _refuse(scope, answer, *refusal)
        try:
            await self.app(scope, limited, answer)
        except _TooLarge:
            if not started:
                await _refuse(scope, answer, *TOO_LARGE)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """The status and reason of a refusal; None if the request may pass."""
        hosts, sites = _values(scope, b"host"), _values(scope, b"sec-fetch-site")
        # whatever the port: a tunnel of the user's (`ssh -L`) may have another one
        names = {urlsplit(address).netloc for address in self.addresses}
        if len(hosts) != 1 or not (_name(hosts[0]) in LOOPBACK or hosts[0] in names):
            return 403, "the request is for another host name"
        # behind a tunnel the scheme is not known here: a host and port that are the same are enough
        origins = {*self.addresses, f"http://{hosts[0]}", f"https://{hosts[0]}"}
        if not origins.issuperset(_values(scope, b"origin")):
            return ANOTHER_PAGE
        if not {"same-origin", "none"}.issuperset(sites) and not _is_link(scope):
            return ANOTHER_PAGE
        if scope.get("path") != STARTUP_PATH and not (self._in_address(scope) or self._in_cookie(scope)):
            return 401, "open the address that `gz demo` printed: it contains a token"
        for length in _values(scope, b"content-length"):
            if not length.isdecimal() or len(length) > 15 or int(length) > LARGEST_BODY:
                return TOO_LARGE
        return None

    def _in_address(self, scope: Scope) -> bool:
        words = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [])
        return self._is_token(words)

    def _in_cookie(self, scope: Scope) -> bool:
        cookies = ";".join(_values(scope, b"cookie")).split(";")
        pairs = (cookie.strip().partition("=") for cookie in cookies)
        return self._is_token(value for name, _, value in pairs if name == COOKIE)

    def _is_token(self, words: Iterable[str]) -> bool:
        token = self.token
        return token is None or any(hmac.compare_digest(word.encode(), token.encode()) for word in words)

    def _cookie(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """The header that stores the token of the address, so that requests of the page need none."""
        if self.token is None or not self._in_address(scope):
            return []
        local = any(_name(host) in LOOPBACK for host in _values(scope, b"host"))
        secure = "" if local else "; Secure"
        return [(b"set-cookie", f"{COOKIE}={self.token}; Path=/; HttpOnly; SameSite=Strict{secure}".encode())]


async def _refuse(scope: Scope, send: Send, status: int, reason: str) -> None:
    """Answers a request with a status and a line of text. For a websocket, the server turns its close into
    403."""
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close", "code": 1008, "reason": reason})
    head = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": f"{reason}\n".encode()})


def _is_link(scope: Scope) -> bool:
    """Whether the browser opens the page itself, as after a click on a link. No other page can then read
    it."""
    is_page = scope.get("method") == "GET" and scope.get("path") == "/"
    mode, target = _values(scope, b"sec-fetch-mode"), _values(scope, b"sec-fetch-dest")
    return is_page and mode == ["navigate"] and target == ["document"]


def _values(scope: Scope, name: bytes) -> list[str]:
    """The values of a header."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def _name(host: str) -> str | None:
    """The name in a Host header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:  # unclosed brackets
        return None
