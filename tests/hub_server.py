"""A stand-in for the Hugging Face hub, which tests cannot reach: the part of its HTTP API that data sets are read by.

The clients are the real ones (`datasets`, `huggingface_hub` and its file system), pointed here by HF_ENDPOINT.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40
JSON = "application/json"


@contextmanager
def serving_data_set(name: str, files: Mapping[str, bytes], token: str) -> Iterator[tuple[str, list[str]]]:
    """Serves one gated data set of one commit; yields the endpoint and the byte ranges asked for, as they come."""
    ranges: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if not path.startswith((f"/api/datasets/{name}", f"/datasets/{name}/")):
                self.answer(404, headers={"X-Error-Code": "RepoNotFound"})
            elif self.headers.get("Authorization") != f"Bearer {token}":
                self.answer(401, headers={"X-Error-Code": "GatedRepo"})
            elif found := re.fullmatch(rf"/datasets/{name}/resolve/[^/]+/(.+)", path):
                self.send_file(found[1])
            elif found := re.fullmatch(rf"/api/datasets/{name}/tree/[^/]+(?:/(.+))?", path):
                is_whole = "recursive=true" in urlsplit(self.path).query.lower()
                self.answer(200, json.dumps(list_folder(files, found[1] or "", recursive=is_whole)).encode())
            else:
                siblings = [{"rfilename": file} for file in files]
                info = {"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "gated": "auto", "tags": []}
                self.answer(200, json.dumps(info).encode())

        def send_file(self, file: str) -> None:
            if file not in files:
                self.answer(404, headers={"X-Error-Code": "EntryNotFound"})
                return
            content = files[file]
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hash_file(content)}"', "Accept-Ranges": "bytes"}
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if asked is None:
                self.answer(200, content, headers)
                return
            ranges.append(f"{file} {asked[0]}")
            start, stop = int(asked[1]), min(int(asked[2] or len(content) - 1) + 1, len(content))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            self.answer(206, content[start:stop], headers)

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
    try:
        yield f"http://127.0.0.1:{server.server_port}", ranges
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
