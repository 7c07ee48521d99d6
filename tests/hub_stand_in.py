"""A Hugging Face hub in miniature: models made, committed to and downloaded over HTTP."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def hub() -> Iterator[tuple[str, dict[str, dict[str, bytes]]]]:
    """Serves on a free port; yields the address and the files of each model."""
    models: dict[str, dict[str, bytes]] = {}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def answer(self, content: bytes, status=200, **headers):
            self.send_response(status)
            headers = {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT} | headers
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def answer_json(self, value):
            self.answer(json.dumps(value).encode(), **{"Content-Type": "application/json"})

        def do_GET(self):
            if found := re.match(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?$", self.path):
                files = models.get(found[1])
                if files is not None:
                    siblings = [{"rfilename": name} for name in files]
                    return self.answer_json({"id": found[1], "sha": COMMIT, "siblings": siblings})
            if found := re.match(r"/api/models/([^/]+/[^/]+)/tree/", self.path):
                files = models.get(found[1], {})
                return self.answer_json(
                    [
                        {"type": "file", "path": name, "size": len(content), "oid": COMMIT}
                        for name, content in files.items()
                    ]
                )
            if found := re.match(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)$", self.path):
                content = models.get(found[1], {}).get(found[2])
                if content is not None:
                    return self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"')
            self.answer(b"{}", 404, **{"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/api/repos/create":
                request = json.loads(body)
                name = f"{request['organization']}/{request['name']}"
                models.setdefault(name, {})
                self.answer_json({"url": f"http://{self.headers['Host']}/{name}", "id": name})
            elif self.path == "/api/validate-yaml":
                self.answer_json({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                files = [
                    {"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names
                ]
                self.answer_json({"files": files})
            elif found := re.match(r"/api/models/([^/]+/[^/]+)/commit/", self.path):
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        models[found[1]][line["value"]["path"]] = content
                url = f"http://{self.headers['Host']}/{found[1]}/commit/{COMMIT}"
                self.answer_json({"commitUrl": url, "commitOid": COMMIT})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", models
    finally:
        server.shutdown()
        server.server_close()
