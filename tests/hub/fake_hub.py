"""A Hugging Face Hub on this machine: repositories in memory, with branches, privacy, LFS, and failures on request."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

import yaml

TOKEN = "hf_test"
USER = "me"


class FakeHub:
    """A server on loopback while it is open.

    Attributes:
        repos: `user/name` -> `{"private": bool, "branches": {branch: {path: content}}, "commits": [messages]}`.
        fails: Pattern of "METHOD path" -> how many of the requests that match it are answered with 500 from now on.
        uses_lfs: Whether weights go through LFS, or into the commit itself.
        requests: "METHOD path" of everything that was asked.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.blobs: dict[str, bytes] = {}
        self.fails: dict[str, int] = {}
        self.uses_lfs = True
        self.requests: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return self.repos[repo]["branches"][branch]

    def add(self, repo: str, private: bool = False) -> None:
        self.repos[repo] = {"private": private, "branches": {"main": {}}, "commits": []}


def commit_hash(repo: str, revision: str, files: dict[str, bytes]) -> str:
    text = repr((repo, revision, sorted((path, hashlib.sha1(content).hexdigest()) for path, content in files.items())))
    return hashlib.sha1(text.encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """The routes that pushing and loading use."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._route()

    do_HEAD = do_POST = do_PUT = do_GET

    def _route(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlparse(self.path).path
        line = f"{self.command} {path}"
        self.hub.requests.append(line)
        for pattern, left in self.hub.fails.items():
            if left and re.search(pattern, line):
                self.hub.fails[pattern] = left - 1
                return self._answer(500, {"error": "the server has failed"})
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, line):
                return method(self, *(unquote(part) for part in found.groups() if part is not None))
        return self._answer(404, {"error": f"no route for {line}"})

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refused(self, repo: str | None = None) -> bool:
        """Answers a request that the token does not allow; a private repository is not there without it."""
        given = self.headers.get("Authorization")
        if repo is not None and self.command in ("GET", "HEAD"):
            known = self.hub.repos.get(repo)
            if known is None or (known["private"] and given != f"Bearer {TOKEN}"):
                self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
                return True
            return False
        if given != f"Bearer {TOKEN}":
            message = "Invalid credentials in Authorization header"
            self._answer(401, {"error": message}, {"X-Error-Message": message})
            return True
        return False

    def _create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or USER}/{asked['name']}"
        if self._refused():
            return
        if not repo.startswith(f"{USER}/"):
            return self._answer(403, {"error": "You have no rights here"}, {"X-Error-Message": "no rights here"})
        if repo in self.hub.repos:
            return self._answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"})
        self.hub.add(repo, asked.get("private") is True or asked.get("visibility") == "private")
        return self._answer(200, {"url": f"{self.hub.url}/{repo}", "name": repo})

    def _validate(self) -> None:
        header = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        is_mapping = header is not None and isinstance(yaml.safe_load(header[1]), dict)
        errors = [] if is_mapping else [{"message": "no header"}]
        self._answer(200 if is_mapping else 400, {"errors": errors, "warnings": []})

    def _branch(self, repo: str, branch: str) -> None:
        branches = self.hub.repos[repo]["branches"]
        if self._refused():
            return
        status = 409 if branch in branches else 200
        branches.setdefault(branch, dict(branches["main"]))
        self._answer(status, {})

    def _preupload(self, repo: str, branch: str) -> None:
        if self._refused():
            return
        there, files = self.hub.files(repo, branch), []
        for asked in json.loads(self.body)["files"]:
            mode = "lfs" if self.hub.uses_lfs and asked["path"].endswith(".safetensors") else "regular"
            old = there.get(asked["path"])
            blob = None if old is None else b"blob %d\0" % len(old) + old
            oid = None if old is None else (hashlib.sha256(old) if mode == "lfs" else hashlib.sha1(blob)).hexdigest()
            files.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer(200, {"files": files})

    def _batch(self, repo: str) -> None:
        if self._refused():
            return
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}", "header": {}}}
            objects.append(asked | ({} if asked["oid"] in self.hub.blobs else {"actions": upload}))
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _put(self, oid: str) -> None:
        is_whole = hashlib.sha256(self.body).hexdigest() == oid
        if is_whole:
            self.hub.blobs[oid] = self.body
        self._answer(200 if is_whole else 400, {})

    def _commit(self, repo: str, branch: str) -> None:
        if self._refused():
            return
        files = dict(self.hub.files(repo, branch))
        for line in self.body.splitlines():
            action = json.loads(line)
            value = action["value"]
            if action["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif action["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif action["key"] == "deletedFile":
                del files[value["path"]]
            else:
                self.hub.repos[repo]["commits"].append(value["summary"])
        self.hub.repos[repo]["branches"][branch] = files
        oid = commit_hash(repo, branch, files)
        self._answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid})

    def _info(self, repo: str, revision: str | None = None) -> None:
        if self._refused(repo):
            return
        revision = self._resolved(repo, revision or "main")
        if revision is None:
            return self._answer(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
        files = self.hub.files(repo, revision)
        self._answer(
            200,
            {
                "id": repo, "sha": commit_hash(repo, revision, files), "private": self.hub.repos[repo]["private"],
                "siblings": [{"rfilename": path} for path in files], "tags": [],
            },
        )  # fmt: skip

    def _resolved(self, repo: str, revision: str) -> str | None:
        """The branch with this name, or with this commit at its head."""
        branches = self.hub.repos[repo]["branches"]
        return next((b for b, files in branches.items() if revision in (b, commit_hash(repo, b, files))), None)

    def _tree(self, repo: str, revision: str, folder: str | None = None) -> None:
        if self._refused(repo):
            return
        files = self.hub.files(repo, self._resolved(repo, revision) or "main")
        if folder:
            return self._answer(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
        listed = [{"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40} for path in files]
        self._answer(200, listed)

    def _file(self, repo: str, revision: str, path: str) -> None:
        if self._refused(repo):
            return
        branch = self._resolved(repo, revision)
        content = None if branch is None else self.hub.files(repo, branch).get(path)
        if content is None:
            code = "RevisionNotFound" if branch is None else "EntryNotFound"
            return self._answer(404, {"error": code}, {"X-Error-Code": code})
        sha = commit_hash(repo, branch, self.hub.files(repo, branch))
        self._answer(200, content, {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})


REPO = r"/([\w.-]+/[\w.-]+)"
ROUTES = (
    (r"POST /api/repos/create", Handler._create),
    (r"POST /api/validate-yaml", Handler._validate),
    (rf"POST /api/models{REPO}/branch/(.+)", Handler._branch),
    (rf"POST /api/models{REPO}/preupload/(.+)", Handler._preupload),
    (rf"POST /api/models{REPO}/commit/(.+)", Handler._commit),
    (rf"POST {REPO}\.git/info/lfs/objects/batch", Handler._batch),
    (r"PUT /lfs/(\w+)", Handler._put),
    (rf"GET /api/models{REPO}", Handler._info),
    (rf"GET /api/models{REPO}/revision/(.+)", Handler._info),
    (rf"GET /api/models{REPO}/tree/([^/]+)(?:/(.+))?", Handler._tree),
    (rf"(?:GET|HEAD) {REPO}/resolve/([^/]+)/(.+)", Handler._file),
)
