"""How text, JSON and sealed artifacts are written, hashed and read; each is written aside (`layerplan/aside.py`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from layerplan.aside import writing_aside
from layerplan.config.base import StrictModel, describe_fault
from layerplan.errors import PlanError

HASHED_TOGETHER = 4096
"""Values of a list that are encoded at a time."""
SealedT = TypeVar("SealedT", bound=StrictModel)


def write_text(path: Path, text: str) -> None:
    """Writes a whole UTF-8 file aside and moves it into place."""
    with writing_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Writes a value as indented JSON, aside and moved into place."""
    write_text(path, render_json(value))


def render_json(value: object) -> str:
    """A value as the JSON that artifacts are written in: indented, text as it reads, a line feed at the end."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_lines(path: Path, values: Iterable[object]) -> None:
    """Writes one line of JSON per value, aside and moved into place."""
    write_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def read_every_line(path: Path) -> list[dict[str, Any]]:
    """The objects of a finished file of JSON lines.

    Lines end at a line feed and nowhere else: a model may write U+2028, at which `splitlines` would cut.

    Raises:
        OSError: When the file cannot be read.
        ValueError: When a line is no JSON.
    """
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines that grows: none when it is not there, and no line that a kill cut short."""
    return parse_lines(path.read_bytes()) if path.exists() else []


def parse_lines(content: bytes) -> list[dict[str, Any]]:
    """The lines that are JSON objects; what a killed writer left of one is none."""
    lines = []
    for line in content.split(b"\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            lines.append(value)
    return lines


def hash_bytes(content: bytes | memoryview) -> str:
    """Sha256, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def hash_file(path: Path) -> str:
    """Sha256 over the file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def hash_files(paths: Iterable[Path]) -> str:
    """Sha256 over the names and bytes of files, in the given order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        with path.open("rb") as handle:
            hashlib.file_digest(handle, lambda: digest)
    return digest.hexdigest()


def compute_sha256(value: Any) -> str:
    """Sha256 over a value's canonical JSON (sorted keys, no spaces, UTF-8): equal values, equal hashes on every machine."""
    return hash_bytes(_encode_canonical(value))


def compute_list_sha256(values: Iterable[Any]) -> str:
    """What `compute_sha256` gives for the list of the values, of which only some are held at a time."""
    digest, rest, comma = hashlib.sha256(b"["), iter(values), b""
    while batch := list(islice(rest, HASHED_TOGETHER)):
        digest.update(comma + _encode_canonical(batch)[1:-1])
        comma = b","
    digest.update(b"]")
    return digest.hexdigest()


def _encode_canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def write_sealed(path: Path, value: StrictModel) -> None:
    """Writes an artifact that carries its own hash as JSON."""
    write_text(path, value.model_dump_json(indent=2) + "\n")


def read_sealed(path: Path, cls: type[SealedT]) -> SealedT:
    """Reads a sealed artifact and checks its hash; raises `PlanError` naming the file.

    The hash is over the file as it stands, so that an artifact keeps it when later layouts add fields.
    """
    try:
        text = path.read_text(encoding="utf-8")
        value = cls.model_validate_json(text)
    except OSError as error:
        raise PlanError(f"{path}: cannot be read ({error})") from None
    except ValidationError as error:
        raise PlanError(f"{path}: not a valid {cls.__name__} ({describe_fault(error)})") from None
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path}: not a valid {cls.__name__} ({' '.join(str(error).split())[:200]})") from None
    content = json.loads(text)
    content.pop("sha256", None)
    expected = compute_sha256(content)
    if getattr(value, "sha256", None) != expected:
        raise PlanError(
            f"{path}: its sha256 field is {getattr(value, 'sha256', None)!r} but the content hashes to {expected!r};"
            " the file was changed after it was made"
        )
    return value
