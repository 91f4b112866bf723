"""Message catalogues of installed packages as a source of text in another language."""

from __future__ import annotations

import importlib.metadata
import struct
from pathlib import Path

import pytest

from layerplan.config.corpus import CorpusConfig, SourceConfig
from layerplan.corpus.catalogues import ENTRIES_PER_DOCUMENT, read_entries
from layerplan.corpus.sources import iter_documents
from layerplan.errors import CorpusError


def write_catalogue(path: Path, entries: dict[str, str]) -> Path:
    """A `.mo` file, as GNU gettext lays it out."""
    pairs = sorted((key.encode(), value.encode()) for key, value in entries.items())
    keys_at, values_at = 28, 28 + 8 * len(pairs)
    offset, tables, data = values_at + 8 * len(pairs), [b"", b""], b""
    for column in (0, 1):
        for pair in pairs:
            tables[column] += struct.pack("<II", len(pair[column]), offset + len(data))
            data += pair[column] + b"\0"
    header = struct.pack("<7I", 0x950412DE, 0, len(pairs), keys_at, values_at, 0, offset)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + tables[0] + tables[1] + data)
    return path


def test_entries_are_translated_messages(tmp_path: Path) -> None:
    header = "Content-Type: text/plain; charset=UTF-8\n"
    path = write_catalogue(tmp_path / "one.mo", {"": header, "Ghana": "加纳", "Chad": "Chad"})
    assert list(read_entries(path)) == [("Ghana", "加纳")]
    path.write_bytes(b"no catalogue")
    assert list(read_entries(path)) == []


def test_documents_hold_every_entry_of_every_package_once_in_a_mixed_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = {"": "Content-Type: text/plain; charset=UTF-8\n"}
    names = {f"place {number:02d}": f"地方 {number:02d}" for number in range(60)}
    write_catalogue(tmp_path / "places" / "locales" / "zh_CN" / "LC_MESSAGES" / "places.mo", header | names)
    info = tmp_path / "places-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: places\nVersion: 1.0\n")
    (info / "RECORD").write_text("places/locales/zh_CN/LC_MESSAGES/places.mo,,\n")
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert [each.metadata["Name"] for each in importlib.metadata.distributions()] == ["places"]
    config = CorpusConfig(sources=[SourceConfig(path="machine://catalogues/zh_CN")])
    documents = list(iter_documents(config))
    lines = [line for document in documents for line in document.text.split("\n")]
    assert [len(document.text.split("\n")) for document in documents] == [24, 24, 12] and ENTRIES_PER_DOCUMENT == 24
    assert sorted(lines) == [f"{name}: {names[name]}" for name in sorted(names)] != lines
    assert lines == [line for document in iter_documents(config) for line in document.text.split("\n")]
    with pytest.raises(CorpusError, match="no installed package has message catalogues for 'xx'"):
        list(iter_documents(CorpusConfig(sources=[SourceConfig(path="machine://catalogues/xx")])))
