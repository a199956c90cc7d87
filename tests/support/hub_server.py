"""A Hub on loopback, in memory, with the endpoints that `huggingface_hub` uses to push a model and to load it again.

Binary files and files above `LFS_SIZE` are LFS objects, uploaded in parts above `PART_SIZE`. There is no Xet, so a client needs
HF_HUB_DISABLE_XET=1 as soon as a file is an LFS object. The server checks requests as the Hub does: hashes have to match, a
private repository needs its owner's token, invalid metadata of a card is refused, and a commit needs its objects. A test
injects failures with `faults`, a client in another process by posting them to `/_faults`.
"""

import base64
import hashlib
import json
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import ceil
from threading import Lock, Thread
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SIZE = 10_000
PART_SIZE = 100_000
_ID = r"(?P<repo>[\w.-]+/[\w.-]+)"
_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class File(NamedTuple):
    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


class Commit(NamedTuple):
    sha: str
    title: str
    files: dict[str, File]


@dataclass
class Repository:
    owner: str
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def commit(self, branch: str, title: str, files: dict[str, File]) -> Commit:
        history = self.branches.setdefault(branch, [])
        commit = Commit(hashlib.sha1(f"{branch} {len(history)} {title}".encode()).hexdigest(), title, files)
        history.append(commit)
        return commit

    def at(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for history in self.branches.values() for c in history if c.sha == revision), None)


@dataclass
class Fault:
    """A failure of the next `times` requests whose "METHOD path" matches `pattern`.

    With `late`, answer normally after that many seconds. Otherwise answer with `status`; for status 0, hang up amid the body.
    """

    pattern: str
    times: int
    status: int = 0
    late: float = 0


class Request(NamedTuple):
    method: str
    path: str
    token: str | None
    status: int


class Answer(Exception):
    """Raised to answer a request with an error."""

    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status = status
        self.headers = {"X-Error-Code": code} if code else {}
        self.message = message


