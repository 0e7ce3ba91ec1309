"""A stand-in of the Hugging Face hub: the part of its HTTP interface by which models are pushed and got."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_letmein"


@contextmanager
def hub():
    """Yields a server with `.url`, `.repos` ({name: {path: bytes}}), `.commits` and `.requests` (method,
    path). `.safetensors` travel as large files do there, by an address of their own. Only TOKEN may write."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            path, body = self.begin()
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer(401, {"error": "who are you?"})
            if path == "/api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            if path == "/api/repos/create":
                name = json.loads(body)
                name = f"{name['organization']}/{name['name']}" if name.get("organization") else name["name"]
                server.repos.setdefault(name, {})
                return self.answer(200, {"url": f"{server.url}/{name}", "id": name, "name": name})
            if path.endswith("/preupload/main"):
                mode = lambda path: "lfs" if path.endswith(".safetensors") else "regular"  # noqa: E731
                paths = [file["path"] for file in json.loads(body)["files"]]
                files = [{"path": p, "uploadMode": mode(p), "shouldIgnore": False} for p in paths]
                return self.answer(200, {"files": files})
            if path.endswith("/info/lfs/objects/batch"):
                upload = lambda oid: {"upload": {"href": f"{server.url}/lfs/{oid}"}}  # noqa: E731
                objects = [{**one, "actions": upload(one["oid"])} for one in json.loads(body)["objects"]]
                return self.answer(200, {"transfer": "basic", "objects": objects})
            if path.endswith("/commit/main"):
                return self.commit(path.removeprefix("/api/models/").removesuffix("/commit/main"), body)
            return self.answer(404, {"error": path})

        def commit(self, name, body):
            files = server.repos[name]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = server.large[value["oid"]]
            server.commits.append(name)
            oid = hashlib.sha1(b"".join(files.values())).hexdigest()
            return self.answer(200, {"commitUrl": f"{server.url}/{name}/commit/{oid}", "commitOid": oid})

        def do_PUT(self):
            path, body = self.begin()
            if hashlib.sha256(body).hexdigest() != path.removeprefix("/lfs/"):
                return self.answer(400, {"error": "other bytes"})
            server.large[path.removeprefix("/lfs/")] = body
            return self.answer(200, {})

        def do_GET(self):
            path, _ = self.begin()
            if path.startswith(
                ("/api/models/", "/api/datasets/")
            ):  # a data set is the repository `datasets/…`
                name = path.removeprefix("/api/").removeprefix("models/")
                name, tree, _ = name.partition("/tree/")
                name = name.partition("/revision")[0]
                exists = name in server.repos
                if tree and exists:
                    entry = {"type": "file", "oid": "0" * 40}
                    files = server.repos[name].items()
                    return self.answer(200, [entry | {"path": p, "size": len(data)} for p, data in files])
                siblings = [{"rfilename": path} for path in server.repos.get(name, ())]
                reply = {"id": name, "sha": "0" * 40, "siblings": siblings} if exists else {"error": "no"}
                return self.answer(200 if exists else 404, reply, None if exists else "RepoNotFound")
            name, _, rest = path.lstrip("/").partition("/resolve/")
            file = rest.partition("/")[2]
            if name not in server.repos:
                return self.answer(404, {"error": "no"}, "RepoNotFound")
            if file not in server.repos[name]:
                return self.answer(404, {"error": "no"}, "EntryNotFound")
            return self.answer(200, server.repos[name][file])

        def do_HEAD(self):
            return self.do_GET()

        def begin(self):
            path = unquote(urlsplit(self.path).path)
            server.requests.append((self.command, path))
            return path, self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def answer(self, status, body, code=None):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Type", "application/json")
            if code:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.repos, server.large, server.commits, server.requests = {}, {}, [], []
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
