"""A small Hugging Face Hub on the loopback interface: the real client pushes to it and pulls from it over real HTTP.

    with HubServer() as hub:
        api = HfApi(endpoint=hub.url, token=hub.token)  # or `use_in_process`, or a subprocess with `hub.environ(tmp)`
        api.create_repo("user/model")
        api.upload_folder(repo_id="user/model", folder_path=folder)
        assert hub.repos["user/model"].revisions["main"]["config.json"] == b"{}"

It knows model repositories of the namespaces `user` and `org`, Git LFS, branches, pull requests, and downloads;
it does not know Xet, datasets, spaces, tags, and pages of long listings. Answers, statuses, and error headers follow
huggingface.co, because the client chooses its exceptions by them. To make a request fail, see `fail` and `drop`.
"""

import base64
import hashlib
import json
import os
import re
import secrets
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".png", ".jpg", ".gguf", ".npz", ".parquet")
LFS_SIZE = 10 * 2**20  # larger files go to LFS whatever they are called
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
INVALID_TOKEN = "Invalid credentials in Authorization header"  # the client tells a bad token by these very words
FIELDS = {"id": "[^/]+/[^/]+", "rev": "[^/]+", "path": ".+", "oid": "[0-9a-f]{64}"}
ROUTES = []  # (method, pattern of the quoted path, function)


