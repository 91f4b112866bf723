"""How each format is read: a stretch at a time, one bad line costing one line, never the whole file in memory."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from layerplan.config.corpus import SourceConfig
from layerplan.corpus.json_values import HEAD_BYTES, JsonFault, begins_apart, iter_values
from layerplan.corpus.location import is_compressed, open_file, open_stream
from layerplan.corpus.machine_docs import read_machine_unit
from layerplan.corpus.unit import Unit
from layerplan.storage.address import split_options

MAX_DOCUMENT_BYTES = 256 * 2**20
"""A longer line or text file is not read into memory; it is malformed."""
ROWS_PER_BATCH = 64
BOM = b"\xef\xbb\xbf"
_NO_NAME = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
"""Characters that no list, database or Arrow column takes as part of a name."""


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
    num_documents: int = 1
    """Documents lost with it, as far as the file says."""
    lost_bytes: int = 0
    """Bytes of the file that could not be looked at because of it."""


def read_unit(unit: Unit, source: SourceConfig) -> Iterator[Document | Malformed]:
    """Reads one unit; malformed lines and files come out as `Malformed`, never as an exception."""
    if unit.format == "machine":
        yield from (Document(name, text, None, source.path) for name, text in read_machine_unit(unit.path))
        return
    try:
        yield from _READERS[unit.format](unit, source)
    except EOFError as error:  # a compressed file cut short: all records in it were read, a text has no end
        yield Malformed(unit.path, _explain(error), lost_bytes=unit.num_bytes if unit.format == "text" else 0)
    except Exception as error:  # decompressors and Parquet's decoders raise what they like on damaged bytes
        yield Malformed(unit.path, _explain(error), lost_bytes=unit.num_bytes)


def _explain(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _read_jsonl(unit: Unit, source: SourceConfig) -> Iterator[Document | Malformed]:
    if is_compressed(unit.path):
        with open_stream(unit.path) as stream:
            if _may_be_apart(unit.path) and begins_apart(stream.peek(HEAD_BYTES)):  # type: ignore[attr-defined]
                yield from _read_values(stream, unit, source, num_bytes=unit.num_bytes)
            else:
                yield from _read_lines(stream, unit, source, position=0, stop=None)
        return
    if unit.start == 0 and is_apart(unit.path):
        with open_stream(unit.path) as stream:
            yield from _read_values(stream, unit, source, num_bytes=unit.num_bytes)
        return
    with open_file(unit.path) as raw:
        raw.seek(max(0, unit.start - 1))
        stream = io.BufferedReader(raw, buffer_size=1 << 20)
        position = unit.start
        if unit.start:  # the line that began before the stretch belongs to the stretch before
            position += _skip_line(stream) - 1
        yield from _read_lines(stream, unit, source, position=position, stop=unit.stop)


def is_apart(path: str) -> bool:
    """Whether a plain file holds JSON that is not one value a line, which cannot be cut into stretches."""
    if not _may_be_apart(path):
        return False
    try:
        with open_stream(path) as stream:
            return begins_apart(stream.read(HEAD_BYTES))
    except OSError:  # whoever reads the file says so
        return False


def _may_be_apart(path: str) -> bool:
    name = split_options(path)[0].lower()
    return name.endswith((".json", ".json.gz", ".json.zst"))


def _read_values(
    stream: IO[bytes], unit: Unit, source: SourceConfig, *, num_bytes: int
) -> Iterator[Document | Malformed]:
    number = 0
    try:
        for number, value in enumerate(iter_values(stream, max_bytes=MAX_DOCUMENT_BYTES), start=1):
            yield _parse_record(value, f"{unit.path}:{number}", source)
    except JsonFault as error:
        lost = max(0, num_bytes - error.position) if not is_compressed(unit.path) else 0
        yield Malformed(f"{unit.path}:{number + 1}", f"{error}; nothing after it can be read", lost_bytes=lost)


def _read_lines(
    stream: IO[bytes], unit: Unit, source: SourceConfig, *, position: int, stop: int | None
) -> Iterator[Document | Malformed]:
    number = 0
    while stop is None or position < stop:
        line = stream.readline(MAX_DOCUMENT_BYTES)
        if not line:
            return
        number += 1
        where = f"{unit.path}:{number}" if unit.start == 0 else f"{unit.path}@{position}"
        begun, position = position, position + len(line)
        if len(line) == MAX_DOCUMENT_BYTES and not line.endswith(b"\n"):
            position += _skip_line(stream)
            reason = f"a line of {position - begun:,} bytes; at most {MAX_DOCUMENT_BYTES:,} are read"
            yield Malformed(where, reason, lost_bytes=0 if is_compressed(unit.path) else position - begun)
            continue
        if begun == 0 and line.startswith(BOM):
            line = line[len(BOM) :]
        if line.strip():
            yield _parse_line(line, where, source)


def _skip_line(stream: IO[bytes]) -> int:
    """Passes over the rest of a line in bounded memory; returns its bytes."""
    skipped = 0
    while piece := stream.readline(1 << 20):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def _parse_line(line: bytes, where: str, source: SourceConfig) -> Document | Malformed:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return Malformed(where, _explain(error))
    return _parse_record(record, where, source)


def _parse_record(record: Any, where: str, source: SourceConfig) -> Document | Malformed:
    if not isinstance(record, dict):
        return Malformed(where, f"a JSON object is expected, got {type(record).__name__}")
    if source.text_column not in record:
        names = ", ".join(sorted(map(_make_name, record)))
        return Malformed(where, f"column {source.text_column!r} is missing; it has {names}")
    return _make_document(
        record.get(source.id_column),
        record.get(source.text_column),
        record.get(source.score_column) if source.score_column else None,
        where,
        source,
    )


def _make_document(identifier: Any, text: Any, score: Any, where: str, source: SourceConfig) -> Document | Malformed:
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            return Malformed(where, _explain(error))
    if not isinstance(text, str):
        return Malformed(where, f"column {source.text_column!r} is {'missing' if text is None else 'not a string'}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return Malformed(where, _explain(error))
    if score is not None and not isinstance(score, int | float):
        return Malformed(where, f"column {source.score_column!r} is {score!r}, a number is expected")
    return Document(where if identifier is None else _make_name(identifier), text, score, source.path)


def _make_name(identifier: Any) -> str:
    """The id as a name that can be listed: what is no text stands escaped, so that two ids do not become one."""
    name = identifier.decode("utf-8", "backslashreplace") if isinstance(identifier, bytes) else str(identifier)
    return _NO_NAME.sub(lambda found: found.group().encode("unicode_escape").decode(), name)


def _read_parquet(unit: Unit, source: SourceConfig) -> Iterator[Document | Malformed]:
    with open_file(unit.path) as raw:
        try:
            table = pq.ParquetFile(raw)
        except Exception as error:
            if unit.start == 0:  # the file as a whole is lost; its other stretches say nothing
                yield Malformed(unit.path, _explain(error), lost_bytes=raw.size())
            return
        names = set(table.schema_arrow.names)
        if source.text_column not in names:
            if unit.start == 0:
                reason = f"column {source.text_column!r} is missing; it has {', '.join(sorted(names))}"
                yield Malformed(unit.path, reason, max(1, table.metadata.num_rows), lost_bytes=raw.size())
            return
        first_row = 0
        for group in range(table.num_row_groups):
            num_rows = table.metadata.row_group(group).num_rows
            if unit.start <= _first_byte(table.metadata.row_group(group)) < unit.stop:
                yield from _read_row_group(table, group, first_row, num_rows, unit, source)
            first_row += num_rows


def _first_byte(group: Any) -> int:
    columns = [group.column(index) for index in range(group.num_columns)]
    return min(
        min(column.data_page_offset, column.dictionary_page_offset)
        if column.dictionary_page_offset is not None
        else column.data_page_offset
        for column in columns
    )


def _read_row_group(
    table: pq.ParquetFile, group: int, first_row: int, num_rows: int, unit: Unit, source: SourceConfig
) -> Iterator[Document | Malformed]:
    done = 0
    try:
        wanted = [name for name in _columns(source) if name in table.schema_arrow.names]
        for batch in table.iter_batches(batch_size=ROWS_PER_BATCH, row_groups=[group], columns=wanted):
            yield from _from_batch(batch, first_row + done, unit, source)
            done += len(batch)
    except Exception as error:
        where = f"{unit.path}:{first_row + done}"
        yield Malformed(where, f"row group {group}: {_explain(error)}", num_rows - done)


def _read_arrow(unit: Unit, source: SourceConfig) -> Iterator[Document | Malformed]:
    with open_file(unit.path) as raw:
        is_file = raw.read(6) == b"ARROW1"
        raw.seek(0)
        reader = pa.ipc.open_file(raw) if is_file else pa.ipc.open_stream(raw)
        if source.text_column not in reader.schema.names:
            names = ", ".join(sorted(reader.schema.names))
            reason = f"column {source.text_column!r} is missing; it has {names}"
            yield Malformed(unit.path, reason, lost_bytes=raw.size())
            return
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else iter(reader)
        done = 0
        for batch in batches:
            for start in range(0, len(batch), ROWS_PER_BATCH):
                yield from _from_batch(batch.slice(start, ROWS_PER_BATCH), done + start, unit, source)
            done += len(batch)


def _from_batch(batch: pa.RecordBatch, first: int, unit: Unit, source: SourceConfig) -> Iterator[Document | Malformed]:
    columns = [_list_values(batch, name) for name in _columns(source, every=True)]
    for number, (identifier, text, score) in enumerate(zip(*columns, strict=True), start=first):
        yield _make_document(identifier, text, score, f"{unit.path}:{number}", source)


def _list_values(batch: pa.RecordBatch, name: str | None) -> list[Any]:
    """Values of a column, strings as bytes: Arrow does not check their UTF-8, and one bad value would cost its batch."""
    if name is None or name not in batch.schema.names:
        return [None] * len(batch)
    column = batch.column(batch.schema.names.index(name))
    if pa.types.is_dictionary(column.type):  # values first: views, which Polars writes, cannot be taken by index
        column = pa.DictionaryArray.from_arrays(column.indices, _as_bytes(column.dictionary)).dictionary_decode()
    return list(_as_bytes(column).to_pylist())


def _as_bytes(column: pa.Array) -> pa.Array:
    kind = column.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return column.cast(pa.large_binary()) if is_text else column


def _columns(source: SourceConfig, *, every: bool = False) -> list[str]:
    names = [source.id_column, source.text_column, source.score_column]
    return names if every else [name for name in names if name is not None]  # type: ignore[return-value]


def _read_text(unit: Unit, source: SourceConfig) -> Iterator[Document | Malformed]:
    with open_stream(unit.path) as stream:
        content = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(content) > MAX_DOCUMENT_BYTES:
        reason = f"a text of more than {MAX_DOCUMENT_BYTES:,} bytes is not read"
        yield Malformed(unit.path, reason, lost_bytes=unit.num_bytes)
    elif content:
        found = _make_document(None, content.removeprefix(BOM), None, unit.path, source)
        yield replace(found, lost_bytes=unit.num_bytes) if isinstance(found, Malformed) else found


_READERS = {"jsonl": _read_jsonl, "parquet": _read_parquet, "arrow": _read_arrow, "text": _read_text}
