"""A stand-in for the Hugging Face hub, which tests cannot reach: the part of its HTTP API that files are read by.

The clients are the real ones (`transformers`, `datasets`, `huggingface_hub` and its file system), pointed here by HF_ENDPOINT.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

COMMIT = "a" * 40
JSON = "application/json"


@dataclass
class HubRepository:
    """What the hub has under one name, and what it was asked for.

    Attributes:
        kind: Of the repository.
        name: `owner/name`.
        commits: Files of each commit.
        branches: Commit that each branch stands at; a test may move it.
        token: Who may read; anyone without.
        endpoint: Address of the server.
        requests: Method and path of each request, as they come.
        ranges: File and byte range of each request for a part.
    """

    kind: Literal["models", "datasets"]
    name: str
    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    token: str | None = None
    endpoint: str = ""
    requests: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)

    def find(self, revision: str) -> str | None:
        """The commit that a branch or a commit's name stands for."""
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None


@contextmanager
def serving_data_set(name: str, files: Mapping[str, bytes], token: str) -> Iterator[tuple[str, list[str]]]:
    """Serves one gated data set of one commit; yields the endpoint and the byte ranges asked for, as they come."""
    branches = dict.fromkeys(("main", "refs/convert/parquet"), COMMIT)
    with serving(HubRepository("datasets", name, {COMMIT: dict(files)}, branches, token)) as repository:
        yield repository.endpoint, repository.ranges


@contextmanager
def serving(repository: HubRepository) -> Iterator[HubRepository]:
    """Serves a repository as long as the context lasts."""
    name, files_of = repository.name, repository.commits
    api, pages = f"/api/{repository.kind}/{name}", f"/{name}" if repository.kind == "models" else f"/datasets/{name}"

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = urlsplit(self.path).path  # a revision's slashes are quoted, those between parts are not
            repository.requests.append(f"{self.command} {unquote(path)}")
            if path != api and not path.startswith((f"{api}/", f"{pages}/")):
                self.answer(404, headers={"X-Error-Code": "RepoNotFound"})
            elif repository.token is not None and self.headers.get("Authorization") != f"Bearer {repository.token}":
                self.answer(401, headers={"X-Error-Code": "GatedRepo"})
            elif found := re.fullmatch(rf"{pages}/resolve/([^/]+)/(.+)", path):
                self.send_file(unquote(found[1]), unquote(found[2]))
            elif found := re.fullmatch(rf"{api}/tree/([^/]+)(?:/(.+))?", path):
                self.send_list(unquote(found[1]), unquote(found[2] or ""))
            else:
                self.send_description(unquote(path.removeprefix(api).removeprefix("/revision/")) or "main")

        def send_description(self, revision: str) -> None:
            commit = self.find(revision)
            if commit is not None:
                siblings = [{"rfilename": file} for file in files_of[commit]]
                gated = "auto" if repository.token else False
                info = {"id": name, "sha": commit, "siblings": siblings, "private": False, "gated": gated, "tags": []}
                self.answer(200, json.dumps(info).encode())

        def send_list(self, revision: str, folder: str) -> None:
            commit = self.find(revision)
            if commit is not None:
                is_whole = "recursive=true" in urlsplit(self.path).query.lower()
                self.answer(200, json.dumps(list_folder(files_of[commit], folder, recursive=is_whole)).encode())

        def send_file(self, revision: str, file: str) -> None:
            commit = self.find(revision)
            if commit is None:
                return
            if file not in files_of[commit]:
                self.answer(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
                return
            content = files_of[commit][file]
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hash_file(content)}"', "Accept-Ranges": "bytes"}
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if asked is None:
                self.answer(200, content, headers)
                return
            repository.ranges.append(f"{file} {asked[0]}")
            start, stop = int(asked[1]), min(int(asked[2] or len(content) - 1) + 1, len(content))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            self.answer(206, content[start:stop], headers)

        def find(self, revision: str) -> str | None:
            commit = repository.find(revision)
            if commit is None:
                self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
            return commit

        def answer(self, status: int, body: bytes = b"{}", headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Type": JSON, "Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    repository.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield repository
    finally:
        server.shutdown()
        server.server_close()


def list_folder(files: Mapping[str, bytes], folder: str, *, recursive: bool = False) -> list[dict[str, object]]:
    """Files and folders right below one, or all below it."""
    start = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, object]] = {}
    for file, content in files.items():
        if not file.startswith(start):
            continue
        parts = file[len(start) :].split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            path = start + "/".join(parts[:depth])
            entries[path] = {"path": path, "type": "directory", "oid": "0", "size": 0}
        if recursive or len(parts) == 1:
            entries[file] = {"path": file, "type": "file", "oid": hash_file(content), "size": len(content)}
    return list(entries.values())


def hash_file(content: bytes) -> str:
    """Names a content, as the hub's ETag does."""
    return hashlib.sha256(content).hexdigest()


def read_files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, as the hub has it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def ask_hub_at(endpoint: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Points this process's client at a server: it reads its settings once, when it is imported, which another test has done."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
