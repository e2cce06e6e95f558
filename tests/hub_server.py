"""A small Hub on this machine: the endpoints that `huggingface_hub` calls, with repos in memory."""

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


USER, TOKEN = "user", "hf_token_of_the_user"
NAMESPACES = (USER, "organisation")  # that the user may write to

REPO, REVISION = r"(?P<kind>models|datasets)/(?P<name>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
REPO_PAGE = r"((?P<kind>datasets)/)?(?P<name>[\w.-]+/[\w.-]+)"
ROUTES = {
    "whoami": "GET /api/whoami-v2",
    "create": "POST /api/repos/create",
    "validate_yaml": "POST /api/validate-yaml",
    "info": f"GET /api/{REPO}(/revision/{REVISION})?",
    "tree": f"GET /api/{REPO}/tree/{REVISION}(/(?P<path>.+))?",
    "preupload": f"POST /api/{REPO}/preupload/{REVISION}",
    "commit": f"POST /api/{REPO}/commit/{REVISION}",
    "lfs_batch": f"POST /{REPO_PAGE}.git/info/lfs/objects/batch",
    "lfs_upload": r"PUT /lfs/(?P<oid>\w{64})",
    "lfs_verify": "POST /lfs/verify",
    "resolve": f"(GET|HEAD) /{REPO_PAGE}/resolve/{REVISION}/(?P<path>.+)",
}


class Refusal(Exception):
    """An answer that says no. The client knows some reasons by their code."""

    def __init__(self, status: int, reason: str, code: str | None = None, **body: Any):
        self.status, self.body = status, {"error": reason, **body}
        self.headers = {"X-Error-Message": reason, **({"X-Error-Code": code} if code else {})}


@dataclass
class File:
    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, File]


@dataclass
class Repo:
    """Commits, the oldest first; the only branch is `main`."""

    private: bool
    commits: list[Commit] = field(default_factory=list)

    def add(self, message: str, files: dict[str, File]) -> Commit:
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append(Commit(oid, message, files))
        return self.commits[-1]

    def at(self, revision: str | None) -> Commit:
        for commit in reversed(self.commits):
            if revision in (None, "main", commit.oid):
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    @property
    def files(self) -> dict[str, bytes]:
        """What is on `main`."""
        return {path: file.data for path, file in self.commits[-1].files.items()}


@dataclass
class Outage:
    path: str
    after: int
    times: float
    status: int | None


