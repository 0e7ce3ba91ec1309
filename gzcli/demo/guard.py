"""Who may speak to the server of `gz demo`: its own page alone. Plain ASGI, without an import of Gradio. A
page from elsewhere can make a browser send requests to this machine: by a form, an image, a stream of events,
or by a name of its own that resolves to 127.0.0.1. They are recognised by three headers that no script can
set: Host, Origin and Sec-Fetch-Site."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LARGEST_FILE = 20_000_000  # bytes of a picture that is dropped
LARGEST_BODY = LARGEST_FILE + 1_000_000  # of a request, which holds a file and its head
LOOPBACK = ("127.0.0.1", "localhost", "::1")
COOKIE = "gz-demo"
# gradio asks itself for this while it starts, without a token; it runs what is to run at the start, once
STARTING = "/gradio_api/startup-events"
# What the browser may load: from here alone, whatever gradio's own page asks for. No page may frame this one.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob:; "
    "frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"same-origin"),  # an address may hold the token
    (b"x-content-type-options", b"nosniff"),
)


class Guard:
    """Refuses what does not come from the server's own page at one of its `addresses`, which may grow later,
    such as "https://abc.gradio.live"; with a `token`, also what lacks it in its address and as a cookie."""

    def __init__(self, app: App, *, addresses: set[str], token: str | None = None):
        self.app, self.addresses, self.token = app, addresses, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], *HEADERS, *self._cookie(scope)]
            await send(message)

        if refused := self._refused(scope):
            return await _refuse(scope, answer, *refused)
        try:
            await self.app(scope, _limited(receive), answer)
        except _TooLarge:
            if not started:
                await _refuse(scope, answer, 413, "this is too large")

    def _refused(self, scope: Scope) -> tuple[int, str] | None:
        """The status and the reason of a refusal; None where the request may pass."""
        host = _values(scope, b"host")
        if len(host) != 1 or not self._serves(host[0]):
            return 403, "this server does not have the name that it was called by"
        if any(not self._same(origin, host[0]) for origin in _values(scope, b"origin")):
            return 403, "this request comes from another page"
        elsewhere = any(site not in ("same-origin", "none") for site in _values(scope, b"sec-fetch-site"))
        if elsewhere and not _is_link(scope):
            return 403, "this request comes from another page"
        if scope.get("path") != STARTING and not (self._in_address(scope) or self._in_cookie(scope)):
            return 401, "the address of this page has a token: `gz demo` has printed it"
        if any(_too_long(text) for text in _values(scope, b"content-length")):
            return 413, "this is too large"
        return None

    def _serves(self, host: str) -> bool:
        # whatever the port: a tunnel of the user's (`ssh -L`) may have another one
        return _name(host) in LOOPBACK or host in {urlsplit(address).netloc for address in self.addresses}

    def _same(self, origin: str, host: str) -> bool:
        # behind a tunnel the scheme is not known here: a host and port that are the same are enough
        return origin in self.addresses or origin in (f"http://{host}", f"https://{host}")

    def _in_address(self, scope: Scope) -> bool:
        words = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [])
        return self.token is None or any(_equal(word, self.token) for word in words)

    def _in_cookie(self, scope: Scope) -> bool:
        pairs = (
            pair.strip().partition("=") for text in _values(scope, b"cookie") for pair in text.split(";")
        )
        return self.token is None or any(_equal(v, self.token) for name, _, v in pairs if name == COOKIE)

    def _cookie(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """The header that keeps the token of the address, so that what the page asks for needs none."""
        if self.token is None or not self._in_address(scope):
            return []
        local = any(_name(host) in LOOPBACK for host in _values(scope, b"host"))
        secure = "" if local else "; Secure"
        return [(b"set-cookie", f"{COOKIE}={self.token}; Path=/; HttpOnly; SameSite=Strict{secure}".encode())]


class _TooLarge(Exception):
    """The body of a request has more bytes than LARGEST_BODY."""


def _limited(receive: Receive) -> Receive:
    """`receive`, which raises _TooLarge: a body that is sent in chunks does not say how long it is."""
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > LARGEST_BODY:
            raise _TooLarge
        return message

    return counted


def _too_long(length: str) -> bool:
    """Whether a Content-Length is above LARGEST_BODY, or none."""
    return not length.isdecimal() or len(length) > 15 or int(length) > LARGEST_BODY


async def _refuse(scope: Scope, send: Send, status: int, reason: str) -> None:
    """Answers a request with a status and a line of text; the server makes 403 of a websocket's close."""
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close", "code": 1008, "reason": reason})
    head = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": f"{reason}\n".encode()})


def _is_link(scope: Scope) -> bool:
    """Whether the browser opens the page itself, as after a click on a link: no other page can read it."""
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
    except ValueError:  # brackets that do not close
        return None


def _equal(a: str, b: str) -> bool:
    return hmac.compare_digest(a.encode(), b.encode())
