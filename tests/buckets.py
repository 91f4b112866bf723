"""Servers that speak S3 and GCS, each a process of its own, and how their buckets are addressed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.fs as pafs

S3_SERVER = """
import signal
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
signal.pause()
"""
GCS_SERVER = """
import signal
from gcp_storage_emulator.server import create_server
server = create_server("127.0.0.1", 0, in_memory=True)
server.start()
print(server._api._httpd.server_port, flush=True)
signal.pause()
"""


@dataclass(frozen=True)
class BucketServer:
    """How the buckets of a server are addressed."""

    scheme: str
    options: str
    environment: tuple[str, str]  # the variable that says the same as the options
    keys: dict[str, str] = field(default_factory=dict)  # which the server wants and does not check

    def locate(self, bucket: str, key: str = "", more: str = "") -> str:
        """The address of a key with what pyarrow needs to find the server."""
        return f"{self.scheme}{bucket}{'/' if key else ''}{key}{self.options}{more}"

    def make(self, bucket: str) -> pafs.FileSystem:
        """Makes a bucket; returns the file system it is in."""
        more = "&allow_bucket_creation=true" if self.scheme == "s3://" else "&project_id=test"
        filesystem, _ = pafs.FileSystem.from_uri(self.locate(bucket, more=more))
        filesystem.create_dir(bucket)
        return filesystem

    def list_keys(self, bucket: str) -> list[str]:
        """Keys of all objects of a bucket."""
        filesystem, path = pafs.FileSystem.from_uri(self.locate(bucket))
        found = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
        return [each.path for each in found if each.type == pafs.FileType.File]

    @property
    def endpoint(self) -> str:
        """The server's own address."""
        return self.environment[1]

    def upload(self, folder: Path, bucket: str) -> str:
        """Copies a folder's files into a new bucket; returns the bucket's address."""
        pafs.copy_files(str(folder), bucket, destination_filesystem=self.make(bucket))
        return self.locate(bucket)


def read_file(address: str) -> bytes:
    filesystem, path = pafs.FileSystem.from_uri(address)
    return bytes(filesystem.open_input_file(path).read())


@contextmanager
def serving_s3() -> Iterator[BucketServer]:
    """Moto's server."""
    with _serving(S3_SERVER) as port:
        options = f"?endpoint_override=127.0.0.1:{port}&scheme=http"
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
        yield BucketServer("s3://", options, ("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}"), keys)


@contextmanager
def serving_gcs() -> Iterator[BucketServer]:
    """The emulator's server, which asks for no credentials."""
    with _serving(GCS_SERVER) as port:
        options = f"?endpoint_override=127.0.0.1:{port}&scheme=http&retry_limit_seconds=20"
        yield BucketServer("gs://anonymous@", options, ("CLOUD_STORAGE_EMULATOR_ENDPOINT", f"http://127.0.0.1:{port}"))


@contextmanager
def _serving(script: str) -> Iterator[int]:
    command = [sys.executable, "-W", "ignore", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()
