"""A Hub on loopback for huggingface_hub's own client: repositories with branches and commits, regular and LFS uploads, faults on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

LFS_SUFFIXES = (".safetensors", ".bin", ".pkl")
PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}


class Repo:
    """Branches that point to commits, and commits that hold files."""

    def __init__(self) -> None:
        self.branches: dict[str, str] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.private = False

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Make these the files of a branch; returns the commit's hash."""
        digest = hashlib.sha1(f"{branch} {len(self.commits)}".encode())
        for name, data in sorted(files.items()):
            digest.update(f"{name} {len(data)} ".encode() + data)
        self.commits[digest.hexdigest()] = dict(files)
        self.branches[branch] = digest.hexdigest()
        return digest.hexdigest()

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, or the commit itself; None if there is no such thing."""
        found = self.branches.get(revision, revision)
        return found if found in self.commits else None


class LoopbackHub:
    """The server and all that it knows. Tests read `requests` and set the faults.

    Attributes:
        repos: (type, id) → repository.
        requests: what was asked for, as "METHOD /path".
        before: called with each request's line before it is answered, say to move a branch.
        token: needed for everything that writes; None: anyone may.
        variables: (Space, name) → value.
        cut: called with a file's name and its bytes; how many of them to send before the connection breaks, or None.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.token: str | None = None
        self.variables: dict[tuple[str, str], str] = {}
        self.before: Callable[[str], None] = lambda line: None
        self.cut: Callable[[str, bytes], int | None] = lambda name, data: None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def add(self, repo_id: str, files: Mapping[str, bytes], repo_type: str = "model", branch: str = "main") -> str:
        """Commit files to a repository, which is created if need be."""
        return self.repos.setdefault((repo_type, repo_id), Repo()).commit(files, branch)

    def files(self, repo_id: str, repo_type: str = "model", branch: str = "main") -> dict[str, bytes]:
        """What a branch holds."""
        repo = self.repos[repo_type, repo_id]
        return repo.commits[repo.branches[branch]]

    def asked_for(self) -> set[str]:
        """Names of the files whose content was asked for."""
        paths = (line.removeprefix("GET ") for line in self.requests if line.startswith("GET ") and "/resolve/" in line)
        return {path.partition("/resolve/")[2].partition("/")[2] for path in paths}

    @contextmanager
    def running(self) -> Iterator[LoopbackHub]:
        """Serve in a thread."""
        thread = threading.Thread(target=self.server.serve_forever)
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            thread.join()
            self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.before(self.hub.requests[-1])
        if match := re.fullmatch(r"/api/(model|dataset|space)s/([^/]+/[^/]+?)(?:/revision/(.+))?", path):
            self._info(match[1], match[2], match[3] or "main")
        elif match := re.fullmatch(r"/api/(model|dataset|space)s/([^/]+/[^/]+)/tree/([^/]+)(?:/.*)?", path):
            self._tree(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/(datasets/|spaces/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind = next(kind for kind, prefix in PREFIXES.items() if prefix == (match[1] or ""))
            self._file(kind, match[2], match[3], match[4])
        elif path == "/api/whoami-v2":
            self._json({"type": "user", "name": "owner", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        else:
            self._refuse(404, "EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = unquote(self.path.split("?")[0])
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.before(self.hub.requests[-1])
        if self.hub.token is not None and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._refuse(401, "")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/(model|dataset|space)s/([^/]+/[^/]+)/preupload/(.+)", path):
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"} for file in files]
            self._json({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body)["objects"])
        elif match := re.fullmatch(r"/api/(model|dataset|space)s/([^/]+/[^/]+)/commit/(.+)", path):
            self._commit(match[1], match[2], match[3], [json.loads(line) for line in body.splitlines()])
        elif match := re.fullmatch(r"/api/(model|dataset|space)s/([^/]+/[^/]+)/branch/(.+)", path):
            repo = self.hub.repos[match[1], match[2]]
            if match[3] in repo.branches:
                return self._refuse(409, "BranchExists")
            repo.branches[match[3]] = repo.branches["main"]
            self._json({})
        elif match := re.fullmatch(r"/api/spaces/([^/]+/[^/]+)/variables", path):
            entry = json.loads(body)
            self.hub.variables[match[1], entry["key"]] = entry["value"]
            self._json({})
        else:
            self._refuse(404, "EntryNotFound")
        return None

    def do_PUT(self) -> None:
        self.hub.requests.append(f"PUT {self.path}")
        self.hub.before(self.hub.requests[-1])
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if hashlib.sha256(data).hexdigest() != self.path.rpartition("/")[2]:
            return self._refuse(400, "WrongHash")
        self.hub.objects[self.path.rpartition("/")[2]] = data
        return self._answer(b"")

    # --- answers ------------------------------------------------------------------------------------------------

    def _info(self, kind: str, repo_id: str, revision: str) -> None:
        repo = self.hub.repos.get((kind, repo_id))
        commit = repo.resolve(revision) if repo else None
        if repo is None:
            self._refuse(404, "RepoNotFound")
        elif commit is None:
            self._refuse(404, "RevisionNotFound")
        else:
            siblings = [{"rfilename": name} for name in sorted(repo.commits[commit])]
            self._json({"id": repo_id, "sha": commit, "siblings": siblings, "private": repo.private, "tags": [], "downloads": 0})

    def _tree(self, kind: str, repo_id: str, revision: str) -> None:
        repo = self.hub.repos.get((kind, repo_id))
        commit = repo.resolve(revision) if repo else None
        if repo is None or commit is None:
            return self._refuse(404, "RevisionNotFound" if repo else "RepoNotFound")
        return self._json([_entry(name, data) for name, data in sorted(repo.commits[commit].items())])

    def _file(self, kind: str, repo_id: str, revision: str, name: str) -> None:
        repo = self.hub.repos.get((kind, repo_id))
        commit = repo.resolve(revision) if repo else None
        if repo is None or commit is None or name not in repo.commits[commit]:
            return self._refuse(404, "EntryNotFound" if commit else "RepoNotFound")
        data = repo.commits[commit][name]
        entry = _entry(name, data)
        headers = {"ETag": f'"{entry.get("lfs", entry)["oid"]}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        start = int(re.sub(r"\D.*", "", self.headers.get("Range", "bytes=0").removeprefix("bytes=")) or 0)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = self.hub.cut(name, data[start:]) if self.command == "GET" else None
        return self._answer(data[start:], headers, 206 if start else 200, cut)

    def _create(self, asked: Mapping[str, Any]) -> None:
        key = (asked.get("type") or "model", f"{asked.get('organization') or 'owner'}/{asked['name']}")
        found = {"url": f"{self.hub.endpoint}/{PREFIXES[key[0]]}{key[1]}", "name": key[1], "id": "0"}
        if key in self.hub.repos:
            return self._answer(json.dumps(found).encode(), status=409)
        self.hub.repos[key] = Repo()
        self.hub.repos[key].private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repos[key].commit({".gitattributes": b""})
        return self._json(found)

    def _batch(self, objects: list[Mapping[str, Any]]) -> None:
        missing = {item["oid"] for item in objects} - set(self.hub.objects)
        upload = {oid: {"actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{oid}"}}} for oid in missing}
        self._json({"transfer": "basic", "objects": [{**item, **upload.get(item["oid"], {})} for item in objects]})

    def _commit(self, kind: str, repo_id: str, branch: str, lines: list[dict[str, Any]]) -> None:
        repo = self.hub.repos[kind, repo_id]
        if branch not in repo.branches:
            return self._refuse(404, "RevisionNotFound")
        files = dict(repo.commits[repo.branches[branch]])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        commit = repo.commit(files, branch)
        return self._json({"commitUrl": f"{self.hub.endpoint}/{PREFIXES[kind]}{repo_id}/commit/{commit}", "commitOid": commit})

    def _json(self, data: Any) -> None:
        self._answer(json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str) -> None:
        self._answer(json.dumps({"error": code}).encode(), {"X-Error-Code": code, "X-Error-Message": code}, status)

    def _answer(self, body: bytes, headers: Mapping[str, str] | None = None, status: int = 200, cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _entry(name: str, data: bytes) -> dict[str, Any]:
    """A file in a repository's tree, as the Hub describes it."""
    oid = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
    lfs = {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}} if name.endswith(LFS_SUFFIXES) else {}
    return {"type": "file", "path": name, "size": len(data), "oid": oid, **lfs}
