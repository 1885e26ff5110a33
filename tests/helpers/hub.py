"""A stand-in for the Hugging Face hub on loopback: what huggingface_hub asks of its HTTP API.

Repositories with commits, users with tokens, private ones, files of git and of LFS. It knows
nothing of genmodels: what it serves is what the client has uploaded, byte for byte.
"""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKENS = {"hf_alice": "alice", "hf_bob": "bob"}


class Hub(ThreadingHTTPServer):
    """The server; `repos` is {name: {"private": bool, "commits": [(sha, {path: bytes})]}}."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.asked, self.lfs, self.writes = {}, [], {}, True

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, name, revision="main"):
        """Return (sha, {path: bytes}) of a revision, or None."""
        commits = self.repos[name]["commits"]
        if revision == "main" and commits:
            return commits[-1]
        return next((commit for commit in commits if commit[0] == revision), None)

    def commit(self, name, files):
        """Add a commit; return its sha."""
        before = self.files(name)
        files = {**(before[1] if before else {}), **files}
        parts = [f"{path} {hashlib.sha1(data).hexdigest()}" for path, data in sorted(files.items())]
        commits = self.repos[name]["commits"]
        sha = hashlib.sha1(f"{len(commits)} {parts}".encode()).hexdigest()
        commits.append((sha, files))
        return sha


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        length = headers.pop("length", len(data))
        for name, value in {"Content-Length": length, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do(self):  # noqa: C901
        url = urlsplit(self.path)
        size = int(self.headers.get("Content-Length") or 0)
        data = self.rfile.read(size)
        self.user = TOKENS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        self.server.asked.append(f"{self.command} {url.path}")
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        match [self.command, *parts]:
            case ["POST", "api", "repos", "create"]:
                self.create(**json.loads(data))
            case ["POST", "api", "validate-yaml"]:
                self.validate(json.loads(data)["content"])
            case ["GET", "api", "models", owner, name]:
                self.info(f"{owner}/{name}", "main")
            case ["GET", "api", "models", owner, name, "revision", revision]:
                self.info(f"{owner}/{name}", revision)
            case ["GET", "api", "models", owner, name, "tree", revision]:
                self.tree(f"{owner}/{name}", revision)
            case ["POST", "api", "models", owner, name, "preupload", _]:
                if self.may_write(f"{owner}/{name}"):
                    self.preupload(json.loads(data)["files"])
            case ["POST", owner, name, "info", "lfs", "objects", "batch"]:
                if self.may_write(f"{owner}/{name.removesuffix('.git')}"):
                    self.batch(json.loads(data)["objects"])
            case ["PUT", "lfs", oid]:
                assert hashlib.sha256(data).hexdigest() == oid
                self.server.lfs[oid] = data
                self.answer(200)
            case ["POST", "api", "models", owner, name, "commit", "main"]:
                if self.may_write(f"{owner}/{name}"):
                    self.commit(f"{owner}/{name}", [json.loads(x) for x in data.splitlines()])
            case [("GET" | "HEAD"), owner, name, "resolve", revision, *path]:
                self.resolve(f"{owner}/{name}", revision, "/".join(path))
            case _:
                self.answer(404, {"error": "Not Found"})

    do_GET = do_HEAD = do_POST = do_PUT = do

    def refuse(self, status, code, words):
        self.answer(status, {"error": words}, X_Error_Code=code, X_Error_Message=words)

    def sees(self, name):
        """Whether the user may see the repository; else it is as if there were none."""
        repo = self.server.repos.get(name)
        if repo is None or (repo["private"] and self.user != name.partition("/")[0]):
            self.refuse(401 if self.user is None else 404, "RepoNotFound", "Repository not found")
            return False
        return True

    def may_write(self, name):
        if self.user is None:
            self.answer(401, {"error": "Invalid username or password."})
        elif not self.server.writes or self.user != name.partition("/")[0]:
            self.answer(403, {"error": "Forbidden: pass `create_pr=1` as a query parameter"})
        elif name not in self.server.repos:
            self.refuse(404, "RepoNotFound", "Repository not found")
        else:
            return True
        return False

    def create(self, name, organization=None, visibility=None, **_):
        if self.user is None:
            return self.answer(401, {"error": "Invalid username or password."})
        full = f"{organization or self.user}/{name}"
        if not full.startswith(f"{self.user}/"):
            return self.answer(403, {"error": f"You don't have the rights to create {full}"})
        url = {"url": f"{self.server.url}/{full}", "name": full}
        if full in self.server.repos:
            return self.answer(409, url | {"error": "You already created this model repo"})
        self.server.repos[full] = {"private": visibility == "private", "commits": []}
        return self.answer(200, url)

    def validate(self, content):
        header = yaml.safe_load(content.split("---")[1])
        if not isinstance(header, dict) or header.get("license") in ("none", "mine"):
            return self.answer(400, {"errors": [{"message": '"license" must be one of [mit]'}]})
        return self.answer(200, {"errors": [], "warnings": []})

    def info(self, name, revision):
        if not self.sees(name):
            return
        repo, commit = self.server.repos[name], self.server.files(name, revision)
        if commit is None and (revision != "main" or repo["commits"]):
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        sha, files = commit or (None, {})
        siblings = [{"rfilename": path} for path in files]
        info = {"id": name, "sha": sha, "private": repo["private"], "siblings": siblings}
        return self.answer(200, info)

    def tree(self, name, revision):
        if self.sees(name):
            _, files = self.server.files(name, revision)
            rows = [
                {"type": "file", "path": path, "size": len(data), "oid": self.etag(path, data)}
                for path, data in files.items()
            ]
            self.answer(200, rows)

    def etag(self, path, data):
        if path.endswith(".safetensors"):
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def preupload(self, files):
        modes = {True: "lfs", False: "regular"}
        rows = [
            {
                "path": file["path"],
                "uploadMode": modes[file["path"].endswith((".safetensors", ".png"))],
                "shouldIgnore": False,
            }
            for file in files
        ]
        self.answer(200, {"files": rows})

    def batch(self, objects):
        rows = [
            {**thing, "actions": {"upload": {"href": f"{self.server.url}/lfs/{thing['oid']}"}}}
            for thing in objects
        ]
        self.answer(200, {"transfer": "basic", "objects": rows})

    def commit(self, name, lines):
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.lfs[value["oid"]]
        sha = self.server.commit(name, files)
        url = f"{self.server.url}/{name}/commit/{sha}"
        self.answer(200, {"success": True, "commitOid": sha, "commitUrl": url})

    def resolve(self, name, revision, path):
        if not self.sees(name):
            return
        sha, files = self.server.files(name, revision) or (None, {})
        if path not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        data = files[path]
        etag = f'"{self.etag(path, data)}"'
        return self.answer(200, data, ETag=etag, X_Repo_Commit=sha, X_Linked_Size=len(data))


@contextlib.contextmanager
def served(monkeypatch, folder, token="hf_alice"):
    """Start a Hub and let huggingface_hub ask it, with its cache in `folder`; give the Hub.

    The client then sends files by LFS over HTTP: Xet's own servers are not stood in for.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    with monkeypatch.context() as patch:
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(folder / "hub-cache"),
            "HF_HUB_DISABLE_XET": True,
        }.items():
            patch.setattr(constants, name, value)
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            patch.delenv(name, raising=False)
        patch.setenv("HF_TOKEN", token)
        huggingface_hub.close_session()
        disable_progress_bars()
        try:
            yield hub
        finally:
            enable_progress_bars()
            huggingface_hub.close_session()
            hub.shutdown()
            hub.server_close()
            thread.join()
