"""Which pieces of raw text the sources name, in a fixed order.

A *unit* is one piece of input that is read from its beginning to its end: a stretch of a file, or one module of the
documentation on this machine. Plain JSONL and Parquet files are cut into stretches of `UNIT_BYTES`; a line or row group
belongs to the stretch its first byte lies in. Other files are units as a whole.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from layerplan.config.corpus import CorpusConfig, SourceConfig
from layerplan.corpus.file_table import FileTable
from layerplan.corpus.hub import HUB, explain_partial, list_hub_files
from layerplan.corpus.layout import Layout, choose_files
from layerplan.corpus.location import COMPRESSIONS, is_compressed, list_files
from layerplan.corpus.machine_docs import is_machine_source, iter_machine_units
from layerplan.corpus.readers import Document, is_apart, read_unit
from layerplan.corpus.unit import READERS, SourceUnits, UnitTable
from layerplan.errors import CorpusError
from layerplan.storage.address import hide_keys

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
UNIT_BYTES = 8 * 2**20
MACHINE_UNIT_BYTES = 16 * 2**10
"""Assumed size of a module's documentation, for progress and for grouping."""


SOURCE_FIELD = "corpus.sources.{index}"
"""Where a config names a source, for messages."""


def list_units(
    config: CorpusConfig,
    *,
    unit_bytes: int | None = None,
    report: Callable[[str], None] | None = None,
    field: str = SOURCE_FIELD,
) -> UnitTable:
    """Lists what the sources name, in a fixed order, cut into stretches of `unit_bytes` or `UNIT_BYTES`.

    Args:
        config: The sources.
        unit_bytes: Bytes of a stretch.
        report: Receives one line for each source that has files which are not read.
        field: What a message calls a source.

    Raises:
        CorpusError: When a source does not exist, cannot be reached or holds no readable file.
    """
    parts: list[SourceUnits] = []
    for index, source in enumerate(config.sources):
        name = field.format(index=index)
        try:
            found, note = _list_source(index, source, unit_bytes or UNIT_BYTES)
        except CorpusError as error:
            raise CorpusError(f"{name}.path={error}") from None
        if note is not None and report is not None:
            report(f"{name}.path={hide_keys(source.path)}: {note}")
        if not len(found):
            raise CorpusError(
                f"{name}.path={hide_keys(source.path)}: no readable file;"
                f" expected {', '.join(sorted(FORMATS))}, plain or with {', '.join(COMPRESSIONS)}"
            )
        parts.append(found)
    return UnitTable(parts)


def iter_documents(config: CorpusConfig, *, field: str = SOURCE_FIELD) -> Iterator[Document]:
    """Yields every readable document in order, in plain Python and bounded memory; `field` as for `list_units`."""
    taken = [0] * len(config.sources)
    for unit in list_units(config, field=field):
        source = config.sources[unit.source]
        if source.max_documents is not None and taken[unit.source] >= source.max_documents:
            continue
        for item in read_unit(unit, source):
            if isinstance(item, Document):
                taken[unit.source] += 1
                yield item
            if source.max_documents is not None and taken[unit.source] >= source.max_documents:
                break


def _list_source(index: int, source: SourceConfig, unit_bytes: int) -> tuple[SourceUnits, str | None]:
    """A source's units, and a line about the files that are not among them."""
    if is_machine_source(source.path):
        names = FileTable.collect((name, MACHINE_UNIT_BYTES) for name in iter_machine_units(source.path))
        code = READERS.index("machine")
        return _cut(index, names, np.arange(len(names)), np.full(len(names), code, np.int8), unit_bytes), None
    if source.path.startswith(HUB):
        files = list_hub_files(source)
        formats = _find_formats(source, files)
        layout = Layout(files)
        layout.leave_out("of no known format", np.flatnonzero(formats < 0))
        notes = [note for note in (explain_partial(files), layout.explain()) if note is not None]
        return _cut(index, files, layout.order, formats, unit_bytes), "; ".join(notes) or None
    files = list_files(source.path)
    formats = _find_formats(source, files)
    layout = choose_files(source, files, formats)
    order = layout.order[formats[layout.order] >= 0]  # one file that is named by itself may be of no format
    return _cut(index, files, order, formats, unit_bytes), layout.explain()


def _find_formats(source: SourceConfig, files: FileTable) -> NDArray[np.int8]:
    """(n,): the place in `READERS` of each file's reader, below 0 where there is none."""
    if source.format != "auto":
        return np.full(len(files), READERS.index(source.format), np.int8)
    return np.fromiter(map(_guess_format, files.iter_names()), np.int8, len(files))


def _cut(
    index: int, files: FileTable, order: NDArray[np.int64], formats: NDArray[np.int8], unit_bytes: int
) -> SourceUnits:
    """Files in an order; those that can be cut in stretches of `unit_bytes`."""
    sizes, codes = files.sizes[order], formats[order]
    counts = np.ones(len(order), np.int64)
    is_cut = np.isin(codes, [READERS.index("jsonl"), READERS.index("parquet")]) & (sizes > unit_bytes)
    for place in np.flatnonzero(is_cut).tolist():
        path = files.make_path(files.name_at(order[place]))
        is_whole = is_compressed(path) or (READERS[codes[place]] == "jsonl" and is_apart(path))
        counts[place] = 1 if is_whole else -(-sizes[place] // unit_bytes)
    if not is_cut.any():
        return SourceUnits(index, files, order, codes, np.zeros(len(order), np.int64), sizes)
    of_file = np.repeat(np.arange(len(order)), counts)
    starts = (np.arange(len(of_file)) - np.repeat(counts.cumsum() - counts, counts)) * unit_bytes
    ends = sizes[of_file]
    is_last = starts + unit_bytes >= ends
    stops = np.where(is_last | (counts[of_file] == 1), ends, starts + unit_bytes)
    return SourceUnits(index, files, order[of_file], codes[of_file], starts, stops)


def _guess_format(name: str) -> int:
    name = name.lower()
    for ending in COMPRESSIONS:
        name = name.removesuffix(ending)
    format_name = FORMATS.get(posixpath.splitext(name)[1])
    return -1 if format_name is None else READERS.index(format_name)
