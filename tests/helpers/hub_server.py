"""A small Hub on loopback: the endpoints that huggingface_hub's client uses, repositories in memory, faults on demand.

Commits are immutable snapshots, branches point to them. Weights and large files go by LFS, as on the real one.
"""

from __future__ import annotations

import base64
import json
import re
import socket
import threading
from collections import Counter
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

OWNER, READER, STRANGER = "hf_owner", "hf_reader", "hf_stranger"
TOKENS = {OWNER: ("user", True), READER: ("user", False), STRANGER: ("stranger", True)}
LFS_BYTES = 10_000_000
_ID = r"(?P<repo>[^/]+/[^/]+)"
# method, path, name of the handler's method and of its faults
ROUTES = [
    ("POST", "/api/repos/create", "create"),
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/validate-yaml", "validate"),
    ("GET", "/api/models", "models"),
    ("POST", f"/api/models/{_ID}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", f"/api/models/{_ID}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", f"/api/models/{_ID}/branch/(?P<revision>[^/]+)", "branch"),
    ("GET", f"/api/models/{_ID}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "tree"),
    ("GET", f"/api/models/{_ID}(/revision/(?P<revision>[^/]+))?", "info"),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})(/(?P<part>[0-9]+))?", "put"),
    ("POST", "/lfs/verify", "verify"),
    ("POST", "/lfs/(?P<oid>[0-9a-f]{64})", "complete"),
    ("GET", f"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class Refused(Exception):
    """An answer that isn't a success."""

    def __init__(self, status: int, message: str, code: str = "", **data: Any) -> None:
        self.status, self.message, self.code, self.data = status, message, code, data


@dataclass(frozen=True)
class File:
    """One file of a commit."""

    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        blob = b"blob %d\0" % len(self.data) + self.data
        return sha256(self.data).hexdigest() if self.lfs else sha1(blob).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        lfs = {"lfs": {"oid": self.oid, "size": len(self.data), "pointerSize": 130}} if self.lfs else {}
        return {"type": "file", "path": path, "size": len(self.data), "oid": self.oid, **lfs}


@dataclass
class Repo:
    """One repository."""

    owner: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)

    def add(self, branch: str, files: dict[str, File], title: str) -> str:
        commit = sha1(f"{len(self.commits)} {title} {sorted(files)}".encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        self.titles.append(title)
        return commit

    def commit_of(self, revision: str) -> str:
        commit = self.branches.get(revision, revision)
        if commit not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def files(self, revision: str = "main") -> dict[str, File]:
        return self.commits[self.commit_of(revision)]


class Hub(ThreadingHTTPServer):
    """The server; a context manager. ``seen`` counts requests by kind; the methods below ask for faults."""

    daemon_threads, block_on_close = True, False

    def __init__(self, *, multipart: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.multipart, self.seen, self.lock = multipart, Counter[str](), threading.Lock()
        self.failing, self.losing, self.cutting = Counter[str](), Counter[str](), Counter[str]()
        self.cut_after = 0
        self.reached = threading.Event()  # set when a connection has been cut, or is about to be held
        self.held: set[str] = set()

    def fail(self, kind: str, times: int) -> None:
        """Answer the next ``times`` requests of a kind with 503."""
        self.failing[kind] = times

    def lose(self, kind: str, times: int = 1) -> None:
        """Do what the next requests of a kind ask, but cut the connection before the answer."""
        self.losing[kind] = times

    def cut(self, kind: str, times: int, after: int) -> None:
        """Cut the next ``times`` uploads (``put``) or downloads (``resolve``) after so many bytes."""
        self.cutting[kind], self.cut_after = times, after

    def takes(self, faults: Counter[str], kind: str) -> bool:
        with self.lock:
            faults[kind] -= 1
            return faults[kind] >= 0

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing about connections that the tests cut."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    server: Hub

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        method = "GET" if self.command == "HEAD" else self.command
        routes = ((kind, re.fullmatch(pattern, url.path)) for verb, pattern, kind in ROUTES if verb == method)
        kind, match = next((found for found in routes if found[1]), ("", None))
        self.kind = kind
        if match is None:
            return self.send(404, {"error": f"no route for {url.path}"}, {"X-Error-Code": "RepoNotFound"})
        self.server.seen[kind] += 1
        given = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
        try:
            if kind in self.server.held:
                self.server.reached.set()
                threading.Event().wait(30)
            self.body = self.read(kind)
            if self.server.takes(self.server.failing, kind):
                raise Refused(503, "try again")
            answer = getattr(self, f"do_{kind}")(**given)
            if self.server.takes(self.server.losing, kind):
                return self.hang_up()
            if answer is not None:
                self.send(200, answer)
        except Refused as error:
            headers = {"X-Error-Message": error.message, **({"X-Error-Code": error.code} if error.code else {})}
            self.send(error.status, {"error": error.message, **error.data}, headers)
        except ConnectionAbortedError:
            self.hang_up()

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def read(self, kind: str) -> bytes:
        length = int(self.headers.get("Content-Length", 0))
        if kind == "put" and self.server.takes(self.server.cutting, kind):
            self.rfile.read(min(self.server.cut_after, length))
            raise ConnectionAbortedError
        return self.rfile.read(length)

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
        self.server.reached.set()

    def send(self, status: int, data: Any, headers: dict[str, str] | None = None) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if len(body) > self.server.cut_after and self.kind_is_cut():  # nobody waits for more of a whole answer
            self.wfile.write(body[: self.server.cut_after])
            return self.hang_up()
        self.wfile.write(body)

    kind = ""

    def kind_is_cut(self) -> bool:
        return self.kind == "resolve" and self.server.takes(self.server.cutting, "resolve")

    def log_message(self, *arguments: Any) -> None:
        """Keep quiet."""

    def user(self) -> tuple[str, bool] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise Refused(401, "Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def repo(self, name: str, *, write: bool = False) -> Repo:
        user, repo = self.user(), self.server.repos.get(name)
        if repo is None or (repo.private and (user is None or user[0] != repo.owner)):
            raise Refused(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if repo.gated and (user is None or user[0] != repo.owner):
            raise Refused(403, f"Access to model {name} is restricted", "GatedRepo")
        if write and user is None:
            raise Refused(401, "Invalid username or password.")
        if write and user != (repo.owner, True):
            raise Refused(403, "you don't have the required permissions")
        return repo

    # accounts and repositories

    def do_whoami(self) -> Any:
        user = self.user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        return {"type": "user", "name": user[0], "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def do_create(self) -> Any:
        asked, user = json.loads(self.body), self.user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        name = f"{asked.get('organization') or user[0]}/{asked['name']}"
        if name.split("/")[0] != user[0] or not user[1]:
            raise Refused(403, f"you don't have the rights to create a model under the namespace {name.split('/')[0]}")
        if name in self.server.repos:
            raise Refused(409, "You already created this model repo", url=f"{self.server.url}/{name}")
        repo = self.server.repos[name] = Repo(user[0], private=asked.get("visibility") == "private")
        repo.add("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", lfs=False)}, "initial commit")
        return {"url": f"{self.server.url}/{name}", "name": name, "id": name}

    def do_validate(self) -> Any:
        content = json.loads(self.body)["content"]
        head = content.split("---\n")[1] if content.startswith("---\n") else "{}"
        try:
            yaml.safe_load(head)
        except yaml.YAMLError as error:
            self.send(400, {"errors": [{"message": str(error)}], "warnings": []})
            return None
        return {"errors": [], "warnings": []}

    def do_models(self) -> Any:
        user = self.user()
        visible = {name: repo for name, repo in self.server.repos.items() if not repo.private or user}
        found = [name for name in visible if name.startswith(self.query.get("author", ""))]
        return [self.do_info(name) for name in found]

    def do_info(self, repo: str, revision: str = "main") -> Any:
        found = self.repo(repo)
        names = [{"rfilename": path} for path in found.files(revision)]
        sha = found.commit_of(revision)
        return {"id": repo, "modelId": repo, "sha": sha, "private": found.private, "siblings": names, "tags": []}

    def do_tree(self, repo: str, revision: str, path: str = "") -> Any:
        files = {name: file for name, file in self.repo(repo).files(revision).items() if name.startswith(path)}
        if path and not files:
            raise Refused(404, f"{path} does not exist", "EntryNotFound")
        return [file.entry(name) for name, file in files.items()]

    def do_branch(self, repo: str, revision: str) -> Any:
        found = self.repo(repo, write=True)
        if revision in found.branches:
            raise Refused(409, "Reference already exists")
        found.branches[revision] = found.commit_of(json.loads(self.body or b"{}").get("startingPoint", "main"))
        return {}

    # uploads

    def do_preupload(self, repo: str, revision: str) -> Any:
        there, answers = self.repo(repo, write="create_pr" not in self.query).files(revision), []
        for file in json.loads(self.body)["files"]:
            lfs = file["path"].endswith(".safetensors") or file["size"] > LFS_BYTES
            known = there.get(file["path"])
            answers.append({"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False})
            answers[-1] |= {"oid": known.oid} if known else {}
        return {"files": answers}

    def do_batch(self, repo: str) -> Any:
        self.repo(repo)  # whoever may read may propose a commit
        objects = []
        for one in json.loads(self.body)["objects"]:
            href, size = f"{self.server.url}/lfs/{one['oid']}", self.server.multipart
            header: dict[str, str] = {}
            if size and one["size"] > size:
                header = {str(part + 1): f"{href}/{part + 1}" for part in range(-(-one["size"] // size))}
                header["chunk_size"] = str(size)
            actions = {"upload": {"href": href, "header": header}, "verify": {"href": f"{self.server.url}/lfs/verify"}}
            objects.append({**one, **({} if one["oid"] in self.server.blobs else {"actions": actions})})
        return {"transfer": "basic", "objects": objects}

    def do_put(self, oid: str, part: str | None = None) -> None:
        if part is None:
            self.keep(oid, self.body)
        else:
            self.server.parts[oid, int(part)] = self.body
        self.send(200, b"", {"ETag": f'"{sha1(self.body).hexdigest()}"'})

    def do_complete(self, oid: str) -> Any:
        parts = [part["partNumber"] for part in json.loads(self.body)["parts"]]
        self.keep(oid, b"".join(self.server.parts[oid, part] for part in parts))
        return {"success": True}

    def keep(self, oid: str, data: bytes) -> None:
        if sha256(data).hexdigest() != oid:
            raise Refused(400, "the content doesn't have that hash")
        self.server.blobs[oid] = data

    def do_verify(self) -> Any:
        asked = json.loads(self.body)
        if len(self.server.blobs.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "no such object")
        return {}

    def do_commit(self, repo: str, revision: str) -> Any:
        proposal = "create_pr" in self.query
        found = self.repo(repo, write=not proposal)
        with self.server.lock:
            lines = [json.loads(line) for line in self.body.splitlines()]
            header, head = lines[0]["value"], found.commit_of(revision)
            if header.get("parentCommit", head) != head:
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            files = dict(found.commits[head])
            for line in lines[1:]:
                self.apply(line["key"], line["value"], files)
            target = f"refs/pr/{len(found.commits)}" if proposal else revision
            commit = found.add(target, files, header["summary"])
        url = f"{self.server.url}/{repo}"
        return {"commitOid": commit, "commitUrl": f"{url}/commit/{commit}", "pullRequestUrl": f"{url}/discussions/1"}

    def apply(self, key: str, value: dict[str, Any], files: dict[str, File]) -> None:
        if key == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
        elif key == "file":
            files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
        elif value["oid"] in self.server.blobs:
            files[value["path"]] = File(self.server.blobs[value["oid"]], lfs=True)
        else:
            raise Refused(400, f"LFS pointer of {value['path']} points to a file that does not exist")

    # downloads

    def do_resolve(self, repo: str, revision: str, path: str) -> None:
        found = self.repo(repo)
        commit = found.commit_of(revision)
        headers = {"X-Repo-Commit": commit}
        file = found.commits[commit].get(path)
        if file is None:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.send(404, b"", headers)
        headers |= {"ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(file.data) - 1}/{len(file.data)}"
        self.send(206 if wanted else 200, file.data[start:], headers)
