"""The working folder of a run that is stored at an address: a local folder whose path says which address it stands for.

Stages read and write local files. A working folder lies at `<base>/layerplan_mirrors/<scheme>/<bucket>/<key>`, so that any
process on any node knows from a path alone where the file is kept, and no key, client or setting travels with it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from layerplan.errors import ConfigError

if TYPE_CHECKING:
    from layerplan.storage.paths import StoredPath

MIRRORS_NAME = "layerplan_mirrors"
SERVED = ("s3", "gs", "gcs")
"""Schemes a run can be stored at."""


def is_remote(storage_path: str) -> bool:
    """Whether a `storage_path` is an address and no local folder."""
    return "://" in storage_path


def find_working_folder(address: str, base: str | None) -> Path:
    """The local folder in which a run at this address works.

    Args:
        address: `s3://bucket/folder`, with or without a slash at its end.
        base: Local folder for it; None takes one of this user's in the temporary folder.

    Raises:
        ConfigError: When the address cannot hold a run.
    """
    scheme, _, rest = address.partition("://")
    _check(address, scheme, rest.rstrip("/"))
    root = Path(base).expanduser() if base is not None else Path(tempfile.gettempdir()) / f"layerplan-{os.getuid()}"
    return root.resolve() / MIRRORS_NAME / scheme / PurePosixPath(rest.rstrip("/"))


def find_home(path: Path) -> StoredPath:
    """Where a file of a run is kept: the path itself, or the address its working folder stands for."""
    parts = path.parts
    if MIRRORS_NAME not in parts:
        return path
    from layerplan.storage.paths import BucketPath

    last = len(parts) - 1 - parts[::-1].index(MIRRORS_NAME)
    scheme, *rest = parts[last + 1 :]
    return BucketPath(f"{scheme}://{'/'.join(rest)}")


def make_private(folder: Path) -> None:
    """Makes a working folder that only this user can enter.

    Raises:
        ConfigError: When it cannot be made, or belongs to somebody else.
    """
    base = next(parent for parent in folder.parents if parent.name == MIRRORS_NAME)
    try:
        base.mkdir(parents=True, exist_ok=True)
        base.chmod(0o700)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"working_path: {folder} cannot be used ({error}); set it to a folder of yours") from None


def _check(address: str, scheme: str, rest: str) -> None:
    bucket = rest.partition("/")[0]
    if scheme not in SERVED:
        served = ", ".join(f"{each}://" for each in SERVED)
        raise ConfigError(
            f"storage_path={_hide(address)}: {scheme}:// is not served; a local or shared folder is, and {served}"
        )
    if ":" in bucket.rpartition("@")[0]:
        raise ConfigError(
            f"storage_path={_hide(address)}: keys in an address would end in logs; set them in the environment"
        )
    if "?" in rest:
        raise ConfigError(
            f"storage_path={_hide(address)}: takes no options; set the server in the environment (AWS_ENDPOINT_URL,"
            " CLOUD_STORAGE_EMULATOR_ENDPOINT)"
        )
    if not bucket or any(part in ("", ".", "..", MIRRORS_NAME) for part in rest.split("/")):
        raise ConfigError(
            f"storage_path={_hide(address)}: {scheme}://bucket or {scheme}://bucket/folder is expected, without empty"
            f" parts, `.`, `..` and {MIRRORS_NAME}"
        )


def _hide(address: str) -> str:
    from layerplan.storage.address import hide_keys

    return hide_keys(address)
