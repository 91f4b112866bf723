"""Which pieces of raw text the sources name, in a fixed order.

A *unit* is one piece of input that is read from its beginning to its end: a stretch of a file, or one module of the
documentation on this machine. Plain JSONL and Parquet files are cut into stretches of `UNIT_BYTES`; a line or row group
belongs to the stretch its first byte lies in. Other files are units as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from layerplan.config.corpus import CorpusConfig, SourceConfig
from layerplan.corpus.hub import HUB, list_hub_files
from layerplan.corpus.layout import Layout, choose_files
from layerplan.corpus.location import COMPRESSIONS, FileEntry, is_compressed, list_files
from layerplan.corpus.machine_docs import is_machine_source, iter_machine_units
from layerplan.corpus.readers import Document, is_apart, read_unit
from layerplan.corpus.unit import Unit
from layerplan.errors import CorpusError
from layerplan.storage.address import hide_keys, split_options

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
}
MACHINE = "machine"
UNIT_BYTES = 8 * 2**20
MACHINE_UNIT_BYTES = 16 * 2**10
"""Assumed size of a module's documentation, for progress and for grouping."""


def list_units(
    config: CorpusConfig, *, unit_bytes: int | None = None, report: Callable[[str], None] | None = None
) -> list[Unit]:
    """Lists what the sources name, in a fixed order, cut into stretches of `unit_bytes` or `UNIT_BYTES`.

    Args:
        config: The sources.
        unit_bytes: Bytes of a stretch.
        report: Receives one line for each source that has files which are not read.

    Raises:
        CorpusError: When a source does not exist, cannot be reached or holds no readable file.
    """
    units: list[Unit] = []
    for index, source in enumerate(config.sources):
        try:
            found, note = _list_source(index, source, unit_bytes or UNIT_BYTES)
        except CorpusError as error:
            raise CorpusError(f"corpus.sources.{index}.path={error}") from None
        if note is not None and report is not None:
            report(f"corpus.sources.{index}.path={hide_keys(source.path)}: {note}")
        if not found:
            raise CorpusError(
                f"corpus.sources.{index}.path={source.path}: no readable file;"
                f" expected {', '.join(sorted(FORMATS))}, plain or with {', '.join(COMPRESSIONS)}"
            )
        units += found
    return units


def iter_documents(config: CorpusConfig) -> Iterator[Document]:
    """Yields every readable document in order, in plain Python and bounded memory."""
    taken = [0] * len(config.sources)
    for unit in list_units(config):
        source = config.sources[unit.source]
        if source.max_documents is not None and taken[unit.source] >= source.max_documents:
            continue
        for item in read_unit(unit, source):
            if isinstance(item, Document):
                taken[unit.source] += 1
                yield item
            if source.max_documents is not None and taken[unit.source] >= source.max_documents:
                break


def _list_source(index: int, source: SourceConfig, unit_bytes: int) -> tuple[list[Unit], str | None]:
    """A source's units, and a line about the files that are not among them."""
    if is_machine_source(source.path):
        return [Unit(index, name, MACHINE, 0, MACHINE_UNIT_BYTES) for name in iter_machine_units(source.path)], None
    layout = _lay_out(source)
    units = [
        unit
        for file in layout.files
        if (format_name := _find_format(source, file)) is not None
        for unit in _cut(index, file, format_name, unit_bytes)
    ]
    return units, layout.explain()


def _lay_out(source: SourceConfig) -> Layout:
    if source.path.startswith(HUB):
        return Layout(list_hub_files(source))
    files = list_files(source.path)
    return choose_files(source, files, [_find_format(source, file) for file in files])


def _find_format(source: SourceConfig, file: FileEntry) -> str | None:
    return source.format if source.format != "auto" else _guess_format(file.path)


def _cut(index: int, file: FileEntry, format_name: str, unit_bytes: int) -> Iterator[Unit]:
    is_whole = format_name not in ("jsonl", "parquet") or is_compressed(file.path)
    if is_whole or (format_name == "jsonl" and file.size > unit_bytes and is_apart(file.path)):
        yield Unit(index, file.path, format_name, 0, file.size)
        return
    for start in range(0, max(file.size, 1), unit_bytes):
        yield Unit(index, file.path, format_name, start, min(start + unit_bytes, file.size))


def _guess_format(path: str) -> str | None:
    name = split_options(path)[0].lower()
    for ending in COMPRESSIONS:
        name = name.removesuffix(ending)
    return FORMATS.get(Path(name).suffix)