def route(method: str, path: str):
    pattern = re.compile(re.sub(r"{(\w+)}", lambda match: f"(?P<{match[1]}>{FIELDS[match[1]]})", path))
    return lambda function: ROUTES.append((method, pattern, function)) or function


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class HubError(Exception):
    """An error answer; `code` is the X-Error-Code by which the client names the exception."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None, **body):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


@dataclass
class Commit:
    oid: str
    revision: str
    message: str
    paths: list[str]  # added, changed, and deleted


@dataclass
class _Fault:
    method: str
    pattern: str
    times: float
    status: int | None  # None: the connection is lost, `message` says when
    message: str


class Repository:
    """`commits` has what clients committed; before them is one with `.gitattributes`, as on the Hub."""

    def __init__(self, private: bool):
        self.private = private
        self.commits: list[Commit] = []
        self.heads: dict[str, str] = {}  # revision -> commit
        self.snapshots: dict[str, dict[str, bytes]] = {}  # commit -> files
        self.lfs: dict[str, bytes] = {}  # sha256 -> object; a file is LFS if its content is here
        self.advance("main", {".gitattributes": ATTRIBUTES})

    @property
    def revisions(self) -> dict[str, dict[str, bytes]]:
        """The files of each branch and pull request."""
        return {name: self.snapshots[oid] for name, oid in self.heads.items()}

    def advance(self, revision: str, files: dict[str, bytes]) -> str:
        oid = secrets.token_hex(20)
        self.heads[revision], self.snapshots[oid] = oid, files
        return oid

    def resolve(self, revision: str) -> str:
        """The commit that a branch, a pull request, or a commit names."""
        oid = self.heads.get(revision, revision)
        if oid not in self.snapshots:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    def describe(self, data: bytes) -> dict:
        entry = {"oid": git_oid(data), "size": len(data)}
        if sha256(data) in self.lfs:
            entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
        return entry


class HubServer:
    """Serves while the `with` block runs. One user, `user`, who writes with `token` to `user` and `org`."""

    def __init__(self):
        self.token = "hf_valid"
        self.namespaces = ["user", "org"]
        self.repos: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []  # (method, unquoted path without the query), failed ones too
        self._faults: list[_Fault] = []
        self._lock = threading.RLock()

    def __enter__(self) -> "HubServer":
        self._http = _Server(("127.0.0.1", 0), _Handler)
        self._http.hub = self
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()
        self._http.close_connections()

    def fail(self, method: str, path_pattern: str, status: int = 503, times: float = 1, message: str = "injected"):
        """Answer the next `times` requests whose unquoted path matches (`re.search`) with `status`.

        The client sends preupload and LFS requests up to six times after 408, 429, 500, 502, 503, 504, and a lost
        connection, and waits 23 seconds in all. To see those fail, `times=6` with `use_in_process`, or another status.
        """
        self._faults.append(_Fault(method, path_pattern, times, status, message))

    def drop(self, method: str, path_pattern: str, times: float = 1, after: bool = False):
        """Close the connection of the next `times` matching requests unanswered, half way through their body.

        `after`: when they have been carried out, so that only the answer is lost.
        """
        self._faults.append(_Fault(method, path_pattern, times, None, "after" if after else "before"))

    def environ(self, home: str | Path) -> dict[str, str]:
        """The environment for a subprocess: it works online with this server and caches under `home`."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING_FACE_"))}
        settings = {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
        return {**kept, **settings, **quiet}

    # What one request needs before its route

    def fault(self, method: str, path: str) -> "_Fault | None":
        for fault in self._faults:
            if fault.times > 0 and fault.method == method and re.search(fault.pattern, path):
                fault.times -= 1
                return fault
        return None

    def authenticate(self, request) -> bool:
        """Whether the request came with a token, which must then be the valid one."""
        header = request.headers.get("Authorization")
        if header is not None and header != f"Bearer {self.token}":
            raise HubError(401, INVALID_TOKEN)
        return header is not None

    def repository(self, request, repo_id: str, write: bool = False) -> Repository:
        known, repo = self.authenticate(request), self.repos.get(repo_id)
        if repo is None or (repo.private and not known):  # the Hub does not tell strangers what exists
            raise HubError(404 if known else 401, "Repository not found", "RepoNotFound")
        if write:
            self.check_namespace(known, repo_id)
        return repo

    def check_namespace(self, known: bool, repo_id: str) -> None:
        if not known:
            raise HubError(401, "Invalid username or password.")
        if repo_id.split("/")[0] not in self.namespaces:
            raise HubError(403, f"You don't have the rights to write to the model {repo_id}")

    # Routes: each returns what becomes JSON, or (status, headers, bytes)

    @route("GET", "/api/whoami-v2")
    def whoami(self, request):
        if not self.authenticate(request):
            raise HubError(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": name} for name in self.namespaces[1:]]
        auth = {"type": "access_token", "accessToken": {"displayName": "tests", "role": "write"}}
        return {"type": "user", "name": self.namespaces[0], "fullname": "A User", "orgs": orgs, "auth": auth}

    @route("POST", "/api/repos/create")
    def create(self, request):
        sent = request.json()
        repo_id = f"{sent.get('organization') or self.namespaces[0]}/{sent['name']}"
        self.check_namespace(self.authenticate(request), repo_id)
        if sent.get("type", "model") != "model":
            raise HubError(400, "This server has models only")
        url = f"{self.url}/{repo_id}"
        if repo_id in self.repos:
            raise HubError(409, "You already created this model repo", url=url)
        self.repos[repo_id] = Repository(sent.get("visibility") == "private" or bool(sent.get("private")))
        return {"url": url, "name": repo_id}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, request):
        empty = not request.json()["content"].startswith("---")
        warnings = [{"message": "empty or missing yaml metadata in repo card"}] if empty else []
        return {"errors": [], "warnings": warnings}

    @route("POST", "/api/models/{id}/branch/{rev}")
    def branch(self, request, id, rev):
        repo = self.repository(request, id, write=True)
        if rev in repo.heads:
            raise HubError(409, f"Reference already exists: refs/heads/{rev}")
        repo.heads[rev] = repo.resolve(request.json().get("startingPoint", "main"))
        return {}

    @route("POST", "/api/models/{id}/preupload/{rev}")
    def preupload(self, request, id, rev):
        repo, answers = self.repository(request, id, write=True), []
        present = repo.snapshots[repo.resolve(rev)]
        for file in request.json()["files"]:
            path, binary = file["path"], b"\0" in base64.b64decode(file["sample"])
            lfs = path.endswith(LFS_SUFFIXES) or file["size"] > LFS_SIZE or binary
            answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if path in present:  # the client leaves out what it has the same
                answer["oid"] = sha256(present[path]) if sha256(present[path]) in repo.lfs else git_oid(present[path])
            answers.append(answer)
        return {"files": answers}

    @route("POST", "/{id}.git/info/lfs/objects/batch")
    def lfs_batch(self, request, id):
        repo, objects = self.repository(request, id, write=True), []
        for wanted in request.json()["objects"]:
            upload = {"href": f"{self.url}/lfs-storage/{id}/{wanted['oid']}"}
            verify = {"href": f"{self.url}/{id}.git/info/lfs/objects/verify"}
            missing = {} if wanted["oid"] in repo.lfs else {"actions": {"upload": upload, "verify": verify}}
            objects.append({**wanted, **missing})
        return {"transfer": "basic", "objects": objects}

    @route("PUT", "/lfs-storage/{id}/{oid}")
    def lfs_put(self, request, id, oid):
        if sha256(request.body) != oid:  # no token here: on the Hub this is a signed address of the storage
            raise HubError(400, "The content does not have the announced sha256")
        self.repos[id].lfs[oid] = request.body
        return 200, {}, b""

    @route("POST", "/{id}.git/info/lfs/objects/verify")
    def lfs_verify(self, request, id):
        sent, stored = request.json(), self.repository(request, id, write=True).lfs
        if len(stored.get(sent["oid"], b"")) != sent["size"]:
            raise HubError(404, "No such object")
        return {}

    @route("POST", "/api/models/{id}/commit/{rev}")
    def commit(self, request, id, rev):
        repo = self.repository(request, id, write=True)
        parent = repo.resolve(rev)
        files, paths, header = dict(repo.snapshots[parent]), [], {}
        for line in request.body.splitlines():
            key, value = (part := json.loads(line))["key"], part["value"]
            if key == "header":
                header = value
                if header.get("parentCommit", parent) != parent:
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
                continue
            path = value["path"]
            if key == "file":
                files[path] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in repo.lfs:
                    raise HubError(400, f"LFS pointer of {path} points to an object that was not uploaded")
                files[path] = repo.lfs[value["oid"]]
            else:  # deletedFile, deletedFolder
                gone = [name for name in files if name == path or name.startswith(path.rstrip("/") + "/")]
                if not gone:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                for name in gone:
                    del files[name]
            paths.append(path)
        answer = {"success": True}
        if "create_pr" in request.query:
            number = 1 + sum(name.startswith("refs/pr/") for name in repo.heads)
            rev, answer["pullRequestUrl"] = f"refs/pr/{number}", f"{self.url}/{id}/discussions/{number}"
        oid = repo.advance(rev, files)
        repo.commits.append(Commit(oid, rev, header["summary"], paths))
        return {**answer, "commitOid": oid, "commitUrl": f"{self.url}/{id}/commit/{oid}"}

    @route("GET", "/api/models/{id}")
    @route("GET", "/api/models/{id}/revision/{rev}")
    def info(self, request, id, rev="main"):
        repo = self.repository(request, id)
        oid, siblings = repo.resolve(rev), []
        for path, data in repo.snapshots[oid].items():
            entry = repo.describe(data)
            lfs = {"lfs": {**entry["lfs"], "sha256": entry["lfs"]["oid"]}} if "lfs" in entry else {}
            blobs = {"size": entry["size"], "blobId": entry["oid"], **lfs} if "blobs" in request.query else {}
            siblings.append({"rfilename": path, **blobs})
        about = {"id": id, "modelId": id, "author": id.split("/")[0], "private": repo.private, "gated": False}
        front = re.match(rb"---\n(.*?)\n---\n", repo.snapshots[oid].get("README.md", b""), re.DOTALL)
        card = {"cardData": yaml.safe_load(front[1])} if front else {}
        return {**about, **card, "sha": oid, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}

    @route("GET", "/api/models/{id}/tree/{rev}")
    @route("GET", "/api/models/{id}/tree/{rev}/{path}")
    def tree(self, request, id, rev, path=""):
        repo = self.repository(request, id)
        prefix, entries = path and path + "/", {}
        for name, data in repo.snapshots[repo.resolve(rev)].items():
            if name.startswith(prefix):
                parts = name[len(prefix) :].split("/")
                for depth in range(1, len(parts)):
                    folder = prefix + "/".join(parts[:depth])
                    entries[folder] = {"type": "directory", "path": folder, "oid": git_oid(folder.encode()), "size": 0}
                entries[name] = {"type": "file", "path": name, **repo.describe(data)}
        if path and not entries:
            raise HubError(404, f"{path} does not exist on {rev}", "EntryNotFound")
        deep = request.query.get("recursive") == ["true"]
        return [entry for name, entry in entries.items() if deep or "/" not in name[len(prefix) :]]

    @route("GET", "/{id}/resolve/{rev}/{path}")
    def download(self, request, id, rev, path):
        repo = self.repository(request, id)
        headers = {"X-Repo-Commit": (oid := repo.resolve(rev)), "Accept-Ranges": "bytes"}
        if (data := repo.snapshots[oid].get(path)) is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        entry = repo.describe(data)
        headers["ETag"] = f'"{entry["oid"]}"'
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(len(data))}
        if not (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))):
            return 200, headers, data
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        if first > last:
            raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(data)}"})
        return 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"}, data[first : last + 1]


