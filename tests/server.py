"""A local HTTP server over a folder that misbehaves on request."""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@contextmanager
def serve(folder: Path, *faults: str):
    """Yields a server with `.url`, `.requests` (path, Range header) and `.faults`, a queue of which each GET takes one:

    ok · 503 · 404 · stall (half, then silence) · cut (half, then closed) · redirect · whole (ignores ranges)
    html (a page instead of the file) · long (more bytes than announced by the publisher) · wrong (other bytes)
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append((self.path, self.headers.get("Range")))
            fault = server.faults.popleft() if server.faults else "ok"
            path = folder / self.path.removeprefix("/moved").lstrip("/")
            if fault == "503":
                return self.answer(503, b"busy", {"Retry-After": "0"})
            if fault == "404" or not path.is_file():
                return self.answer(404, b"no")
            if fault == "redirect":
                return self.answer(302, b"", {"Location": f"/moved{self.path}"})
            if fault == "html":
                return self.answer(200, b"<!DOCTYPE html><html>log in</html>", {"Content-Type": "text/html"})
            data = path.read_bytes()
            data = {"long": data + b"more", "wrong": bytes(len(data))}.get(fault, data)
            start, status, headers = 0, 200, {}
            if (asked := self.headers.get("Range")) and fault != "whole":
                start, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            body = data[start:]
            if fault in ("stall", "cut"):
                self.answer(status, body[: len(body) // 2], headers, length=len(body))
                self.wfile.flush()
                if fault == "stall":
                    server.released.wait(5)
                self.close_connection = True
                return None
            return self.answer(status, body, headers)

        def answer(self, status, body, headers=None, length=None):
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            if server.pace:
                for i in range(0, len(body), 1 << 12):
                    self.wfile.write(body[i : i + (1 << 12)])
                    time.sleep(server.pace)
            else:
                self.wfile.write(body)

        def log_message(self, *args):
            pass

        def handle(self):
            with suppress(ConnectionError):  # a client that was killed
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.faults, server.requests, server.pace = deque(faults), [], 0.0
    server.released = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
