"""A server on this machine that speaks as much of the Hugging Face hub's API as its real clients ask for.

It has no redirects to a CDN, Xet, buckets, tokens, dataset viewer, or pages of a long listing. A process with
`hub.environment(directory)` takes it for the hub.
"""

import hashlib
import json
import os
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

# read by every Python that has this directory in PYTHONPATH: no sleep is long
HASTE = "import time\n\ntime.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.005))\n"
# repository of `hub` -> the status and the code that it answers every request with; 0 hangs up
REFUSALS = {
    "asks": (401, "GatedRepo"), "waits": (403, "GatedRepo"), "forbids": (403, ""), "gone": (404, "RepoNotFound"),
    "limited": (429, ""), "down": (503, ""), "silent": (0, ""),
}  # fmt: skip


@dataclass
class Repository:
    """The files of one commit, and the status and code that the server answers instead of them."""

    files: dict[str, bytes]
    sha: str
    refusal: tuple[int, str] | None = None


@dataclass
class Hub:
    """The server; it answers until `close`."""

    home: Path  # of the clients
    repositories: dict[str, Repository] = field(default_factory=dict)  # "org/name" -> content; datasets and models
    requests: Counter[str] = field(default_factory=Counter)  # "GET /the/path" -> how often it was asked
    cuts: dict[str, list[int]] = field(default_factory=dict)  # "org/name/the/path" -> bytes until a cut, cuts to come

    def __post_init__(self):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def add(self, name, files):
        """Add a repository, or another commit of it; its sha."""
        sha = hashlib.sha1(repr((name, sorted(files.items()))).encode()).hexdigest()
        self.repositories[name] = Repository(dict(files), sha)
        return sha

    def cut(self, name, file, after, times=10**9):
        """Close the connection within a file of a repository, so often."""
        self.cuts[f"{name}/{file}"] = [after, times]

    @property
    def environment(self):
        """The variables of a process that takes this for the hub."""
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}", "NO_PROXY": "127.0.0.1",
            "HF_HOME": f"{self.home}/hf", "HF_TOKEN": "", "HF_TOKEN_PATH": f"{self.home}/no-token",
            "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        }  # fmt: skip

    def close(self):
        """Answer no more requests."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A hub that refuses `REFUSALS`."""
    refused = {f"org/{name}": Repository({}, "", refusal) for name, refusal in REFUSALS.items()}
    server = Hub(tmp_path_factory.mktemp("hub"), refused)
    yield server
    server.close()


@pytest.fixture(scope="session")
def hub_forks(hub, forks):
    """`forks` whose helpers take `hub` for the hub, too; nothing waits between two tries."""
    (hub.home / "sitecustomize.py").write_text(HASTE)
    path = os.pathsep.join(filter(None, [str(hub.home), os.environ.get("PYTHONPATH")]))
    environment = {**hub.environment, "PYTHONPATH": path}
    return lambda *words, before="", **how: forks(*words, env=environment, before=HASTE + before, **how)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests[f"{self.command} {path}"] += 1
        api, rest = re.fullmatch(r"/(api/)?(?:datasets/|models/)?(.*)", path).groups()
        parts = re.fullmatch(r"(.+?)(?:/(resolve|tree|paths-info|revision)/([^/]+)/?(.*))?", rest)
        name, verb, revision, inner = parts.groups(default="")
        found = self.hub.repositories.get(name)
        if found is None:
            return self._refuse(401, "RepoNotFound")  # the hub's answer without a token
        if found.refusal:
            status, code = found.refusal
            self.close_connection = not status
            return self._refuse(status, code) if status else None
        if revision not in ("", "main", found.sha):
            return self._refuse(404, "RevisionNotFound")
        if not api:
            return self._file(found, inner, self.hub.cuts.get(f"{name}/{inner}"))
        if verb == "paths-info":
            paths = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            return self._json([entry for path in paths for entry in _entries(found, path)])
        if verb == "tree":
            prefix = f"{inner}/" if inner else ""
            below = sorted({p for f in found.files if f.startswith(prefix) for p in _ways(f) if len(p) > len(inner)})
            if inner and not below:
                return self._refuse(404, "EntryNotFound")
            deep = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
            shown = [p for p in below if deep or "/" not in p[len(prefix) :]]
            return self._json([entry for path in shown for entry in _entries(found, path)])
        siblings = [{"rfilename": file} for file in sorted(found.files)]
        return self._json({"id": name, "sha": found.sha, "siblings": siblings, "private": False, "tags": []})

    do_GET = do_HEAD = do_POST = _answer

    def _file(self, found, inner, cut):
        content = found.files.get(inner)
        if content is None:
            return self._refuse(404, "EntryNotFound", {"X-Repo-Commit": found.sha})
        span = self.headers.get("Range", "").removeprefix("bytes=")
        first, _, last = span.partition("-")
        begin, end = int(first or 0), min(int(last or len(content)) + 1, len(content))
        if begin >= len(content) and content:
            return self._refuse(416, "", {"Content-Range": f"bytes */{len(content)}"})
        headers = {"Content-Length": end - begin, "Accept-Ranges": "bytes", "ETag": f'"{_oid(content)}"'}
        spanned = {"Content-Range": f"bytes {begin}-{end - 1}/{len(content)}"} if span else {}
        self._head(206 if span else 200, headers | spanned | {"X-Repo-Commit": found.sha})
        if self.command == "HEAD":
            return
        if cut and cut[1] and end > cut[0]:
            cut[1] -= 1
            end, self.close_connection = max(begin, cut[0]), True
        self.wfile.write(content[begin:end])

    def _json(self, value):
        body = json.dumps(value).encode()
        self._head(200, {"Content-Type": "application/json", "Content-Length": len(body)})
        self.wfile.write(body)

    def _refuse(self, status, code, headers=None):
        self._head(status, {"X-Error-Code": code, **(headers or {}), "Content-Length": 0})

    def _head(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            if value != "":
                self.send_header(name, str(value))
        self.end_headers()


def _ways(file):
    """A file and the folders that it is in."""
    words = file.split("/")
    return ["/".join(words[:n]) for n in range(1, len(words) + 1)]


def _entries(found, path):
    if path in found.files:
        return [{"type": "file", "path": path, "size": len(found.files[path]), "oid": _oid(found.files[path])}]
    is_folder = any(file.startswith(f"{path}/") for file in found.files)
    return [{"type": "directory", "path": path, "oid": _oid(path.encode())}] if is_folder else []


def _oid(content):
    return hashlib.sha1(content).hexdigest()