class _Server(ThreadingHTTPServer):
    def __init__(self, *args):
        super().__init__(*args)
        self.connections = set()

    def close_connections(self) -> None:
        """Or a client that keeps its connections would go on talking to a server that is gone."""
        for connection in list(self.connections):
            try:
                connection.shutdown(2)
            except OSError:
                pass  # closed already

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # a client that hangs up is no news
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open, as the client's pool expects
    disable_nagle_algorithm = True  # or each answer waits 40 ms

    def setup(self):
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self):
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, *args):
        pass

    def json(self) -> dict:
        return json.loads(self.body)

    def answer(self):
        hub, address, length = self.server.hub, urlsplit(self.path), int(self.headers.get("Content-Length", 0))
        path, self.query = unquote(address.path), parse_qs(address.query)
        with hub._lock:
            hub.requests.append((self.command, path))
            fault = hub.fault(self.command, path)
        lost = fault and fault.status is None and fault.message
        self.close_connection = bool(lost) or self.close_connection
        if lost == "before":
            self.rfile.read(length // 2)
            return
        self.body = self.rfile.read(length)  # in any case: what is left would be read as the next request
        try:
            if fault and not lost:
                raise HubError(fault.status, INVALID_TOKEN if fault.status == 401 else fault.message)
            with hub._lock:
                reply = self.dispatch(hub, address.path)
            status, headers, body = reply if isinstance(reply, tuple) else (200, {}, reply)
        except HubError as error:
            status, headers, body = error.status, error.headers, error.body
        except Exception as error:  # a bug of this server, with a status that the client does not try again
            status, headers, body = 501, {"X-Error-Message": f"hub_server: {error!r}"}, b""
        if lost:
            return
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def dispatch(self, hub: HubServer, path: str):
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, function in ROUTES:
            if wanted == method and (match := pattern.fullmatch(path)):
                return function(hub, self, **{name: unquote(value) for name, value in match.groupdict().items()})
        raise HubError(404, f"hub_server has no {method} {path}")


def use_in_process(monkeypatch, hub: HubServer, cache: str | Path) -> None:
    """Point this process's huggingface_hub at `hub`: online, without Xet, and without waiting before it tries again.

    Its settings were read when it was imported, so it is the settings that change, not the environment.
    """
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _http, close_session

    close_session()  # the connections of another test's server
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    settings = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(cache)}
    for name, value in {**settings, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)  # behind huggingface_hub.create_repo and the like
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None))
