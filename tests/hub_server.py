"""A local Hub: as much of the HTTP API as `huggingface_hub` and `datasets` need, with faults on demand.

It knows whoami, repositories, commits of regular and large (LFS) files, trees, files by revision and range, and Space
variables. Files of more than LARGE bytes are large. Everything is kept in memory.

`python tests/hub_server.py COMMAND…` runs a command, such as a notebook that publishes, with a Hub of its own.
"""

import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_local"  # the only valid token
LARGE = 50_000


@dataclass
class Fault:
    """A fault of requests with `method` whose path matches `path`, `times` times (forever if negative).

    `status` is the error sent, with the message `says`; 0 reads half of the body and closes the connection. `seconds`
    delays the answer.
    """

    method: str
    path: str
    status: int | None = None
    seconds: float = 0
    times: int = -1
    headers: dict[str, str] = field(default_factory=dict)
    says: str = "switched on"


@dataclass
class Repository:
    """`commits` are pairs of an id and all its files; the last one is `main`."""

    private: bool
    sdk: str | None = None
    variables: dict[str, str] = field(default_factory=dict)
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def commit(self, files: dict[str, bytes]) -> str:
        listing = json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())})
        oid = hashlib.sha1(f"{len(self.commits)} {listing}".encode()).hexdigest()
        self.commits.append((oid, files))
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        return (
            self.commits[-1] if revision == "main" else next(commit for commit in self.commits if commit[0] == revision)
        )


@dataclass
class Hub:
    """The state of the server. `requests` are all (method, path) pairs, `sent` is the number of bytes answered."""

    url: str = ""
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)  # large files by their sha256
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    sent: int = 0

    def files(self, kind: str, repo_id: str) -> dict[str, bytes]:
        """The files of the last commit, without those of the Hub itself."""
        return {
            name: data
            for name, data in self.repositories[kind, repo_id].commits[-1][1].items()
            if name != ".gitattributes"
        }

    def count(self, method: str, path: str) -> int:
        """The number of requests with this method and path."""
        return sum(verb == method and re.search(path, where) is not None for verb, where in self.requests)


