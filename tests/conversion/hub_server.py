# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the Hub's HTTP interface: as much of it as creating, filling and reading a model repository takes.

Files up to a size come inside the commit (as git blobs), larger ones through the LFS protocol, as on the Hub.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REGULAR_LIMIT = 60_000


def blob_id(content: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """Repositories in memory, and a record of what was asked.

    Attributes:
        repositories: by id, `private` and `files` (path to content).
        objects: large files by SHA-256, whether committed or not.
        requests: method and path of every request, in order.
        uploads: SHA-256 of every large file received, in order.
        refusals: answers to give instead of the proper one, each once: a pattern of the path, a status and a text; in
            the text `{authorization}` stands for the header of that name.
    """

    def __init__(self):
        self.repositories: dict[str, dict] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.uploads: list[str] = []
        self.refusals: list[tuple[str, int, str]] = []
        self.authorizations: set[str | None] = set()
        self.url = ""


@contextmanager
def serve():
    """Serve a new `Hub` at its `url`."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._answer()

    def do_HEAD(self):
        self._answer()

    def do_POST(self):
        self._answer()

    def do_PUT(self):
        self._answer()

    def _answer(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        self.hub.authorizations.add(self.headers.get("Authorization"))
        body = self._body()
        for refusal in list(self.hub.refusals):
            pattern, status, text = refusal
            if re.search(pattern, path):
                self.hub.refusals.remove(refusal)
                text = text.replace("{authorization}", self.headers.get("Authorization", ""))
                self._send(status, {"error": text}, {"X-Error-Message": text})
                return
        routes = (
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._validate),
            ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/[^/]+", self._preupload),
            ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/objects/(?P<oid>\w+)", self._store),
            ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/[^/]+", self._commit),
            ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/[^/]+)?", self._info),
            ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/[^/]+(/.*)?", self._tree),
            ("HEAD|GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/[^/]+/(?P<file>.+)", self._resolve),
        )
        for methods, pattern, route in routes:
            found = re.fullmatch(pattern, path)
            if found and re.fullmatch(methods, self.command):
                names = {name: value for name, value in found.groupdict().items() if value is not None}
                if "repo" in names and names["repo"] not in self.hub.repositories:
                    self._send(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
                else:
                    route(body, **names)
                return
        self._send(404, {"error": f"no such route: {self.command} {path}"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, content=None, headers=None, body: bytes | None = None):
        body = json.dumps(content).encode() if body is None else body
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _create(self, body: bytes):
        request = json.loads(body)
        name = f"{request.get('organization') or 'me'}/{request['name']}"
        if name in self.hub.repositories:
            self._send(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
            return
        private = request.get("private") or request.get("visibility") == "private"
        self.hub.repositories[name] = {"private": private, "files": {}, "head": "0" * 40}
        self._send(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def _validate(self, body: bytes):
        self._send(200, {"warnings": [], "errors": []})

    def _preupload(self, body: bytes, repo: str):
        stored = self.hub.repositories[repo]["files"]
        answers = []
        for file in json.loads(body)["files"]:
            mode = "regular" if file["size"] <= REGULAR_LIMIT else "lfs"
            answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if (content := stored.get(file["path"])) is not None:
                answer["oid"] = blob_id(content) if mode == "regular" else hashlib.sha256(content).hexdigest()
            answers.append(answer)
        self._send(200, {"files": answers, "commitOid": self.hub.repositories[repo]["head"]})

    def _batch(self, body: bytes, repo: str):
        answers = []
        for wanted in json.loads(body)["objects"]:
            answer = dict(wanted)
            if wanted["oid"] not in self.hub.objects:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/objects/{wanted['oid']}", "header": {}}}
            answers.append(answer)
        self._send(200, {"transfer": "basic", "objects": answers})

    def _store(self, body: bytes, oid: str):
        if hashlib.sha256(body).hexdigest() != oid:
            self._send(400, {"error": "content does not have this hash"})
            return
        self.hub.objects[oid] = body
        self.hub.uploads.append(oid)
        self._send(200, {})

    def _commit(self, body: bytes, repo: str):
        files = dict(self.hub.repositories[repo]["files"])
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    self._send(400, {"error": f"{value['path']} was not uploaded"})
                    return
                files[value["path"]] = self.hub.objects[value["oid"]]
        head = hashlib.sha1(body).hexdigest()
        self.hub.repositories[repo] |= {"files": files, "head": head}
        self._send(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{head}", "commitOid": head, "success": True})

    def _info(self, body: bytes, repo: str):
        state = self.hub.repositories[repo]
        siblings = [{"rfilename": name} for name in state["files"]]
        answer = {"id": repo, "modelId": repo, "sha": state["head"], "private": state["private"], "siblings": siblings}
        self._send(200, answer)

    def _tree(self, body: bytes, repo: str):
        files = self.hub.repositories[repo]["files"]
        self._send(
            200,
            [
                {"type": "file", "path": name, "size": len(content), "oid": blob_id(content)}
                for name, content in files.items()
            ],
        )

    def _resolve(self, body: bytes, repo: str, file: str):
        state = self.hub.repositories[repo]
        content = state["files"].get(file)
        if content is None:
            self._send(
                404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": state["head"]}
            )
            return
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._send(200, headers={"ETag": etag, "X-Repo-Commit": state["head"], "Accept-Ranges": "none"}, body=content)
