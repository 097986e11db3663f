"""A dataset repository on loopback that speaks enough of the Hub's protocol for the real huggingface_hub.

    with Hub({"datasets/manifest.json": b"{}"}) as hub:
        subprocess.run([...], env={**os.environ, "HF_ENDPOINT": hub.endpoint})

It answers repository info, the tree (in pages), paths-info, and resolve, which redirects a large file to its content as
the Hub does to its CDN. `faults` spoils the next answers that carry the content of a file; `log` has every request.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".bin", ".model", ".jsonl", ".parquet", ".zst")
PAGE = 7  # entries of a tree in one answer


class Fault(NamedTuple):
    """What goes wrong with one answer."""

    status: int = 0  # answered instead of the content
    cut: int = -1  # bytes after which the connection is closed
    stall: int = -1  # bytes after which nothing comes any more, until the client goes away
    content: bytes | None = None  # sent instead of the true content
    no_range: bool = False  # send the whole file though only the rest was asked for


class Request(NamedTuple):
    method: str
    path: str  # of the file in the repository, or of the API call
    range: str


class Hub(ThreadingHTTPServer):
    """Serves `files` (path -> content) as the dataset repository `repo`; each `commit` is a new revision.

    `mirrors` are other repositories: name -> revision.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], repo: str = "someone/shards") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repo = repo
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.faults: dict[str, list[Fault]] = {}
        self.declared_sizes: dict[str, int] = {}
        self.log: list[Request] = []
        self.revisions: dict[str, dict[str, bytes]] = {}
        self.mirrors: dict[str, str] = {}
        self.closing = threading.Event()
        self.commit(files)

    def commit(self, files: dict[str, bytes]) -> str:
        """Make `files` the content of the branch main. -> the revision"""
        content = [f"{path} {hashlib.sha1(data).hexdigest()}" for path, data in sorted(files.items())]
        self.sha = hashlib.sha1("\n".join(content).encode()).hexdigest()
        self.revisions[self.sha] = dict(files)
        return self.sha

    def fetched(self) -> list[str]:
        """Paths of the files whose content was sent since the last call."""
        paths = [
            request.path for request in self.log if request.method == "GET" and not request.path.startswith("/api")
        ]
        self.log.clear()
        return paths

    def take_fault(self, path: str) -> Fault:
        waiting = self.faults.get(path)
        return waiting.pop(0) if waiting else Fault()

    def handle_error(self, *_: Any) -> None:
        """A client that was killed is part of the tests."""

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and content are sent one after the other; without this the second one waits 40 ms for an acknowledgement.
    disable_nagle_algorithm = True
    server: Hub

    def log_message(self, *_: Any) -> None:
        """The log of the server is Hub.log."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self.do_GET(json.loads(body) if body.startswith("{") else parse_qs(body))

    def do_GET(self, body: dict[str, Any] | None = None) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        hub = self.server
        if content := re.fullmatch(r"/content/([0-9a-f]{40})/(.+)", path):
            self.send_content(*content.groups())
            return
        heads = {hub.repo: hub.sha, **hub.mirrors}
        repos = "|".join(map(re.escape, heads))
        parts = re.fullmatch(rf"(/api)?/datasets/({repos})(?:/(revision|tree|paths-info|resolve)/([^/]+)/?(.*))?", path)
        if not parts:
            self.send_json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return
        api, repo, kind, revision, rest = parts.groups(default="")
        sha = heads[repo] if revision in ("", "main") else revision
        if sha not in hub.revisions:
            self.send_json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        elif kind == "resolve":
            self.resolve(sha, rest)
        elif api and self.api_fault(path):
            return
        elif kind == "tree":
            self.send_tree(sha, rest, query)
        elif kind == "paths-info":
            paths = (body or {}).get("paths", [])
            self.send_json([self.entry(sha, path) for path in paths if path in hub.revisions[sha]])
        else:
            names = [{"rfilename": name} for name in hub.revisions[sha]]
            self.send_json({"id": repo, "sha": sha, "private": False, "tags": [], "siblings": names})

    def api_fault(self, path: str) -> bool:
        self.server.log.append(Request(self.command, path, ""))
        fault = self.server.take_fault("/api")
        if fault.status:
            self.send_json({"error": "down"}, fault.status)
        return bool(fault.status)

    def entry(self, sha: str, path: str) -> dict[str, Any]:
        data = self.server.revisions[sha][path]
        size = self.server.declared_sizes.get(path, len(data))
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": blob}
        if path.endswith(LFS_SUFFIXES):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 134}
        return entry

    def send_tree(self, sha: str, folder: str, query: dict[str, list[str]]) -> None:
        """The recursive tree, folders included, PAGE entries at a time."""
        files = [path for path in sorted(self.server.revisions[sha]) if path.startswith(f"{folder}/" if folder else "")]
        folders = sorted({path[: match.start()] for path in files for match in re.finditer("/", path)})
        entries = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders]
        entries += [self.entry(sha, path) for path in files]
        if query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            depth = folder.count("/") + 1 if folder else 0
            entries = [entry for entry in entries if entry["path"].count("/") == depth and entry["path"] != folder]
        start = int(query.get("cursor", ["0"])[0])
        headers = {}
        if start + PAGE < len(entries):
            options = "&".join(f"{key}={values[0]}" for key, values in query.items() if key != "cursor")
            target = f"{self.server.endpoint}{urlsplit(self.path).path}?{options}&cursor={start + PAGE}"
            headers["Link"] = f'<{target}>; rel="next"'
        self.send_json(entries[start : start + PAGE], headers=headers)

    def resolve(self, sha: str, path: str) -> None:
        data = self.server.revisions[sha].get(path)
        if data is None:
            self.send_json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        if not path.endswith(LFS_SUFFIXES):
            self.send_content(sha, path)
            return
        self.send_response(302)
        self.send_header("Location", f"{self.server.endpoint}/content/{sha}/{path}")
        self.send_header("X-Repo-Commit", sha)
        self.send_header("X-Linked-Etag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_content(self, sha: str, path: str) -> None:
        asked = self.headers.get("Range", "")
        self.server.log.append(Request(self.command, path, asked))
        fault = self.server.take_fault(path) if self.command == "GET" else Fault()
        if fault.status:
            self.send_json({"error": "down"}, fault.status)
            return
        data = self.server.revisions[sha][path] if fault.content is None else fault.content
        match = re.fullmatch(r"bytes=([0-9]+)-([0-9]*)", asked)
        start = int(match[1]) if match and not fault.no_range else 0
        stop = min(int(match[2]) + 1, len(data)) if match and match[2] else len(data)
        if start and start >= len(data):
            self.send_json({"error": "range"}, 416, {"Content-Range": f"bytes */{len(data)}"})
            return
        part = memoryview(data)[start:stop]
        self.send_response(206 if match and not fault.no_range else 200)
        if match and not fault.no_range:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", sha)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "HEAD":
            return
        end = next((limit for limit in (fault.cut, fault.stall) if limit >= 0), len(part))
        self.wfile.write(part[:end])
        if fault.stall >= 0:
            self.wfile.flush()
            self.server.closing.wait(60)
        if end < len(part):
            self.close_connection = True

    def send_json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