class HubServer(ThreadingHTTPServer):
    """`with HubServer({token: user}) as hub`: listening at `hub.endpoint` until the block ends."""

    daemon_threads = True

    def __init__(self, users: dict[str, str]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.users = users
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.lock = Lock()

    def __enter__(self) -> "HubServer":
        Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing for a client that hangs up."""

    def fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        commit = self.repositories[repo].at(revision)
        assert commit is not None
        return {path: file.data for path, file in commit.files.items()}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: Any) -> None:
        pass

    def _answer_request(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        self.token = token if scheme == "Bearer" else None
        self.user = self.server.users.get(token)
        fault = self.server.fault(f"{self.command} {path}")
        if fault and fault.late:
            time.sleep(fault.late)
            fault = None
        if fault and not fault.status:
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self._log(path, 0)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.body = self._read()
        try:
            if fault:
                raise Answer(fault.status, message="injected")
            self._reply(path, *self._route(path))
        except Answer as answer:
            errors = [{"message": line} for line in answer.message.splitlines()]
            self._reply(path, answer.status, {"error": answer.message, "errors": errors}, answer.headers)

    do_GET = do_HEAD = do_POST = do_PUT = _answer_request

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _log(self, path: str, status: int) -> None:
        with self.server.lock:
            self.server.requests.append(Request(self.command, path, self.token, status))

    def _reply(self, path: str, status: int, body: Any = b"", headers: dict[str, str] | None = None) -> None:
        self._log(path, status)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _route(self, path: str) -> tuple:
        method = "GET" if self.command == "HEAD" else self.command
        for verb, pattern, serve in _ROUTES:
            if verb == method and (match := re.fullmatch(pattern, path)):
                return serve(self, **match.groupdict())
        raise Answer(404, "EntryNotFound")

    def _repository(self, repo: str, write: bool = False) -> Repository:
        repository = self.server.repositories.get(repo)
        if repository is None or (repository.private and repository.owner != self.user):
            raise Answer(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if write and repository.owner != self.user:
            raise Answer(403 if self.user else 401, message="You need the owner's token to write.")
        return repository

    def _commit_at(self, repo: str, revision: str, write: bool = False) -> Commit:
        commit = self._repository(repo, write).at(revision)
        if commit is None:
            raise Answer(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def set_faults(self) -> tuple:
        self.server.faults = [Fault(**fault) for fault in json.loads(self.body)]
        return 200, {}

    def create(self) -> tuple:
        sent = json.loads(self.body)
        if self.user is None:
            raise Answer(401, message="Invalid credentials")
        repo = f"{sent.get('organization') or self.user}/{sent['name']}"
        exists = repo in self.server.repositories
        if not exists:
            private = bool(sent.get("private")) or sent.get("visibility") == "private"
            repository = self.server.repositories[repo] = Repository(self.user, private)
            repository.commit("main", "initial commit", {})
        return 409 if exists else 200, {"url": f"{self.server.endpoint}/{repo}"}

    def branch(self, repo: str, branch: str) -> tuple:
        start = self._commit_at(repo, "main", write=True)
        self._repository(repo).commit(branch, "branched", dict(start.files))
        return 200, {}

    def validate_yaml(self) -> tuple:
        """Like the Hub, accept only ids as base model and datasets, and only a mapping as metadata."""
        content = json.loads(self.body)["content"]
        metadata = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else {}
        errors = [] if isinstance(metadata, dict) else ["metadata is not a mapping"]
        for name in ("base_model", "datasets") if not errors else ():
            given = metadata.get(name) or []
            given = [given] if isinstance(given, str) else given
            errors += [f'"{name}" with value "{v}" is not valid.' for v in given if not _REPO_ID.fullmatch(v)]
        if errors:
            raise Answer(400, message="\n".join(errors))
        return 200, {"warnings": [], "errors": []}

    def preupload(self, repo: str, revision: str) -> tuple:
        stored_files = self._commit_at(repo, revision, write=True).files
        files = []
        for file in json.loads(self.body)["files"]:
            binary = b"\0" in base64.b64decode(file["sample"])
            mode = "lfs" if binary or file["size"] > LFS_SIZE else "regular"
            stored = stored_files.get(file["path"])
            oid = {"oid": stored.oid} if stored else {}
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
        return 200, {"files": files}

    def lfs_batch(self, repo: str) -> tuple:
        self._repository(repo, write=True)
        objects = []
        for item in json.loads(self.body)["objects"]:
            oid, size = item["oid"], item["size"]
            actions: dict[str, Any] = {}
            if oid not in self.server.objects:
                href = f"{self.server.endpoint}/_lfs/{oid}"
                actions = {"upload": {"href": href}, "verify": {"href": f"{self.server.endpoint}/_verify/{repo}"}}
                if size > PART_SIZE:
                    parts = {f"{i:05}": f"{href}/{i}" for i in range(1, ceil(size / PART_SIZE) + 1)}
                    actions["upload"] = {"href": f"{href}/complete", "header": {"chunk_size": str(PART_SIZE)} | parts}
            objects.append(item | ({"actions": actions} if actions else {}))
        return 200, {"objects": objects, "transfer": "basic"}

    def put_object(self, oid: str) -> tuple:
        self._store(oid, self.body)
        return 200, b""

    def put_part(self, oid: str, part: str) -> tuple:
        self.server.parts[oid, int(part)] = self.body
        return 200, b"", {"ETag": hashlib.md5(self.body).hexdigest()}

    def complete(self, oid: str) -> tuple:
        listed = json.loads(self.body)["parts"]
        parts = [self.server.parts[oid, item["partNumber"]] for item in listed]
        if [hashlib.md5(part).hexdigest() for part in parts] != [item["etag"] for item in listed]:
            raise Answer(400, message="parts differ from their etags")
        self._store(oid, b"".join(parts))
        return 200, {}

    def _store(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise Answer(400, message="the object differs from its hash")
        self.server.objects[oid] = data

    def verify(self, repo: str) -> tuple:
        self._repository(repo, write=True)
        sent = json.loads(self.body)
        if len(self.server.objects.get(sent["oid"], b"")) != sent["size"]:
            raise Answer(404, message="no such object")
        return 200, {}

    def commit(self, repo: str, revision: str) -> tuple:
        files = dict(self._commit_at(repo, revision, write=True).files)
        title = ""
        for line in self.body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise Answer(400, message=f"{value['path']} was not uploaded")
                files[value["path"]] = File(self.server.objects[value["oid"]], True)
            else:
                raise Answer(400, message=f"cannot {key}")
        commit = self._repository(repo).commit(revision, title, files)
        return 200, {"commitUrl": f"{self.server.endpoint}/{repo}/commit/{commit.sha}", "commitOid": commit.sha}

    def info(self, repo: str, revision: str = "main") -> tuple:
        commit = self._commit_at(repo, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        private = self._repository(repo).private
        return 200, {"id": repo, "sha": commit.sha, "private": private, "siblings": siblings, "tags": []}

    def tree(self, repo: str, revision: str, folder: str | None = None) -> tuple:
        files = self._commit_at(repo, revision).files
        prefix = f"{folder}/" if folder else ""
        if not any(path.startswith(prefix) for path in files) and folder:
            raise Answer(404, "EntryNotFound")
        entries = []
        for path, file in files.items():
            if path.startswith(prefix) and (self.query.get("recursive") == "true" or "/" not in path[len(prefix) :]):
                lfs = {"lfs": {"oid": file.oid, "size": len(file.data), "pointerSize": 130}} if file.lfs else {}
                entries.append({"type": "file", "oid": file.oid, "size": len(file.data), "path": path, **lfs})
        return 200, entries

    def resolve(self, repo: str, revision: str, path: str) -> tuple:
        commit = self._commit_at(repo, revision)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            missing = Answer(404, "EntryNotFound")
            missing.headers |= headers
            raise missing
        file = commit.files[path]
        linked = {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.data))} if file.lfs else {}
        return 200, file.data, headers | linked | {"ETag": f'"{file.oid}"'}


_ROUTES: list[tuple[str, str, Callable[..., tuple]]] = [
    ("POST", "/_faults", _Handler.set_faults),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", f"/api/models/{_ID}/branch/(?P<branch>.+)", _Handler.branch),
    ("POST", f"/api/models/{_ID}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", f"/api/models/{_ID}/commit/(?P<revision>.+)", _Handler.commit),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("POST", f"/_verify/{_ID}", _Handler.verify),
    ("POST", r"/_lfs/(?P<oid>\w+)/complete", _Handler.complete),
    ("PUT", r"/_lfs/(?P<oid>\w+)", _Handler.put_object),
    ("PUT", r"/_lfs/(?P<oid>\w+)/(?P<part>\d+)", _Handler.put_part),
    ("GET", f"/api/models/{_ID}", _Handler.info),
    ("GET", f"/api/models/{_ID}/revision/(?P<revision>.+)", _Handler.info),
    ("GET", f"/api/models/{_ID}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", _Handler.tree),
    ("GET", f"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