@contextmanager
def running_hub():
    """Run a Hub on a free local port."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def environment(hub: Hub) -> dict[str, str]:
    """The variables that direct the official client of a new process to `hub`."""
    return {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}


def _blob_id(data: bytes) -> str:
    """Git's blob id of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Be silent."""

    def do_GET(self):
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        fault = next(
            (f for f in self.hub.faults if f.times and f.method == self.command and re.search(f.path, path)), None
        )
        if fault:
            fault.times -= 1
            time.sleep(fault.seconds)
            if fault.status == 0:
                self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return None
        body = self._body()
        if fault and fault.status:
            return self._send(fault.status, {"error": fault.says}, fault.headers)
        if not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid credentials in Authorization header"})
        for method, pattern, answer in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and (method == self.command or (method == "GET" and self.command == "HEAD")):
                return answer(self, body, **found.groupdict())
        return self._send(404, {"error": f"no such endpoint: {self.command} {path}"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, what: object, headers: dict[str, str] | None = None):
        data = what if isinstance(what, bytes) else json.dumps(what).encode()
        headers = {"Content-Length": str(len(data)), **(headers or {})}
        if isinstance(what, dict) and "error" in what:
            headers["X-Error-Message"] = what["error"]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.hub.sent += len(data)
            self.wfile.write(data)

    def _repository(self, kind: str | None, repo_id: str) -> Repository | None:
        found = self.hub.repositories.get(((kind or "models").rstrip("/").removesuffix("s"), repo_id))
        if found is None:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return found

    def whoami(self, _):
        self._send(200, {"name": "somebody", "type": "user", "orgs": [], "auth": {"type": "access_token"}})

    def create(self, body):
        wanted = json.loads(body)
        kind, repo_id = wanted.get("type") or "model", f"{wanted['organization']}/{wanted['name']}"
        url = f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
        if (kind, repo_id) in self.hub.repositories:
            return self._send(409, {"error": "You already created this repo", "url": url})
        variables = {one["key"]: one["value"] for one in wanted.get("variables", [])}
        made = self.hub.repositories[kind, repo_id] = Repository(
            wanted.get("visibility") == "private", wanted.get("sdk"), variables
        )
        made.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return self._send(200, {"url": url})

    def validate(self, body):
        text = json.loads(body)["content"]
        self._send(200, {"errors": [], "warnings": [] if text.startswith("---") else [{"message": "empty metadata"}]})

    def preupload(self, body, kind, repo_id, revision):
        if repository := self._repository(kind, repo_id):
            there = repository.at(revision)[1]
            files = []
            for one in json.loads(body)["files"]:
                mode, old = "lfs" if one["size"] > LARGE else "regular", there.get(one["path"])
                name = (
                    (hashlib.sha256(old).hexdigest() if len(old) > LARGE else _blob_id(old))
                    if old is not None
                    else None
                )
                files.append({"path": one["path"], "uploadMode": mode, "shouldIgnore": False, "oid": name})
            self._send(200, {"files": files})

    def batch(self, body, kind, repo_id):
        if self._repository(kind, repo_id):
            objects = []
            for one in json.loads(body)["objects"]:
                have = one["oid"] in self.hub.blobs
                objects.append(
                    one if have else {**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}
                )
            self._send(200, {"transfer": "basic", "objects": objects})

    def keep(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self._send(400, {"error": "the content is not what its name says"})
        self.hub.blobs[oid] = body
        return self._send(200, {})

    def commit(self, body, kind, repo_id, revision):
        repository = self._repository(kind, repo_id)
        if repository is None:
            return None
        lines = [json.loads(line) for line in body.splitlines()]
        now, files = repository.at(revision)
        files = dict(files)
        for line in lines:
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit") not in (None, now):
                return self._send(412, {"error": "A commit has happened since. Please refresh and try again."})
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            if line["key"] == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(files)
        return self._send(
            200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}"}
        )

    def info(self, _, kind, repo_id, revision="main"):
        if repository := self._repository(kind, repo_id):
            oid, files = repository.at(revision or "main")
            siblings = [{"rfilename": name} for name in files]
            extra = {"sdk": repository.sdk} if repository.sdk else {}
            self._send(
                200,
                {"id": repo_id, "sha": oid, "private": repository.private, "tags": [], "siblings": siblings, **extra},
            )

    def tree(self, _, kind, repo_id, revision, folder=None):
        if repository := self._repository(kind, repo_id):
            below, entries, folders = f"{folder}/" if folder else "", [], set()
            for name, data in repository.at(revision)[1].items():
                if not name.startswith(below):
                    continue
                first, slash, _ = name.removeprefix(below).partition("/")
                if slash and "recursive=true" not in self.path.lower():
                    folders.add(below + first)
                    continue
                large = (
                    {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}
                    if len(data) > LARGE
                    else {}
                )
                entries.append({"type": "file", "path": name, "size": len(data), "oid": _blob_id(data), **large})
            self._send(
                200, entries + [{"type": "directory", "path": name, "oid": _blob_id(b"")} for name in sorted(folders)]
            )

    def resolve(self, _, kind, repo_id, revision, name):
        repository = self._repository(kind, repo_id)
        if repository is None:
            return None
        oid, files = repository.at(revision)
        if name not in files:
            return self._send(
                404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid}
            )
        data = files[name]
        etag = hashlib.sha256(data).hexdigest() if len(data) > LARGE else _blob_id(data)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(part[1]), min(int(part[2] or len(data) - 1), len(data) - 1)
            return self._send(
                206, data[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"}
            )
        return self._send(200, data, headers)

    def variables(self, body, repo_id):
        if repository := self._repository("spaces", repo_id):
            if body:
                wanted = json.loads(body)
                repository.variables[wanted["key"]] = wanted["value"]
            self._send(200, {key: {"value": value} for key, value in repository.variables.items()})


_API = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo_id>[^/]+/[^/]+)"
_GIT = r"/(?P<kind>datasets/|spaces/)?(?P<repo_id>[^/]+/[^/]+)"
ROUTES = (
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", _API + r"/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", _GIT + r"\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.keep),
    ("POST", _API + r"/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("GET", _API + r"(/revision/(?P<revision>[^/]+))?", _Handler.info),
    ("GET", _API + r"/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", _Handler.tree),
    ("POST", r"/api/spaces/(?P<repo_id>[^/]+/[^/]+)/variables", _Handler.variables),
    ("GET", r"/api/spaces/(?P<repo_id>[^/]+/[^/]+)/variables", _Handler.variables),
    ("GET", _GIT + r"/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler.resolve),
)

if __name__ == "__main__":
    with running_hub() as running:
        sys.exit(subprocess.run(sys.argv[1:], env={**os.environ, **environment(running)}).returncode)
