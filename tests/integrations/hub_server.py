"""A stand-in for the Hugging Face Hub: what `huggingface_hub` uses of its HTTP interface.

Repositories, commits, branches, pull requests, regular and large files. Nothing is stored on disk,
everything can be inspected, and an upload can be broken on purpose.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_standin"
USER = "tester"


@dataclass
class Repository:
    """branch -> list of commits (id, message, path -> content), oldest first."""

    branches: dict[str, list[tuple[str, str, dict[str, bytes]]]]
    large: set[str] = field(default_factory=set)

    def commit(
        self, revision: str, message: str, files: dict[str, bytes], base: str | None = None
    ) -> str:
        history = self.branches.setdefault(revision, list(self.branches[base or "main"]))
        commit = hashlib.sha1(f"{revision}{len(history)}{message}".encode()).hexdigest()
        history.append((commit, message, files))
        return commit

    def find(self, revision: str) -> tuple[str, str, dict[str, bytes]] | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next(
            (c for history in self.branches.values() for c in history if c[0] == revision), None
        )

    @property
    def files(self) -> dict[str, bytes]:
        return self.branches["main"][-1][2]


class Hub(ThreadingHTTPServer):
    """The server and its state.

    Attributes:
        repositories: by "owner/name".
        objects: large files by sha256, complete ones only.
        received: sha256 of each large file, once per time that it was sent completely.
        requests: "METHOD /path" of each request.
        objects_until_break: how many large files may still arrive before uploads break; None never.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.received: list[str] = []
        self.requests: list[str] = []
        self.objects_until_break: int | None = None
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def create(self, name: str, files: dict[str, bytes] | None = None) -> Repository:
        first = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"} | (
            files or {}
        )
        self.repositories[name] = Repository(branches={"main": []})
        self.repositories[name].commit("main", "initial commit", first)
        return self.repositories[name]

    def may_receive(self) -> bool:
        """Whether one more large file goes through."""
        with self.lock:
            if self.objects_until_break is None:
                return True
            self.objects_until_break -= 1
            return self.objects_until_break >= 0


