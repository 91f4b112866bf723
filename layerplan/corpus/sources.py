"""Raw documents: which files a source names, and how each is read without ever holding the whole of it.

A *unit* is one piece of input that is read from its beginning to its end: a file, or one module of the documentation
on this machine. Units are listed in sorted order, so a corpus is the same on every run.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from layerplan.config.corpus import CorpusConfig, SourceConfig
from layerplan.corpus.machine_docs import ALL_MACHINE_DOCS, iter_machine_units, read_machine_unit
from layerplan.errors import CorpusError

FORMATS = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
}
COMPRESSIONS = (".gz", ".zst")


@dataclass(frozen=True)
class Document:
    """One raw document."""

    id: str
    text: str
    score: float | None
    source: str


@dataclass(frozen=True)
class Malformed:
    """A piece of input that could not be read, and why; it costs itself and nothing else."""

    where: str
    reason: str


@dataclass(frozen=True)
class Unit:
    """One file or module to read."""

    source: int
    path: str
    format: str


def list_units(config: CorpusConfig) -> list[Unit]:
    """Lists what the sources name, in a fixed order.

    Raises:
        CorpusError: When a source does not exist or holds no readable file.
    """
    units: list[Unit] = []
    for index, source in enumerate(config.sources):
        found = list(_list_source(index, source))
        if not found:
            raise CorpusError(
                f"corpus.sources.{index}.path={source.path}: no readable file;"
                f" expected {', '.join(sorted(FORMATS))}, plain or with {', '.join(COMPRESSIONS)}"
            )
        units += found
    return units


def read_unit(unit: Unit, source: SourceConfig) -> Iterator[Document | Malformed]:
    """Reads one unit; malformed lines and files come out as `Malformed`, never as an exception."""
    if unit.format == "machine":
        yield from (Document(name, text, None, source.path) for name, text in read_machine_unit(unit.path))
        return
    try:
        yield from _READERS[unit.format](unit, source)
    except (OSError, EOFError, UnicodeDecodeError, pa.ArrowException, ValueError) as error:
        yield Malformed(unit.path, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def iter_documents(config: CorpusConfig) -> Iterator[Document]:
    """Yields every readable document in order, in plain Python and bounded memory."""
    taken = [0] * len(config.sources)
    for unit in list_units(config):
        source = config.sources[unit.source]
        for item in read_unit(unit, source):
            if source.max_documents is not None and taken[unit.source] >= source.max_documents:
                break
            if isinstance(item, Document):
                taken[unit.source] += 1
                yield item


def _list_source(index: int, source: SourceConfig) -> Iterator[Unit]:
    if source.path in ALL_MACHINE_DOCS:
        yield from (Unit(index, name, "machine") for name in iter_machine_units(source.path))
        return
    filesystem, root = _open_filesystem(index, source.path)
    info = filesystem.get_file_info(root)
    if info.type == pafs.FileType.NotFound:
        raise CorpusError(f"corpus.sources.{index}.path={source.path}: no such file or folder")
    if info.type == pafs.FileType.File:
        infos = [info]
    else:
        infos = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    prefix = source.path.partition("://")[0] + "://" if "://" in source.path else ""
    for item in sorted(infos, key=lambda item: item.path):
        format_name = source.format if source.format != "auto" else _guess_format(item.path)
        if item.type == pafs.FileType.File and format_name is not None:
            yield Unit(index, prefix + item.path, format_name)


def _guess_format(path: str) -> str | None:
    name = path
    for ending in COMPRESSIONS:
        name = name.removesuffix(ending)
    return FORMATS.get(Path(name).suffix.lower())


def _open_filesystem(index: int, path: str) -> tuple[Any, str]:
    try:
        if "://" in path:
            return pafs.FileSystem.from_uri(path)
        return pafs.LocalFileSystem(), str(Path(path).expanduser().resolve())
    except (pa.ArrowException, ValueError, OSError) as error:
        raise CorpusError(f"corpus.sources.{index}.path={path}: cannot be opened ({error})") from None


def _open_stream(path: str) -> IO[bytes]:
    filesystem, inner = _open_filesystem(0, path)
    raw: IO[bytes] = filesystem.open_input_stream(inner, compression=None)
    if path.endswith(".gz"):
        return gzip.open(raw)  # type: ignore[return-value]
    if path.endswith(".zst"):
        import zstandard

        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw))
    return io.BufferedReader(raw)  # type: ignore[type-var]


def _read_jsonl(unit: Unit, source: SourceConfig) -> Iterator[Document | Malformed]:
    with _open_stream(unit.path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield _parse_line(line, f"{unit.path}:{number}", source)


def _parse_line(line: bytes, where: str, source: SourceConfig) -> Document | Malformed:
    try:
        record = json.loads(line.decode("utf-8"))
    except ValueError as error:
        return Malformed(where, f"{type(error).__name__}: {str(error)[:200]}")
    if not isinstance(record, dict):
        return Malformed(where, f"a JSON object is expected, got {type(record).__name__}")
    return _make_document(record, where, source)


def _make_document(record: dict[str, Any], where: str, source: SourceConfig) -> Document | Malformed:
    text = record.get(source.text_column)
    if not isinstance(text, str):
        return Malformed(where, f"column {source.text_column!r} is {'missing' if text is None else 'not a string'}")
    score = record.get(source.score_column) if source.score_column else None
    if score is not None and not isinstance(score, int | float):
        return Malformed(where, f"column {source.score_column!r} is {score!r}, a number is expected")
    identifier = record.get(source.id_column)
    return Document(where if identifier is None else str(identifier), text, score, source.path)


def _read_parquet(unit: Unit, source: SourceConfig) -> Iterator[Document | Malformed]:
    filesystem, inner = _open_filesystem(0, unit.path)
    with pq.ParquetFile(inner, filesystem=filesystem) as table:
        names = set(table.schema_arrow.names)
        if source.text_column not in names:
            yield Malformed(unit.path, f"column {source.text_column!r} is missing; it has {', '.join(sorted(names))}")
            return
        wanted = [name for name in (source.id_column, source.text_column, source.score_column) if name in names]
        yield from _from_batches(table.iter_batches(batch_size=256, columns=wanted), unit, source)


def _read_arrow(unit: Unit, source: SourceConfig) -> Iterator[Document | Malformed]:
    with _open_stream(unit.path) as stream:
        yield from _from_batches(pa.ipc.open_stream(stream), unit, source)


def _from_batches(batches: Any, unit: Unit, source: SourceConfig) -> Iterator[Document | Malformed]:
    number = 0
    for batch in batches:
        for record in batch.to_pylist():
            yield _make_document(record, f"{unit.path}:{number}", source)
            number += 1


def _read_text(unit: Unit, source: SourceConfig) -> Iterator[Document | Malformed]:
    with _open_stream(unit.path) as stream:
        yield Document(unit.path, stream.read().decode("utf-8"), None, source.path)


_READERS = {"jsonl": _read_jsonl, "parquet": _read_parquet, "arrow": _read_arrow, "text": _read_text}
