"""A stand-in for the HuggingFace hub: the few endpoints that a push and a download use, and faults where asked for.

It keeps repositories in memory, branch by branch, and every request, so that a test sees the bytes that would have
been uploaded. huggingface_hub itself talks to it, over HTTP.
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
from urllib.parse import unquote, urlsplit

import pytest
import yaml


@dataclass
class Repo:
    """A repository: the files of each branch and of each commit."""

    private: bool
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, changed: dict[str, bytes], message: str = "") -> str:
        """A commit on a branch; returns its name."""
        files = {**self.commits[self.branches[branch]], **changed}
        name = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        self.messages.append(message)
        return name

    def at(self, revision: str) -> str | None:
        """The commit of a branch, or that commit."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


@dataclass
class HubServer:
    """A running server.

    Attributes:
        url: its address.
        repos: by `USER/NAME`.
        fails: (method, pattern of the path, status) of requests that are refused.
        asked: method, path and token of all requests so far.
    """

    url: str
    repos: dict[str, Repo] = field(default_factory=dict)
    fails: list[tuple[str, str, int]] = field(default_factory=list)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Files of a branch."""
        found = self.repos[repo]
        return found.commits[found.branches[revision]]


@contextmanager
def serve() -> Iterator[HubServer]:
    """A hub at a free port of this machine."""
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    httpd.daemon_threads = True
    server = HubServer(f"http://127.0.0.1:{httpd.server_port}")
    httpd.RequestHandlerClass = type("Handler", (_Handler,), {"told": server})
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


@contextmanager
def as_the_hub(monkeypatch: pytest.MonkeyPatch, cache: str) -> Iterator[HubServer]:
    """The same, and huggingface_hub in this process talks to it, with a token and a cache of its own."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    with serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
        monkeypatch.setenv("HF_TOKEN", "hf_writes")
        disable_progress_bars()
        try:
            yield server
        finally:
            enable_progress_bars()


class _Handler(BaseHTTPRequestHandler):
    told: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.told.asked.append((self.command, path, token))
        for method, pattern, status in self.told.fails:
            if method == self.command and re.search(pattern, path):
                self._send(status, {"error": "told to fail"})
                return
        for method, pattern, do in _ROUTES:
            if method == self.command.replace("HEAD", "GET") and (hit := re.fullmatch(pattern, path)):
                do(self, *hit.groups(), body)
                return
        self._send(404, {"error": f"no such endpoint {self.command} {path}"}, {"X-Error-Code": "RepoNotFound"})

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _repo(self, name: str) -> Repo | None:
        found = self.told.repos.get(name)
        if found is None:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return found

    def create(self, body: bytes) -> None:
        given = json.loads(body)
        name = f"{given['organization']}/{given['name']}"
        if name in self.told.repos:
            self._send(409, {"error": "You already created this model repo", "url": f"{self.told.url}/{name}"})
            return
        self.told.repos[name] = Repo(private=bool(given.get("private") or given.get("visibility") == "private"))
        self._send(200, {"url": f"{self.told.url}/{name}"})

    def validate(self, body: bytes) -> None:
        """The hub's look at the front matter of a card."""
        head = yaml.safe_load(json.loads(body)["content"].split("---")[1])
        errors = [] if isinstance(head, dict) and head.get("library_name") else [{"message": "no front matter"}]
        self._send(400 if errors else 200, {"errors": errors, "warnings": []})

    def info(self, name: str, revision: str | None, body: bytes) -> None:
        if repo := self._repo(name):
            commit = repo.at(revision or "main")
            if commit is None:
                self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
                return
            siblings = [{"rfilename": file} for file in repo.commits[commit]]
            self._send(200, {"id": name, "private": repo.private, "sha": commit, "siblings": siblings, "tags": []})

    def tree(self, name: str, revision: str, body: bytes) -> None:
        if repo := self._repo(name):
            commit = repo.at(revision)
            if commit is None:
                self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
                return
            files = repo.commits[commit]
            self._send(200, [{"type": "file", "path": f, "size": len(c), "oid": "0"} for f, c in files.items()])

    def branch(self, name: str, branch: str, body: bytes) -> None:
        if repo := self._repo(name):
            if branch in repo.branches:
                self._send(409, {"error": "Reference already exists"})
                return
            repo.branches[branch] = repo.branches["main"]
            self._send(201, {})

    def preupload(self, name: str, revision: str, body: bytes) -> None:
        if self._repo(name):
            found = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._send(200, {"files": found})

    def batch(self, name: str, body: bytes) -> None:
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.told.url}/lfs/{wanted['oid']}"}}}
            for wanted in json.loads(body)["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str, body: bytes) -> None:
        good = hashlib.sha256(body).hexdigest() == oid
        self.told.blobs[oid] = body
        self._send(200 if good else 400, {})

    def commit(self, name: str, revision: str, body: bytes) -> None:
        if repo := self._repo(name):
            changed, message = {}, ""
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    message = value["summary"]
                elif line["key"] == "file":
                    changed[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    changed[value["path"]] = self.told.blobs[value["oid"]]
            commit = repo.commit(revision, changed, message)
            url = f"{self.told.url}/{name}/commit/{commit}"
            self._send(200, {"success": True, "commitUrl": url, "commitOid": commit})

    def resolve(self, name: str, revision: str, file: str, body: bytes) -> None:
        if repo := self._repo(name):
            commit = repo.at(revision)
            files = repo.commits[commit] if commit else {}
            if file not in files:
                code = "EntryNotFound" if commit else "RevisionNotFound"
                self._send(
                    404, {"error": code}, {"X-Error-Code": code, **({"X-Repo-Commit": commit} if commit else {})}
                )
                return
            digest = hashlib.sha256(files[file]).hexdigest()
            self._send(200, files[file], {"ETag": f'"{digest}"', "X-Repo-Commit": str(commit)})


_NAME = r"([^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Any]] = [
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("GET", rf"/api/models/{_NAME}()", lambda handler, name, _, body: handler.info(name, None, body)),
    ("GET", rf"/api/models/{_NAME}/revision/(.+)", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/tree/(.+)", _Handler.tree),
    ("POST", rf"/api/models/{_NAME}/branch/(.+)", _Handler.branch),
    ("POST", rf"/api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/lfs/(\w+)", _Handler.store),
    ("POST", rf"/api/models/{_NAME}/commit/(.+)", _Handler.commit),
    ("GET", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
