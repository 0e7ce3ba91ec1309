"""A local HTTP server over a folder that misbehaves on request; it serves as a proxy too, for any host."""

import re
import threading
import time
from collections import deque
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit


@contextmanager
def serve(folder: Path, *faults: str):
    """Yields a server with `.url`, `.requests` (path, Range header), `.stalling` (an event), and settings:
    `.pace` (seconds a block of 4 KB) and `.faults`, of which each GET takes one:

    ok · 503 · 404 · stall (half, then silence) · hold (half, and the rest when `.released` is set)
    cut (half, then closed) · redirect · whole (ignores ranges) · astray (a redirect to no address)
    mixed (half of other bytes, then closed)
    html (a page instead of the file) · long (more bytes than announced by the publisher)
    wrong (other bytes) · other (another range than asked for) · open (all from where the range begins)
    unsized (all, without its length)
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            with server.count:
                server.requests.append((self.path, self.headers.get("Range")))
                fault = server.faults.popleft() if server.faults else "ok"
            self.serve(fault)

        def serve(self, fault):
            path = folder / urlsplit(self.path).path.removeprefix("/moved").lstrip("/")
            if fault == "503":
                return self.answer(503, b"busy", {"Retry-After": "0"})
            if fault == "404" or not path.is_file():
                return self.answer(404, b"no")
            if fault == "redirect":
                return self.answer(302, b"", {"Location": f"/moved{self.path}"})
            if fault == "astray":
                return self.answer(302, b"", {"Location": "http://[::1"})
            if fault == "html":
                return self.answer(200, b"<!DOCTYPE html><html>log in</html>", {"Content-Type": "text/html"})
            data = path.read_bytes()
            zeros = bytes(len(data))
            data = {"long": data + b"more", "wrong": zeros, "mixed": zeros}.get(fault, data)
            start, end, status, headers = 0, len(data), 200, {}
            if (range_ := self.headers.get("Range")) and fault not in ("whole", "unsized"):
                first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", range_).groups()
                start, end, status = int(first) + (fault == "other"), int(last or len(data) - 1) + 1, 206
                end = len(data) if fault == "open" else end
                if start >= len(data):
                    return self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            body = data[start:end]
            if fault in ("stall", "cut", "mixed"):
                self.answer(status, body[: len(body) // 2], headers, length=len(body))
                self.wfile.flush()
                if fault == "stall":
                    server.stalling.set()
                    server.released.wait(5)
                self.close_connection = True
                return None
            if fault == "hold":
                self.answer(status, body[: len(body) // 2], headers, length=len(body))
                server.released.wait()
                self.wfile.write(body[len(body) // 2 :])
                return None
            return self.answer(status, body, headers, length="" if fault == "unsized" else None)

        def answer(self, status, body, headers=None, length=None):
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            if length != "":
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
    server.count = threading.Lock()
    server.released, server.stalling = threading.Event(), threading.Event()
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
