"""The part of the Hub's HTTP interface that huggingface_hub, transformers and datasets use, on loopback.

The client is the real one; only the other end stands here. Two host names reach the same port: `127.0.0.1` is the Hub,
`localhost` is the storage behind it, to which large files are redirected and which must never see an access token.
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
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from waiting import HANG


SOURCE = Path(__file__).parents[1] / "src"
LARGE = re.compile(r".*\.(safetensors|png|parquet|bin)")
REPOSITORY = r"(?P<id>[\w.-]+/[\w.-]+)"
KIND = r"(?P<kind>models|datasets)"


@dataclass(frozen=True)
class Blob:
    data: bytes
    large: bool

    @property
    def oid(self) -> str:
        """What the Hub calls a file's content: SHA-256 of a large file, git's SHA-1 of a small one."""
        if self.large:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob]) -> str:
        content = json.dumps([len(self.commits), branch, {name: blob.oid for name, blob in files.items()}])
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha


@dataclass(frozen=True)
class Request:
    method: str
    host: str
    path: str
    token: str | None
    headers: dict[str, str]


class Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", commit: str | None = None):
        self.status, self.code, self.message, self.commit = status, code, message, commit


class Hub:
    """Repositories, users and stored files of a server in a thread; `with Hub() as hub`."""

    def __init__(self) -> None:
        self.tokens = {"hf_" + "w" * 34: "jane", "hf_" + "o" * 34: "other"}
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.drops: dict[str, int] = {}  # SHA-256 -> so many of its next uploads lose their connection in the middle
        self.lock = threading.RLock()
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def storage(self) -> str:
        return f"http://localhost:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def create(
        self, name: str, files: dict[str, bytes] | None = None, kind: str = "models", private=False
    ) -> Repository:
        repository = self.repositories[kind, name] = Repository(private)
        repository.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
        if files:
            repository.commit("main", self.keep(files))
        return repository

    def keep(self, files: dict[str, bytes]) -> dict[str, Blob]:
        """Contents for a commit, as if they had been uploaded."""
        blobs = {path: Blob(data, bool(LARGE.fullmatch(path))) for path, data in files.items()}
        self.stored |= {blob.oid: blob.data for blob in blobs.values() if blob.large}
        return blobs

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        repository = self.repositories["models", name]
        return {path: blob.data for path, blob in repository.commits[repository.branches[branch]].items()}

    def uploads(self) -> list[str]:
        """SHA-256 of every large file that was sent, in order."""
        return [r.path.rpartition("/")[2] for r in self.requests if r.method == "PUT"]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    # (method, path) -> the name of the method that answers.
    ROUTES: ClassVar = [
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_card"),
        ("GET", rf"/api/{KIND}/{REPOSITORY}(/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", rf"/api/{KIND}/{REPOSITORY}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "tree"),
        ("GET", rf"/api/{KIND}/{REPOSITORY}/refs", "refs"),
        ("POST", rf"/api/{KIND}/{REPOSITORY}/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("POST", rf"/api/{KIND}/{REPOSITORY}/branch/(?P<revision>[^/]+)", "branch"),
        ("POST", rf"/api/{KIND}/{REPOSITORY}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"/api/{KIND}/{REPOSITORY}/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", rf"/((?P<kind>datasets)/)?{REPOSITORY}\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})", "store"),
        ("POST", r"/storage/verify", "verify"),
        ("GET", r"/storage/(?P<oid>[0-9a-f]{64})", "stored"),
        ("GET", rf"/((?P<kind>datasets)/)?{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ]

    def answer(self) -> None:
        parts = urlsplit(self.path)
        self.read: bytes | None = None
        self.query = parse_qs(parts.query)
        bearer = self.headers.get("Authorization")
        token = bearer.removeprefix("Bearer ") if bearer else None
        host = self.headers["Host"].partition(":")[0]
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, host, parts.path, token, dict(self.headers)))
        self.user = self.hub.tokens.get(token or "")
        method = "GET" if self.command == "HEAD" else self.command
        try:
            if token is not None and self.user is None:
                self.body()
                raise Refused(401, message="Invalid credentials in Authorization header")
            for verb, pattern, name in self.ROUTES:
                if verb == method and (match := re.fullmatch(pattern, parts.path)):
                    fields = {key: unquote(value) if value else None for key, value in match.groupdict().items()}
                    getattr(self, name)(**fields)
                    return
            self.body()
            raise Refused(404, message=f"no such route: {self.command} {self.path}")
        except Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            headers |= {"X-Repo-Commit": refused.commit} if refused.commit else {}
            self.send(json.dumps({"error": refused.message}).encode(), refused.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def log_message(self, *_) -> None:
        """Nothing on stderr."""

    def body(self) -> bytes:
        """What the request carries; a connection can be used again only when it has been read."""
        if self.read is None:
            self.read = self.receive()
        return self.read

    def receive(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_json(self, content) -> None:
        self.send(json.dumps(content).encode(), headers={"Content-Type": "application/json"})

    def repository(self, kind: str | None, name: str, write: bool = False) -> Repository:
        """The repository, if this user may see it (and change it)."""
        found = self.hub.repositories.get((kind or "models", name))
        owner = name.partition("/")[0]
        if found is None or (found.private and self.user != owner):
            self.body()
            # The Hub does not tell a stranger whether a name exists.
            raise Refused(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if write and self.user != owner:
            self.body()
            raise Refused(403 if self.user else 401, message="You have no write access to this repository")
        return found

    def revision(self, repository: Repository, revision: str | None) -> str:
        sha = repository.branches.get(revision or "main", revision or "main")
        if sha not in repository.commits:
            self.body()
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def whoami(self) -> None:
        if self.user is None:
            raise Refused(401, message="Invalid username or password.")
        self.send_json({"type": "user", "name": self.user, "fullname": self.user, "orgs": [], "auth": {}})

    def create(self) -> None:
        asked = json.loads(self.body())
        if self.user is None:
            raise Refused(401, message="Invalid username or password.")
        owner = asked.get("organization") or self.user
        name, kind = f"{owner}/{asked['name']}", asked.get("type", "model") + "s"
        if owner != self.user:
            raise Refused(403, message=f'You don\'t have the rights to create a model under the namespace "{owner}"')
        url = f"{self.hub.endpoint}/{name}"
        if (kind, name) in self.hub.repositories:
            content = {"error": "You already created this model repo", "url": url}
            self.send(json.dumps(content).encode(), 409)
            return
        self.hub.create(name, kind=kind, private=asked.get("visibility") == "private")
        self.send_json({"url": url, "name": name, "id": name})

    def validate_card(self) -> None:
        match = re.match(r"---\n(.*?)\n---", json.loads(self.body())["content"], re.DOTALL)
        data = yaml.safe_load(match[1]) if match else {}
        errors = []
        if not isinstance(data.get("license", "mit"), str) or data.get("license") == "none-such":
            errors.append({"message": '"license" must be one of [apache-2.0, mit, ...]'})
        self.send(json.dumps({"errors": errors, "warnings": []}).encode(), 400 if errors else 200)

    def info(self, kind: str, id: str, revision: str | None) -> None:
        repository = self.repository(kind, id)
        sha = self.revision(repository, revision)
        siblings = [{"rfilename": path} for path in repository.commits[sha]]
        self.send_json({"id": id, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []})

    def refs(self, kind: str, id: str) -> None:
        branches = self.repository(kind, id).branches.items()
        listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches]
        self.send_json({"branches": listed, "converts": [], "tags": []})

    @staticmethod
    def entry(path: str, blob: Blob) -> dict:
        git = hashlib.sha1(blob.data).hexdigest() if blob.large else blob.oid
        entry = {"type": "file", "path": path, "size": len(blob.data), "oid": git}
        large = {"oid": blob.oid, "size": len(blob.data), "pointerSize": 134}
        return entry | ({"lfs": large} if blob.large else {})

    def tree(self, kind: str, id: str, revision: str, path: str | None) -> None:
        repository = self.repository(kind, id)
        sha = self.revision(repository, revision)
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        prefix = f"{path}/" if path else ""
        entries, folders = [], {}
        for name, blob in repository.commits[sha].items():
            if name.startswith(prefix):
                parents = name[len(prefix) :].split("/")[:-1]
                for depth in range(1, len(parents) + 1) if recursive else range(1, 1 + bool(parents)):
                    folders[prefix + "/".join(parents[:depth])] = sha
                if recursive or not parents:
                    entries.append(self.entry(name, blob))
        if path and not entries and not folders:
            raise Refused(404, "EntryNotFound", f"{path} does not exist", sha)
        self.send_json([{"type": "directory", "path": p, "size": 0, "oid": o} for p, o in folders.items()] + entries)

    def paths_info(self, kind: str, id: str, revision: str) -> None:
        repository = self.repository(kind, id)
        sha = self.revision(repository, revision)
        asked = self.body()
        is_json = self.headers.get("Content-Type", "").startswith("application/json")
        paths = json.loads(asked)["paths"] if is_json else parse_qs(asked.decode())["paths"]
        files = repository.commits[sha]
        found = [self.entry(path, files[path]) for path in paths if path in files]
        inner = [path for path in paths if any(name.startswith(f"{path}/") for name in files)]
        self.send_json([*found, *({"type": "directory", "path": p, "size": 0, "oid": sha} for p in inner)])

    def branch(self, kind: str, id: str, revision: str) -> None:
        repository = self.repository(kind, id, write=True)
        start = json.loads(self.body() or b"{}").get("startingPoint")
        if revision in repository.branches:
            raise Refused(409, message=f"Reference already exists: {revision}")
        repository.branches[revision] = self.revision(repository, start)
        self.send_json({})

    def preupload(self, kind: str, id: str, revision: str) -> None:
        repository = self.repository(kind, id, write=True)
        there = repository.commits[self.revision(repository, revision)]
        answers = []
        for file in json.loads(self.body())["files"]:
            mode = "lfs" if LARGE.fullmatch(file["path"]) or file["size"] > 10_000_000 else "regular"
            answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            answers.append(answer | ({"oid": there[file["path"]].oid} if file["path"] in there else {}))
        self.send_json({"files": answers, "commitOid": repository.branches[revision]})

    def batch(self, kind: str | None, id: str) -> None:
        self.repository(kind, id, write=True)
        objects = []
        for asked in json.loads(self.body())["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.storage}/storage/{asked['oid']}"},
                "verify": {"href": f"{self.hub.endpoint}/storage/verify"},
            }
            objects.append(asked | ({} if asked["oid"] in self.hub.stored else {"actions": actions}))
        self.send_json({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if self.hub.drops.get(oid):
            self.hub.drops[oid] -= 1
            self.rfile.read(100)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        data = self.body()
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refused(400, message="the content is not what its name says")
        self.hub.stored[oid] = data
        self.send(b"")

    def verify(self) -> None:
        asked = json.loads(self.body())
        if len(self.hub.stored.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, message="no such object")
        self.send_json({})

    def commit(self, kind: str, id: str, revision: str) -> None:
        repository = self.repository(kind, id, write=True)
        files = dict(repository.commits[self.revision(repository, revision)])
        for line in self.body().splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.stored:
                    raise Refused(400, message=f"{value['path']}: its content was not uploaded")
                files[value["path"]] = Blob(self.hub.stored[value["oid"]], True)
            elif key == "deletedFile":
                del files[value["path"]]
        with self.hub.lock:
            sha = repository.commit(revision, files)
        url = f"{self.hub.endpoint}/{id}/commit/{sha}"
        self.send_json({"success": True, "commitOid": sha, "commitUrl": url, "pullRequestUrl": None, "hookOutput": ""})

    def resolve(self, kind: str | None, id: str, revision: str, path: str) -> None:
        repository = self.repository(kind, id)
        sha = self.revision(repository, revision)
        blob = repository.commits[sha].get(path)
        if blob is None:
            raise Refused(404, "EntryNotFound", f"{path} does not exist", sha)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        if not blob.large:
            self.send_range(blob.data, headers)
            return
        headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.data))}
        self.send(b"", 302, headers | {"Location": f"{self.hub.storage}/storage/{blob.oid}"})

    def stored(self, oid: str) -> None:
        self.send_range(self.hub.stored[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def send_range(self, data: bytes, headers: dict[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            self.send(data, 200, headers)
            return
        first, last = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
        if first > last:
            self.send(b"", 416, {"Content-Range": f"bytes */{len(data)}"})
            return
        self.send(data[first : last + 1], 206, headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"})


def run_python(code: str, *arguments: str, hub: Hub, home: Path, package: bool, **environment: str):
    """Python in a process of its own, with caches in `home` and, if `package`, this package on its path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "HUGGING"))}
    kept |= {"HF_HOME": str(home), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    kept |= {"HF_HUB_DISABLE_TELEMETRY": "1", **environment} | ({"PYTHONPATH": str(SOURCE)} if package else {})
    command = [sys.executable, *([] if package else ["-I"]), "-c", code, *arguments]
    home.mkdir(exist_ok=True)
    return subprocess.run(command, cwd=home, env=kept, capture_output=True, text=True, timeout=HANG, check=False)
