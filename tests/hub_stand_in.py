"""A miniature Hugging Face hub: creates models, takes commits and serves downloads over HTTP."""

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

_MODEL = r"/api/models/([^/]+/[^/]+)"


@dataclasses.dataclass
class Hub:
    """A running hub.

    Attributes:
      address: its URL.
      files: the content of each file by (model, branch) and name.
      private: the names of private models.
    """

    address: str
    files: dict[tuple[str, str], dict[str, bytes]]
    private: set[str]


def commit_id(model: str, branch: str) -> str:
    """The id of a branch's only commit."""
    return hashlib.sha1(f"{model}@{branch}".encode()).hexdigest()


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    """Serves a hub on a free port."""
    files: dict[tuple[str, str], dict[str, bytes]] = {}
    private: set[str] = set()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def answer(self, content: bytes, status=200, **headers):
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def answer_json(self, value, status=200):
            self.answer(json.dumps(value).encode(), status, Content_Type="application/json")

        def find(self, model, revision):
            """The commit and the files of a branch or commit; if there is none, answers 404."""
            for (name, branch), content in files.items():
                if name == model and unquote(revision) in (branch, commit_id(name, branch)):
                    return commit_id(name, branch), content
            exists = any(name == model for name, _ in files)
            self.answer(b"{}", 404, X_Error_Code=f"{'Revision' if exists else 'Repo'}NotFound")

        def do_GET(self):
            if found := re.match(_MODEL + r"(?:/revision/([^/]+))?$", self.path):
                if at := self.find(found[1], found[2] or "main"):
                    siblings = [{"rfilename": name} for name in at[1]]
                    self.answer_json({"id": found[1], "sha": at[0], "siblings": siblings})
            elif found := re.match(_MODEL + r"/tree/([^/?]+)", self.path):
                if at := self.find(*found.groups()):
                    tree = [
                        {"type": "file", "path": name, "size": len(content), "oid": at[0]}
                        for name, content in at[1].items()
                    ]
                    self.answer_json(tree)
            elif found := re.match(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)$", self.path):
                if at := self.find(found[1], found[2]):
                    content = at[1].get(found[3])
                    if content is None:
                        return self.answer(b"{}", 404, X_Error_Code="EntryNotFound")
                    etag = f'"{hashlib.sha1(content).hexdigest()}"'
                    self.answer(content, ETag=etag, X_Repo_Commit=at[0])
            else:
                self.answer(b"{}", 404)

        do_HEAD = do_GET

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            url = f"http://{self.headers['Host']}"
            if self.path == "/api/repos/create":
                request = json.loads(body)
                name = f"{request['organization']}/{request['name']}"
                files.setdefault((name, "main"), {})
                if request.get("private"):
                    private.add(name)
                self.answer_json({"url": f"{url}/{name}", "id": name})
            elif self.path == "/api/validate-yaml":
                self.answer_json({"errors": [], "warnings": []})
            elif found := re.match(_MODEL + r"/branch/([^/]+)$", self.path):
                name, branch = found[1], unquote(found[2])
                if (name, branch) in files:
                    return self.answer_json({"error": "Reference already exists"}, 409)
                files[name, branch] = dict(files[name, "main"])
                self.answer_json({})
            elif found := re.match(_MODEL + r"/preupload/([^/]+)$", self.path):
                if self.find(*found.groups()):
                    names = [file["path"] for file in json.loads(body)["files"]]
                    uploads = [
                        {"path": name, "uploadMode": "regular", "shouldIgnore": False}
                        for name in names
                    ]
                    self.answer_json({"files": uploads})
            elif (found := re.match(_MODEL + r"/commit/([^/]+)$", self.path)) and (
                at := self.find(*found.groups())
            ):
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        at[1][line["value"]["path"]] = content
                commit_url = f"{url}/{found[1]}/commit/{at[0]}"
                self.answer_json({"commitUrl": commit_url, "commitOid": at[0]})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Hub(f"http://127.0.0.1:{server.server_port}", files, private)
    finally:
        server.shutdown()
        server.server_close()
