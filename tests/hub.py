"""A stand-in of the Hub's HTTP interface on loopback: models and datasets with branches, for the real client libraries.

    with HubStandIn() as hub:
        hub.add("models", "owner/name", {"config.json": b"{}"})
        run_script("-m", "model.hub", …, **hub.environment(tmp_path))

Faults can be set for files: a connection that is cut, a repository that is gated.
"""
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

from safetensors.torch import load_file

from bench.workload import incremental_save

Files = Mapping[str, bytes]


class HubStandIn:
    """Repositories and the server that offers them. `requests` holds (method, path) of each request."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], dict[str, Files]] = {}  # (kind, id) -> branch -> path -> content
        self.gated: set[str] = set()  # ids
        self.cut: dict[str, int] = {}  # name of a file -> bytes after which the connection is cut, once
        self.requests: list[tuple[str, str]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: Handler(self, *args))

    def __enter__(self) -> "HubStandIn":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, kind: str, repo_id: str, files: Files, branch: str = "main") -> None:
        """Adds a branch of a repository. kind: "models" or "datasets"."""
        self.repos.setdefault((kind, repo_id), {})[branch] = files

    def environment(self, cache: Path) -> dict[str, str]:
        """The environment variables of a process that uses this server, with a cache of its own."""
        return {"HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}", "HF_HOME": str(cache),
                "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1"}


class Handler(BaseHTTPRequestHandler):
    """Answers the requests that huggingface_hub and datasets make for public repositories."""
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # each answer would wait 40 ms for its content

    def __init__(self, hub: HubStandIn, *args: object):
        self.hub = hub
        super().__init__(*args)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/(.+))?", path):
            kind, repo_id, what, rest = found.groups()
            self.api(kind, repo_id, what or "revision", rest or "main", body)
        elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/(.+)", path):
            kind, repo_id, rest = found.groups()
            self.resolve("datasets" if kind else "models", repo_id, rest)
        else:
            self.answer(404, {"error": "Not Found"})

    def branch(self, kind: str, repo_id: str, rest: str) -> tuple[Files, str, str] | None:
        """The files of a revision, its commit, and what follows it in a path. If there is none, answers an error."""
        branches = self.hub.repos.get((kind, repo_id))
        if branches is None:
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        if repo_id in self.hub.gated:
            self.answer(403, {"error": f"Access to {repo_id} is restricted"}, {"X-Error-Code": "GatedRepo"})
            return None
        for name, files in branches.items():
            commit = hashlib.sha1(f"{repo_id} {name}".encode()).hexdigest()
            for revision in (name, commit):
                if rest == revision or rest.startswith(f"{revision}/"):
                    return files, commit, rest[len(revision) + 1:]
        self.answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        return None

    def api(self, kind: str, repo_id: str, what: str, rest: str, body: bytes) -> None:
        """Answers a request for a repository's description, its list of files, or facts about some of them."""
        if (found := self.branch(kind, repo_id, rest)) is None:
            return
        files, commit, folder = found
        if what == "revision":
            return self.answer(200, {"_id": "0" * 24, "id": repo_id, "sha": commit, "private": False, "gated": False,
                                     "disabled": False, "downloads": 0, "likes": 0, "tags": [],
                                     "siblings": [{"rfilename": name} for name in files]})
        entries = [{"type": "file", "path": name, "size": len(content), "oid": oid(content)}
                   for name, content in files.items() if not folder or name.startswith(f"{folder}/")]
        folders = {str(parent) for name in files for parent in Path(name).parents} - {"."}
        entries += [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in sorted(folders)
                    if not folder or name.startswith(f"{folder}/")]
        if what == "paths-info":
            asked = json.loads(body)["paths"] if body[:1] == b"{" else re.findall(r"paths=([^&]+)", body.decode())
            entries = [entry for entry in entries if entry["path"] in set(map(unquote, asked))]
        elif "recursive=true" not in self.path.lower():
            depth = folder.count("/") + 1 if folder else 0
            entries = [entry for entry in entries if str(entry["path"]).count("/") == depth]
        if not entries and what == "tree" and folder:
            return self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        self.answer(200, entries)

    def resolve(self, kind: str, repo_id: str, rest: str) -> None:
        """Answers a request for a file, or for a part of it."""
        if (found := self.branch(kind, repo_id, rest)) is None:
            return
        files, commit, name = found
        if (content := files.get(name)) is None:
            return self.answer(404, {"error": "Entry not found"},
                               {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        headers = {"ETag": f'"{oid(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        start, status = 0, 200
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(asked[1]), int(asked[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{min(end, len(content) - 1)}/{len(content)}"
            content, status = content[start:end + 1], 206
        self.send(status, content, headers, self.hub.cut.pop(name, None) if self.command == "GET" else None)

    def answer(self, status: int, value: object, headers: Mapping[str, str] | None = None) -> None:
        """Sends a JSON value. The Hub also puts the message of an error into a header."""
        message = {"X-Error-Message": str(value["error"])} if isinstance(value, dict) and "error" in value else {}
        headers = {"Content-Type": "application/json", **message, **(headers or {})}
        self.send(status, json.dumps(value).encode(), headers)

    def send(self, status: int, content: bytes, headers: Mapping[str, str], cut: int | None = None) -> None:
        """Sends an answer, or its first bytes before the connection is cut."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content if cut is None else content[:cut])
        if cut is not None:
            self.close_connection = True
            self.connection.close()

    def log_message(self, *args: object) -> None:
        pass


def oid(content: bytes) -> str:
    """The identifier of a file's content."""
    return hashlib.sha1(content).hexdigest()


def published_files(checkpoint: Path, folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint as the growth models are published: .bin weights, and no safetensors."""
    incremental_save(load_file(checkpoint / "model.safetensors"), folder / "pytorch_model.bin")
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.suffix in (".json", ".model")}
    return {".gitattributes": b"", "README.md": b"# Model\n", **files,
            "pytorch_model.bin": (folder / "pytorch_model.bin").read_bytes()}
