"""A stand-in for the Hugging Face hub, which tests cannot reach: the part of its HTTP API that a model is uploaded by.

The client is the real one (`huggingface_hub`), pointed here by its endpoint.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "b" * 40


class Uploads:
    """What the hub was given."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.cards: list[str] = []
        self.blobs: dict[str, bytes] = {}


@contextmanager
def taking_uploads(token: str) -> Iterator[tuple[str, Uploads]]:
    """Takes repositories, large files and commits from whoever has the token; yields the endpoint and what came."""
    taken = Uploads()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Authorization") != f"Bearer {token}":
                self.answer(401, {"error": "Invalid credentials in Authorization header"})
            elif self.path == "/api/repos/create":
                wanted = json.loads(body)
                name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
                taken.repositories[name] = wanted
                self.answer(200, {"url": f"{endpoint}/{name}"})
            elif self.path == "/api/validate-yaml":
                taken.cards.append(json.loads(body)["content"])
                self.answer(200, {"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                asked = json.loads(body)["files"]
                modes = [
                    {"path": f["path"], "uploadMode": self.mode(f), "shouldIgnore": False, "oid": None} for f in asked
                ]
                self.answer(200, {"files": modes})
            elif self.path.endswith("/info/lfs/objects/batch"):
                objects = [self.invite(item) for item in json.loads(body)["objects"]]
                self.answer(200, {"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")
            elif found := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
                self.commit(body.decode().splitlines())
                self.answer(
                    200, {"success": True, "commitOid": COMMIT, "commitUrl": f"{endpoint}/{found[1]}/commit/{COMMIT}"}
                )
            else:
                self.answer(404, {"error": f"nothing at {self.path}"})

        def do_PUT(self) -> None:
            taken.blobs[self.path.rsplit("/", 1)[-1]] = self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(200, {})

        def mode(self, file: dict[str, Any]) -> str:
            return "lfs" if file["path"].endswith(".safetensors") else "regular"

        def invite(self, item: dict[str, Any]) -> dict[str, Any]:
            return item | {"actions": {"upload": {"href": f"{endpoint}/blobs/{item['oid']}", "header": {}}}}

        def commit(self, lines: list[str]) -> None:
            for entry in map(json.loads, lines):
                value = entry["value"]
                if entry["key"] == "header":
                    taken.commits.append(value["summary"])
                elif entry["key"] == "file":
                    taken.files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    taken.files[value["path"]] = taken.blobs[value["oid"]]

        def answer(self, status: int, content: object, kind: str = "application/json") -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield endpoint, taken
    finally:
        server.shutdown()
        server.server_close()