@contextmanager
def running_hub() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Silence: `Hub.requests` keeps them."""

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        self.server.requests.append(f"{method} {unquote(parts.path)}")
        for verb, pattern, handler in _ROUTES:
            found = re.fullmatch(pattern, parts.path)
            if found and method in verb.split("|"):
                return handler(self, *(unquote(group) for group in found.groups()))
        self._refuse(404, "EntryNotFound", f"the stand-in has no {method} {parts.path}")

    # ---- answers

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {
            "X-Error-Code": code,
            "X-Error-Message": message,
            "Content-Type": "application/json",
        }
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # ---- requests

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _may_write(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._body()
        self._refuse(401, "", "Invalid username or password.")
        return False

    def _found(self, name: str, revision: str) -> tuple[str, str, dict[str, bytes]] | None:
        repository = self.server.repositories.get(name)
        if repository is None:
            self._refuse(404, "RepoNotFound", "Repository not found")
            return None
        commit = repository.find(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def create_repo(self) -> None:
        if not self._may_write():
            return
        wanted = json.loads(self._body())
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        status = 409 if name in self.server.repositories else 200
        if status == 200:
            self.server.create(name)
        self._json({"url": f"{self.server.url}/{name}", "name": name}, status)

    def create_branch(self, name: str, branch: str) -> None:
        self._body()
        branches = self.server.repositories[name].branches
        status = 409 if branch in branches else 200
        branches.setdefault(branch, list(branches["main"]))
        self._json({}, status)

    def validate_yaml(self) -> None:
        content = json.loads(self._body())["content"]
        found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            metadata = yaml.safe_load(found[1]) if found else None
        except yaml.YAMLError as err:
            return self._json({"errors": [{"message": str(err)}], "warnings": []}, 400)
        errors = [] if isinstance(metadata, dict) else [{"message": "no metadata"}]
        if (
            isinstance(metadata, dict)
            and metadata.get("license") == "other"
            and "license_name" not in metadata
        ):
            errors.append({"message": '"license_name" is required'})
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, name: str, revision: str) -> None:
        wanted = json.loads(self._body())["files"]
        commit = self._found(name, revision)
        if commit is None:
            return
        answer = []
        for file in wanted:
            large = file["path"].endswith(".safetensors")
            old = commit[2].get(file["path"])
            oid = None if old is None else _sha256(old) if large else _git_oid(old)
            mode = "lfs" if large else "regular"
            answer.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
            )
        self._json({"files": answer})

    def lfs_batch(self, name: str) -> None:
        if not self._may_write():
            return
        answer = []
        for wanted in json.loads(self._body())["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.objects:
                target = f"{self.server.url}/lfs/{wanted['oid']}"
                entry["actions"] = {
                    "upload": {"href": target},
                    "verify": {"href": f"{target}/verify"},
                }
            answer.append(entry)
        self._json({"transfer": "basic", "objects": answer})

    def lfs_put(self, oid: str) -> None:
        if not self.server.may_receive():
            # Half of the file, then silence: what a broken connection looks like.
            self.rfile.read(int(self.headers.get("Content-Length", 2)) // 2)
            self.close_connection = True
            self.connection.close()
            return
        content = self._body()
        if _sha256(content) != oid:
            return self._refuse(400, "", "the content does not have the hash")
        with self.server.lock:
            self.server.objects[oid] = content
            self.server.received.append(oid)
        self._send(200, b"", {})

    def lfs_verify(self, oid: str) -> None:
        wanted = json.loads(self._body())
        stored = self.server.objects.get(oid)
        complete = stored is not None and wanted["oid"] == oid and wanted["size"] == len(stored)
        self._json({}, 200 if complete else 404)

    def commit(self, name: str, revision: str) -> None:
        if not self._may_write():
            return
        lines = [json.loads(line) for line in self._body().splitlines()]
        repository = self.server.repositories[name]
        base = repository.find(revision)
        if base is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files, message = dict(base[2]), ""
        for line in lines:
            kind, value = line["key"], line["value"]
            if kind == "header":
                message = value["summary"]
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.server.objects:
                    return self._refuse(400, "", f"{value['path']}: its content was never uploaded")
                files[value["path"]] = self.server.objects[value["oid"]]
                repository.large.add(value["path"])
            elif kind == "deletedFile":
                del files[value["path"]]
        answer: dict[str, Any] = {}
        target = revision
        if "create_pr" in self.query:
            pulls = [branch for branch in repository.branches if branch.startswith("refs/pr/")]
            target = f"refs/pr/{len(pulls) + 1}"
            answer["pullRequestUrl"] = (
                f"{self.server.url}/{name}/discussions/{target.rpartition('/')[2]}"
            )
        commit = repository.commit(target, message, files, base=revision)
        self._json(
            {
                "commitUrl": f"{self.server.url}/{name}/commit/{commit}",
                "commitOid": commit,
                **answer,
            }
        )

    def info(self, name: str, revision: str = "main") -> None:
        commit = self._found(name, revision)
        if commit is not None:
            siblings = [{"rfilename": path} for path in commit[2]]
            self._json(
                {"id": name, "modelId": name, "sha": commit[0], "siblings": siblings, "tags": []}
            )

    def tree(self, name: str, revision: str, folder: str = "") -> None:
        commit = self._found(name, revision)
        if commit is None:
            return
        inside = {
            path: data
            for path, data in commit[2].items()
            if not folder or path.startswith(f"{folder}/")
        }
        if folder and not inside:
            return self._refuse(404, "EntryNotFound", f"{folder} does not exist")
        self._json(
            [
                {"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)}
                for path, data in inside.items()
            ]
        )

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self._found(name, revision)
        if commit is None:
            return
        content = commit[2].get(path)
        if content is None:
            return self._refuse(404, "EntryNotFound", f"{path} does not exist")
        large = path in self.server.repositories[name].large
        etag = f'"{_sha256(content) if large else _git_oid(content)}"'
        self._send(
            200,
            content,
            {"ETag": etag, "X-Repo-Commit": commit[0], "Content-Type": "application/octet-stream"},
        )


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, str, Any]] = [
    ("POST", "/api/repos/create", _Handler.create_repo),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", f"/api/models/{_NAME}/branch/([^/]+)", _Handler.create_branch),
    ("POST", f"/api/models/{_NAME}/preupload/([^/]+)", _Handler.preupload),
    ("POST", f"/api/models/{_NAME}/commit/([^/]+)", _Handler.commit),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/([0-9a-f]{64})", _Handler.lfs_put),
    ("POST", "/lfs/([0-9a-f]{64})/verify", _Handler.lfs_verify),
    ("GET", f"/api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    ("GET", f"/api/models/{_NAME}/tree/([^/]+)/(.+)", _Handler.tree),
    ("GET", f"/api/models/{_NAME}/revision/([^/]+)", _Handler.info),
    ("GET", f"/api/models/{_NAME}", _Handler.info),
    ("GET|HEAD", f"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