class Hub:
    """What the server knows. A test reads the repos, and breaks the network with `fail`."""

    def __init__(self, url: str):
        self.url = url
        self.models: dict[str, Repo] = {}
        self.datasets: dict[str, Repo] = {}
        self.slow: dict[str, float] = {}  # seconds that requests with this in their path wait
        self._objects: dict[str, bytes] = {}  # of LFS, by their checksum
        self._outages: list[Outage] = []

    def fail(self, path: str = "", after: int = 0, times: float = float("inf"), status: int | None = None) -> None:
        """
        Of the requests with `path` in theirs, serve the first `after` and fail the next `times`: with a status, or
        (`None`) by dropping the connection.
        """
        self._outages.append(Outage(path, after, times, status))

    def failure(self, path: str) -> Outage | None:
        """The outage that a request meets."""
        for outage in self._outages:
            if outage.path in path:
                outage.after -= 1
                if -outage.times <= outage.after < 0:
                    return outage
        return None

    def answer(self, method: str, path: str, authorization: str | None, body: bytes) -> Any:
        """What a request gets: something for JSON, or bytes and headers."""
        if authorization not in (None, f"Bearer {TOKEN}"):
            raise Refusal(401, "Invalid credentials in Authorization header")
        user = USER if authorization else None
        matches = ((endpoint, re.fullmatch(route, f"{method} {path}")) for endpoint, route in ROUTES.items())
        endpoint, found = next((match for match in matches if match[1]), (None, None))
        if found is None:
            raise Refusal(404, f"There is no {path} here.")
        given = {key: value and unquote(value) for key, value in found.groupdict().items()}
        if "name" in given:
            repo = getattr(self, given.pop("kind") or "models").get(given["name"])
            if repo is None or (repo.private and not user):
                raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
            if method == "POST":
                self._check_may_write(user, given["name"])
            given["repo"] = repo
        return getattr(self, f"_{endpoint}")(user=user, body=body, **given)

    def _check_may_write(self, user: str | None, name: str) -> None:
        if not user:
            raise Refusal(401, "Invalid username or password.")
        if name.split("/")[0] not in NAMESPACES:
            raise Refusal(403, f"You don't have the rights to write to {name}.")

    def _whoami(self, user: str | None, **_: Any) -> Any:
        if not user:
            raise Refusal(401, "Invalid username or password.")
        return {"type": "user", "name": user, "orgs": [{"name": name} for name in NAMESPACES[1:]]}

    def _create(self, user: str | None, body: bytes, **_: Any) -> Any:
        wanted = json.loads(body)
        kind, name = f"{wanted.get('type') or 'model'}s", f"{wanted['organization'] or user}/{wanted['name']}"
        self._check_may_write(user, name)
        url = f"{self.url}/{name}" if kind == "models" else f"{self.url}/{kind}/{name}"
        if name in getattr(self, kind):
            raise Refusal(409, f"You already created this repo: {name}", url=url)
        repo = getattr(self, kind)[name] = Repo(wanted.get("visibility") == "private")
        repo.add("initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n", lfs=False)})
        return {"url": url}

    def _validate_yaml(self, body: bytes, **_: Any) -> Any:
        header = re.match(r"---\n(.*?)\n---", json.loads(body)["content"], re.DOTALL)
        try:
            known = yaml.safe_load(header[1]) if header else None
        except yaml.YAMLError as error:
            raise Refusal(400, "Invalid metadata", errors=[{"message": str(error)}]) from error
        return {"errors": [], "warnings": [] if known else [{"message": "empty or missing yaml metadata"}]}

    def _info(self, repo: Repo, name: str, revision: str | None, **_: Any) -> Any:
        commit = repo.at(revision)
        siblings = [{"rfilename": path} for path in commit.files]
        return {"id": name, "sha": commit.oid, "private": repo.private, "tags": [], "siblings": siblings}

    def _tree(self, repo: Repo, revision: str, path: str | None, **_: Any) -> Any:
        entries = []
        for name, file in repo.at(revision).files.items():
            if path is None or name.startswith(f"{path}/"):
                entry = {"type": "file", "path": name, "oid": file.oid, "size": len(file.data)}
                lfs = {"lfs": {"oid": file.oid, "size": len(file.data), "pointerSize": 127}} if file.lfs else {}
                entries.append({**entry, **lfs})
        if not entries:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        return entries

    def _preupload(self, repo: Repo, revision: str, body: bytes, **_: Any) -> Any:
        known, files = repo.at(revision).files, []
        for file in json.loads(body)["files"]:
            path, binary = file["path"], b"\0" in base64.b64decode(file["sample"])
            mode = "lfs" if binary or file["size"] > 10 * 2**20 else "regular"
            oid = {"oid": known[path].oid} if path in known else {}
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
        return {"files": files}

    def _lfs_batch(self, body: bytes, **_: Any) -> Any:
        objects = json.loads(body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self._objects:
                upload, verify = f"{self.url}/lfs/{wanted['oid']}", f"{self.url}/lfs/verify"
                wanted["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        return {"transfer": "basic", "objects": objects}

    def _lfs_upload(self, oid: str, body: bytes, **_: Any) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "These are not the bytes that were announced.")
        self._objects[oid] = body
        return {}

    def _lfs_verify(self, body: bytes, **_: Any) -> Any:
        announced = json.loads(body)
        return {"size": len(self._uploaded(announced["oid"], announced["size"]))}

    def _uploaded(self, oid: str, size: int) -> bytes:
        if len(self._objects.get(oid, b"")) != size:
            raise Refusal(400, "A file was not uploaded as announced.")
        return self._objects[oid]

    def _commit(self, repo: Repo, revision: str, name: str, body: bytes, **_: Any) -> Any:
        header, *operations = map(json.loads, body.splitlines())
        files = dict(repo.at(revision).files)
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            if kind == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif kind == "lfsFile":
                files[value["path"]] = File(self._uploaded(value["oid"], value["size"]), lfs=True)
            else:
                raise Refusal(400, f"{kind} is not known here.")
        oid = repo.add(header["value"]["summary"], files).oid
        return {"commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"}

    def _resolve(self, repo: Repo, revision: str, path: str, **_: Any) -> tuple[bytes, dict[str, str]]:
        commit = repo.at(revision)
        if path not in commit.files:
            refusal = Refusal(404, "Entry not found", "EntryNotFound")
            refusal.headers["X-Repo-Commit"] = commit.oid
            raise refusal
        file = commit.files[path]
        return file.data, {"X-Repo-Commit": commit.oid, "ETag": f'"{file.oid}"'}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave together
    hub: Hub
    lock: threading.Lock

    def answer(self) -> None:
        body, path = self.rfile.read(int(self.headers["Content-Length"] or 0)), urlsplit(self.path).path
        time.sleep(sum(seconds for part, seconds in self.hub.slow.items() if part in path))
        with self.lock:
            failure = self.hub.failure(path)
            status, headers = 200, {}
            try:
                if failure and failure.status:
                    raise Refusal(failure.status, "The Hub is down.")
                if failure:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                answer = self.hub.answer(self.command, path, self.headers["Authorization"], body)
            except Refusal as refusal:
                status, headers, answer = refusal.status, refusal.headers, refusal.body
        data, more = answer if isinstance(answer, tuple) else (json.dumps(answer).encode(), {})
        self.send_response(status)
        for key, value in {**headers, **more, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serve() -> Iterator[Hub]:
    """A Hub on a free port, while the block runs."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub = Hub(f"http://127.0.0.1:{server.server_port}")
        server.RequestHandlerClass = type("HubHandler", (Handler,), {"hub": hub, "lock": threading.Lock()})
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield hub
        server.shutdown()
