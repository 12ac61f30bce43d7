"""
A Hub on this machine: the part of the Hub's HTTP interface that huggingface_hub's client calls to publish a model and
to load it again. Repositories live in memory.

The server decides as the Hub does: who may write, what is a large file, whether a card's metadata is valid, whether
an upload named in a commit has arrived. What a test wants to go wrong is put into `failures`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results


USER, TOKEN, READ_TOKEN = "tester", "hf_loopback_write", "hf_loopback_read"
LARGE = (".safetensors", ".bin", ".pt", ".pth")  # as a new repository's .gitattributes says
FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


@dataclass
class Repo:
    """A repository: what each commit holds, and where each branch stands."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    log: list[tuple[str, str]] = field(default_factory=list)  # branch and message

    def __post_init__(self) -> None:
        self.commit("main", {".gitattributes": b""}, "initial commit")

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)}{branch}{message}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.log.append((branch, message))
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes] | None:
        return self.commits.get(self.branches.get(revision, revision))


@dataclass
class Failure:
    """Answers the next requests that match with a status instead of doing what they ask."""

    method: str
    path: str  # a regular expression
    status: int
    times: int = 100


class HubServer(ThreadingHTTPServer):
    """The server; see the module."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.RLock()
        self.clear()

    def clear(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # large files by their sha256
        self.failures: list[Failure] = []
        self.requests: list[tuple[str, str]] = []
        self.xet_folder: Path | None = None  # where hf_xet is to keep large files, instead of `objects`

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def count(self, method: str, path: str) -> int:
        """How many requests there were of a method to paths that match."""
        return sum(m == method and re.search(path, p) is not None for m, p in self.requests)

    def handle_error(self, *args: Any) -> None:
        """A client that gave up is no news."""


@contextmanager
def running_hub() -> Iterator[HubServer]:
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        self.status, self.message, self.code = status, message, code


NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", rf"/api/models/{NAME}/preupload/{REVISION}", "preupload"),
    ("POST", rf"/api/models/{NAME}/commit/{REVISION}", "commit"),
    ("POST", rf"/api/models/{NAME}/branch/{REVISION}", "branch"),
    ("GET", rf"/api/models/{NAME}", "info"),
    ("GET", rf"/api/models/{NAME}/revision/{REVISION}", "info"),
    ("GET", rf"/api/models/{NAME}/tree/{REVISION}(?:/(?P<path>.+))?", "tree"),
    ("GET", rf"/api/models/{NAME}/xet-(?:read|write)-token/{REVISION}", "xet_token"),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/large-files/(?P<oid>[0-9a-f]{64})", "put_large"),
    ("POST", r"/large-files/verify", "verify_large"),
    ("GET", rf"/{NAME}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
    ("HEAD", rf"/{NAME}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
]


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        with self.server.lock:
            self.server.requests.append((self.command, path))
            try:
                self._fail_if_asked(path)
                # By the quoted path: a branch may have a slash in its name.
                for method, pattern, action in ROUTES:
                    match = re.fullmatch(pattern, urlsplit(self.path).path)
                    if match is not None and method == self.command:
                        arguments = {key: unquote(value) for key, value in match.groupdict().items() if value}
                        return getattr(self, f"_{action}")(**arguments)
                raise _Refused(404, f"This Hub has no {self.command} {path}.")
            except _Refused as refusal:
                headers = {"X-Error-Message": refusal.message}
                if refusal.code is not None:
                    headers["X-Error-Code"] = refusal.code
                return self._answer({"error": refusal.message}, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _fail_if_asked(self, path: str) -> None:
        for failure in self.server.failures:
            if failure.times > 0 and failure.method == self.command and re.search(failure.path, path):
                failure.times -= 1
                raise _Refused(failure.status, "a failure asked for by the test")

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # ---- who asks ----

    @property
    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _check_may_write(self) -> None:
        if self._token == READ_TOKEN:
            raise _Refused(403, "Forbidden: this token may only read.")
        if self._token != TOKEN:
            raise _Refused(401, "Invalid username or password.")

    def _repo(self, name: str) -> Repo:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and self._token not in (TOKEN, READ_TOKEN)):
            raise _Refused(404 if self._token else 401, "Repository not found", "RepoNotFound")
        return repo

    def _files(self, name: str, revision: str) -> tuple[Repo, str, dict[str, bytes]]:
        repo = self._repo(name)
        files = repo.files(revision)
        if files is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, repo.branches.get(revision, revision), files

    # ---- repositories ----

    def _whoami(self) -> None:
        if self._token not in (TOKEN, READ_TOKEN):
            raise _Refused(401, "Invalid username or password.")
        role = "write" if self._token == TOKEN else "read"
        self._answer({"name": USER, "type": "user", "auth": {"accessToken": {"role": role}}})

    def _create(self) -> None:
        self._check_may_write()
        wanted = json.loads(self.body)
        name = f"{wanted['organization'] or USER}/{wanted['name']}"
        url = {"url": f"{self.server.url}/{name}", "name": name}
        if name in self.server.repos:
            return self._answer({"error": "You already created this model repo", **url}, 409)
        # huggingface_hub 1 says `visibility`, earlier ones say `private`.
        self.server.repos[name] = Repo(wanted.get("visibility") == "private" or bool(wanted.get("private")))
        return self._answer(url)

    def _branch(self, name: str, revision: str) -> None:
        self._check_may_write()
        repo = self._repo(name)
        repo.branches[revision] = repo.branches["main"]
        self._answer({})

    def _info(self, name: str, revision: str = "main") -> None:
        repo, oid, files = self._files(name, revision)
        card = _front_matter(files["README.md"].decode()) if "README.md" in files else {}
        self._answer({
            "id": name, "modelId": name, "sha": oid, "private": repo.private, "gated": False,
            "tags": card.get("tags", []), "cardData": card, "siblings": [{"rfilename": path} for path in files],
        })  # fmt: skip

    def _tree(self, name: str, revision: str, path: str = "") -> None:
        _, _, files = self._files(name, revision)
        inside = {name: data for name, data in files.items() if not path or name.startswith(f"{path}/")}
        if path and not inside:
            raise _Refused(404, f"{path} does not exist on {revision}", "EntryNotFound")
        self._answer([self._entry(path, data) for path, data in inside.items()])

    def _entry(self, path: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _git_hash(data)}
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def _resolve(self, name: str, revision: str, path: str) -> None:
        _, oid, files = self._files(name, revision)
        if path not in files:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        data = files[path]
        etag = hashlib.sha256(data).hexdigest() if path.endswith(LARGE) else _git_hash(data)
        self._answer(data, headers={"ETag": f'"{etag}"', "X-Repo-Commit": oid})

    # ---- uploads ----

    def _validate(self) -> None:
        content = json.loads(self.body)["content"]
        errors = metadata_errors(content)
        status = 400 if errors else 200
        self._answer({"errors": [{"message": error} for error in errors], "warnings": []}, status)

    def _preupload(self, name: str, revision: str) -> None:
        self._check_may_write()
        _, _, files = self._files(name, revision)
        answers = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            is_large = path.endswith(LARGE)
            answer = {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            if path in files:
                answer["oid"] = hashlib.sha256(files[path]).hexdigest() if is_large else _git_hash(files[path])
            answers.append(answer)
        self._answer({"files": answers})

    def _batch(self, name: str) -> None:
        self._check_may_write()
        self._repo(name)
        asked, answers = json.loads(self.body), []
        # Before version 1 the client asks here whether files go to the Xet storage.
        transfer = "xet" if self.server.xet_folder is not None and "xet" in asked["transfers"] else "basic"
        for wanted in asked["objects"]:
            answer = dict(wanted)
            if wanted["oid"] not in self.server.objects:
                href = f"{self.server.url}/large-files/{wanted['oid']}"
                verify = f"{self.server.url}/large-files/verify"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": verify}}
            answers.append(answer)
        self._answer({"transfer": transfer, "objects": answers})

    def _put_large(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, "The content is not what its name says.")
        self.server.objects[oid] = self.body
        self._answer({})

    def _verify_large(self) -> None:
        wanted = json.loads(self.body)
        if len(self.server.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise _Refused(404, "No such upload.")
        self._answer({})

    def _commit(self, name: str, revision: str) -> None:
        self._check_may_write()
        repo, _, before = self._files(name, revision)
        files, message = dict(before), ""
        for line in self.body.splitlines():
            part = json.loads(line)
            value = part["value"]
            if part["key"] == "header":
                message = value["summary"]
            elif part["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif part["key"] == "lfsFile":
                files[value["path"]] = self._large_file(value["oid"], value["path"])
            elif part["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise _Refused(400, f"This Hub knows no {part['key']}.")
        errors = metadata_errors(files["README.md"].decode()) if "README.md" in files else []
        if errors:
            raise _Refused(400, "; ".join(errors))
        oid = repo.commit(revision, files, message)
        self._answer({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"})

    def _xet_token(self, name: str, revision: str) -> None:
        self._check_may_write()
        self._files(name, revision)
        if self.server.xet_folder is None:
            raise _Refused(404, "This Hub has no Xet storage.")
        self.server.xet_folder.mkdir(parents=True, exist_ok=True)
        # hf_xet takes a folder for the storage's address, and then needs no server.
        address, expires = f"local://{self.server.xet_folder}", int(time.time()) + 3600
        # The client reads the answer, before version 1 its headers.
        headers = {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": "any", "X-Xet-Token-Expiration": str(expires)}
        self._answer({"casUrl": address, "accessToken": "any", "exp": expires}, headers=headers)

    def _large_file(self, oid: str, path: str) -> bytes:
        if self.server.xet_folder is not None:
            return pointer(oid)  # only hf_xet can read its storage
        if oid not in self.server.objects:
            raise _Refused(400, f"{path} was never uploaded.")
        return self.server.objects[oid]


def pointer(oid: str) -> bytes:
    """What stands for a large file that the server does not hold itself."""
    return f"oid sha256:{oid}".encode()


def metadata_errors(card: str) -> list[str]:
    """What the Hub would refuse in a card's metadata."""
    try:
        data = _front_matter(card)
    except (yaml.YAMLError, ValueError) as error:
        return [f"the metadata is no mapping in YAML: {error}"]
    errors = []
    for key in ("tags", "datasets", "metrics"):
        values = data.get(key, [])
        if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
            errors.append(f'"{key}" must be a list of strings')
    for key in ("library_name", "license", "pipeline_tag"):
        if not isinstance(data.get(key, ""), str):
            errors.append(f'"{key}" must be a string')
    models = data.get("base_model", [])
    for model in [models] if isinstance(models, str) else models:
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) is None:
            errors.append(f'"base_model" {model!r} is no model of the Hub')
    if "model-index" in data:
        try:
            _, results = model_index_to_eval_results(data["model-index"])
        except (KeyError, TypeError, ValueError) as error:
            errors.append(f'"model-index" lacks {error}')
        else:
            for result in results:
                named = (result.task_type, result.dataset_type, result.dataset_name, result.metric_type)
                if not all(named) or not isinstance(result.metric_value, (int, float)):
                    errors.append(f'"model-index" has an incomplete result: {result}')
    return errors


def _front_matter(card: str) -> dict[str, Any]:
    match = FRONT_MATTER.match(card)
    data = yaml.safe_load(match.group(1)) if match else {}
    if not isinstance(data, dict):
        raise ValueError(f"a {type(data).__name__}")
    return data


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
