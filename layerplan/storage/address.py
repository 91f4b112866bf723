"""Where bytes lie: a local path, or an address that pyarrow (S3, GCS, HDFS) or fsspec (the rest) can open.

An address that pyarrow opens may end with options, `s3://bucket/raw?endpoint_override=minio:9000&scheme=http`. They hold for
every file below it. The rest of an address is taken as it is written: nothing in it is percent-decoded.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import pyarrow.fs as pafs

BUCKETS = ("s3", "gs", "gcs")
HADOOP = ("hdfs", "viewfs")


def is_address(path: str | Path) -> bool:
    """Whether the path is an address such as `s3://bucket/folder`, and not a local path."""
    return "://" in str(path)


def split_options(path: str) -> tuple[str, str]:
    """The path, and the options at the end of an address with their question mark."""
    if path.partition("://")[0] not in (*BUCKETS, *HADOOP):
        return path, ""
    name, mark, options = path.partition("?")
    return name, mark + options


def join_location(folder: str | Path, name: str) -> str:
    """The place of a file in a folder, by the folder's options."""
    path, options = split_options(str(folder))
    return f"{path.rstrip('/')}/{name}{options}"


def hide_keys(path: str | Path) -> str:
    """The path without the secret that somebody wrote into an address, for a message."""
    return re.sub(r"(?<=://)[^/@]*:[^/@]*@", "***@", str(path))


def open_filesystem(path: str | Path) -> tuple[pafs.FileSystem, str]:
    """The file system of a path, and the path within it.

    Raises:
        OSError: When the address has no known scheme or cannot be opened.
    """
    if not is_address(path):
        return pafs.LocalFileSystem(), _resolve(Path(path).expanduser())
    name, options = split_options(str(path))
    scheme, _, inner = name.partition("://")
    if scheme in BUCKETS:
        bucket, _, key = inner.partition("/")
        if ":" in bucket.rpartition("@")[0]:
            raise OSError("keys in an address would end in logs and manifests; set them in the environment")
        filesystem, root = _open_bucket(f"{scheme}://{bucket}{options}")
        return filesystem, f"{root}/{key}".rstrip("/")
    if scheme in (*HADOOP, "file"):
        filesystem, inner = pafs.FileSystem.from_uri(str(path))
        return filesystem, inner
    try:
        return _open_fsspec(scheme), inner
    except (ValueError, ImportError) as error:
        raise OSError(f"no file system for {scheme}:// ({error})") from None


def _resolve(path: Path) -> str:
    """A link to a file keeps its own name: the hub's cache keeps the bytes under names without an ending."""
    full = path.resolve()
    return str(full if full.is_dir() or not path.name else path.parent.resolve() / path.name)


@lru_cache(maxsize=64)
def _open_bucket(address: str) -> tuple[pafs.FileSystem, str]:
    """Opening asks for the bucket's region, a request that is not worth repeating for every file."""
    filesystem, root = pafs.FileSystem.from_uri(address)
    return filesystem, root


@lru_cache(maxsize=8)
def _open_fsspec(scheme: str) -> pafs.FileSystem:
    import fsspec

    return pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem(scheme)))
