"""Files as people bring them: what `datasets` saved, what the hub's cache holds, and text that is no valid Unicode."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from layerplan.config.corpus import CorpusConfig, SourceConfig
from layerplan.corpus.build import build_token_store
from layerplan.corpus.location import list_files
from layerplan.corpus.on_the_fly import list_chunks
from layerplan.corpus.readers import Document, Malformed, read_unit
from layerplan.corpus.sources import list_units
from layerplan.errors import CorpusError
from tests.tiny_corpus import make_byte_tokenizer, make_text, write_jsonl

CARD = "---\nlicense: mit\nsize_categories:\n- n<1K\n---\n# Thirty texts\n"
RECORDS = [{"id": str(number), "text": f"text {number}"} for number in range(30)]


def make_config(path: Path | str, **options: Any) -> CorpusConfig:
    return CorpusConfig(sources=[SourceConfig(path=str(path), **options)], seq_len=64, rows_per_group=4)


def read_all(path: Path | str, **options: Any) -> list[Document | Malformed]:
    config = make_config(path, **options)
    return [item for unit in list_units(config) for item in read_unit(unit, config.sources[unit.source])]


def read_ids(path: Path | str, **options: Any) -> list[str]:
    found = read_all(path, **options)
    assert all(isinstance(item, Document) for item in found), found
    return [item.id for item in found if isinstance(item, Document)]


def tell(path: Path | str, **options: Any) -> list[str]:
    said: list[str] = []
    list_units(make_config(path, **options), report=said.append)
    return said


def save(folder: Path, records: Iterable[dict[str, str]] = RECORDS, **options: Any) -> Path:
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(list(records)).save_to_disk(folder, **options)
    return folder


def test_a_saved_data_set_is_its_documents_in_the_order_its_state_names(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", num_shards=3)
    assert read_ids(folder) == [str(number) for number in range(30)]
    [line] = tell(folder)
    assert line.endswith("reads 3 files; not read: 2 that describe the data (dataset_info.json, state.json)")
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"].reverse()
    (folder / "state.json").write_text(json.dumps(state))
    loaded = datasets.load_from_disk(str(folder))
    assert read_ids(folder) == loaded["id"][:] != [str(number) for number in range(30)]


def test_a_saved_data_set_at_an_address_is_read_too(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", num_shards=2)
    for path in folder.iterdir():
        fsspec.filesystem("memory").pipe(f"/saved_set/{path.name}", path.read_bytes())
    assert read_ids("memory://saved_set") == read_ids(f"file://{folder}") == [str(number) for number in range(30)]


def test_the_arrow_files_of_a_saved_data_set_can_be_named_themselves(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", num_shards=3)
    assert read_ids(folder / "data-00001-of-00003.arrow") == [str(number) for number in range(10, 20)]


def test_of_saved_splits_the_wanted_one_is_read(tmp_path: Path) -> None:
    train, test = (datasets.Dataset.from_list(part) for part in (RECORDS[:20], RECORDS[20:]))
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "saved")
    assert read_ids(tmp_path / "saved") == [str(number) for number in range(20)]
    assert read_ids(f"hub://{tmp_path / 'saved'}", split="test") == [str(number) for number in range(20, 30)]
    assert "3 of other splits (" in tell(tmp_path / "saved")[0]
    with pytest.raises(CorpusError, match=r"has no split 'dev'; set the source's split to one of train, test"):
        read_all(tmp_path / "saved", split="dev")


def test_a_saved_data_set_that_lacks_a_file_is_refused_by_the_files_name(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", num_shards=3)
    (folder / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(CorpusError, match=r"state\.json: names data-00001-of-00003\.arrow, which is not there"):
        read_all(folder)


def test_the_cache_of_the_hub_is_read_by_the_names_of_its_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "x"
    blobs.mkdir()
    (snapshot / "data").mkdir(parents=True)
    write_jsonl(blobs / "0a1b2c", {"id": "a", "text": "x"})
    (blobs / "3d4e5f").write_bytes(gzip.compress(b'{"id": "b", "text": "y"}\n'))
    (snapshot / "train.jsonl").symlink_to("../../blobs/0a1b2c")
    (snapshot / "data" / "more.jsonl.gz").symlink_to("../../../blobs/3d4e5f")
    assert read_ids(snapshot / "train.jsonl") == ["a"]
    assert read_ids(snapshot) == ["b", "a"]
    (blobs / "0a1b2c").unlink()
    with pytest.raises(CorpusError, match=r"train\.jsonl: is a link to \.\./\.\./blobs/0a1b2c, which is not there"):
        read_all(snapshot)


@pytest.mark.parametrize("name", ["a.JSONL", "a.jsonl.GZ", "a.Json.Gz", "a.NDJSON.ZST", "a.Parquet", "a.ARROW"])
def test_an_ending_counts_in_any_case(tmp_path: Path, name: str) -> None:
    content, ending = b'{"id": "a", "text": "x"}\n', name.lower().rpartition(".")[2]
    table = pa.table({"id": ["a"], "text": ["x"]})
    if ending == "parquet":
        pq.write_table(table, tmp_path / name)
    elif ending == "arrow":
        with pa.ipc.new_stream(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    else:
        compress = {"gz": gzip.compress, "zst": zstandard.compress}.get(ending, bytes)
        (tmp_path / name).write_bytes(compress(content))
    assert read_ids(tmp_path) == ["a"]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.json.zst"])
def test_an_array_is_read_record_by_record(tmp_path: Path, name: str, indent: int | None) -> None:
    records = [{"id": str(number), "text": "é[,]{" * number} for number in range(300)]
    content = json.dumps(records, indent=indent, ensure_ascii=False).encode()
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(compress(content))  # type: ignore[operator]
    assert [item.text for item in read_all(tmp_path) if isinstance(item, Document)] == [r["text"] for r in records]


def test_an_array_is_one_stretch_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"id": str(number), "text": "é" * number} for number in range(300)]
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1, ensure_ascii=False))
    for size in (1, 7, 1000):
        monkeypatch.setattr("layerplan.corpus.json_values.PIECE_BYTES", size)
        monkeypatch.setattr("layerplan.corpus.sources.UNIT_BYTES", size)
        assert read_ids(tmp_path) == [record["id"] for record in records], size
    monkeypatch.setattr("layerplan.corpus.on_the_fly.MAX_WHOLE_BYTES", 1000)
    monkeypatch.setattr("layerplan.corpus.on_the_fly.MIN_CHUNK_BYTES", 100)
    with pytest.raises(CorpusError, match="can only be read as a whole"):
        list_chunks(make_config(tmp_path))


def test_objects_over_several_lines_are_read_and_one_value_a_line_as_before(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("\n".join(json.dumps(record, indent=2) for record in RECORDS))
    (tmp_path / "b.json").write_text('{"id": "x", "text": "y"}\n{"broken\n{"id": "z", "text": "y"}\n')
    found = read_all(tmp_path)
    assert [item.id if isinstance(item, Document) else "bad" for item in found[-4:]] == ["29", "x", "bad", "z"]
    assert len(found) == 33


@pytest.mark.parametrize(
    ("content", "ids", "reason", "lost"),
    [
        (b'[{"id": "a", "text": "x"},\n {"id": "b", "te', ["a"], "Unterminated string", 15),
        (b'[{"id": "a", "text": "x"},\n', ["a"], "the array is not closed", 0),
        (b'[{"id": "a", "text": "x"}, oops, {"id": "c", "text": "x"}]', ["a"], "Expecting value", 31),
        (b'[{"id": "a", "text": "\xff"}, 7, {"id": "c", "text": "x"}]', ["c"], "surrogates not allowed", 0),
    ],
)
def test_a_broken_array_keeps_what_came_before(
    tmp_path: Path, content: bytes, ids: list[str], reason: str, lost: int
) -> None:
    (tmp_path / "a.json").write_bytes(content)
    found = read_all(tmp_path)
    assert [item.id for item in found if isinstance(item, Document)] == ids
    bad = [item for item in found if isinstance(item, Malformed)]
    assert reason in bad[0].reason and bad[0].lost_bytes == lost


def test_what_describes_a_data_set_is_no_document(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", *RECORDS)
    (tmp_path / "README.md").write_text("# About it")
    (tmp_path / "LICENSE.txt").write_text("MIT")
    (tmp_path / "LICENSE").write_text("MIT")
    (tmp_path / "dataset_infos.json").write_text('{"default": {}}')
    (tmp_path / ".gitattributes").write_text("*.jsonl filter=lfs")
    assert read_ids(tmp_path) == [str(number) for number in range(30)]
    [line] = tell(tmp_path)
    assert line.startswith(f"corpus.sources.0.path={tmp_path}: reads 1 files; not read: 4 that describe the data (")
    assert all(name in line for name in ("README.md", "LICENSE.txt", "LICENSE", "dataset_infos.json"))
    assert [item.text for item in read_all(tmp_path / "README.md") if isinstance(item, Document)] == ["# About it"]


def test_what_is_hidden_and_what_is_no_file_is_told(tmp_path: Path) -> None:
    """A hidden folder is not walked, and counts for one."""
    write_jsonl(tmp_path / "train.jsonl", *RECORDS)
    for name in (".x.jsonl", "sub/_SUCCESS", ".git/a", ".git/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("hidden")
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert tell(tmp_path)[0].endswith(
        ": reads 1 files; not read: 3 hidden (.git/, .x.jsonl, sub/_SUCCESS); 1 that are no regular files (pipe.jsonl)"
    )
    (tmp_path / "pipe.jsonl").unlink()
    for number in range(4):
        (tmp_path / f"_{number}").touch()
    assert tell(tmp_path)[0].endswith("not read: 7 hidden (.git/, .x.jsonl, _0, _1, _2 and 2 more)")


def test_hidden_files_at_an_address_are_told_each(tmp_path: Path) -> None:
    """All is one listing there."""
    memory = fsspec.filesystem("memory")
    for name in ("train.jsonl", ".git/a", ".git/b", "sub/_x.jsonl"):
        memory.pipe(f"/{tmp_path.name}/{name}", b'{"id": "0", "text": "a"}\n')
    [line] = tell(f"memory://{tmp_path.name}")
    assert line.endswith(": reads 1 files; not read: 3 hidden (.git/a, .git/b, sub/_x.jsonl)")


def test_records_are_documents_though_they_are_called_as_what_describes_a_data_set(tmp_path: Path) -> None:
    for name in ("authors.jsonl", "books.jsonl", "License-texts.NDJSON", "notice.2020.jsonl.gz"):
        content = json.dumps({"id": name, "text": name}).encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    pq.write_table(pa.table({"id": ["changelog"], "text": ["x"]}), tmp_path / "changelog.parquet")
    (tmp_path / "LICENSE.json").write_text('{"id": "no document", "text": "MIT"}')
    names = ["License-texts.NDJSON", "authors.jsonl", "books.jsonl", "changelog", "notice.2020.jsonl.gz"]
    assert read_ids(tmp_path) == names
    assert tell(tmp_path)[0].endswith("reads 5 files; not read: 1 that describe the data (LICENSE.json)")


def test_texts_of_ones_own_are_documents_whatever_they_are_called(tmp_path: Path) -> None:
    for name in ("README.md", "LICENSE.txt", "guide.md", "chapters/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "package.json").write_text('{"id": "package", "text": "data beside texts"}')
    (tmp_path / "photo.png").write_bytes(b"png")
    texts = {item.text for item in read_all(tmp_path) if isinstance(item, Document)}
    assert texts == {"README.md", "LICENSE.txt", "guide.md", "chapters/README.md", "data beside texts"}
    assert tell(tmp_path)[0].endswith("reads 5 files; not read: 1 of no known format (photo.png)")
    (tmp_path / "README.md").write_text("---\ntitle: Home\ntags: [a]\n---\ntext")
    assert len(read_all(tmp_path)) == 5


def test_a_card_makes_a_folder_of_texts_a_data_set(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "LICENSE.md"):
        (tmp_path / name).write_text(name)
    (tmp_path / "README.md").write_text(CARD)
    assert [item.text for item in read_all(tmp_path) if isinstance(item, Document)] == ["a.txt", "b.txt"]
    assert len(read_all(tmp_path, format="text")) == 4


ODD_IDS = ["half \ud800 pair", "nul \0 in it", "\udfff", "line\nbreak"]
ESCAPED = ["half \\ud800 pair", "nul \\x00 in it", "\\udfff", "line\\nbreak"]


def test_an_id_that_is_no_text_is_escaped_and_its_document_kept(tmp_path: Path) -> None:
    write_lines = "".join(json.dumps({"id": name, "text": "x"}) + "\n" for name in ODD_IDS)
    (tmp_path / "a.jsonl").write_text(write_lines)
    assert read_ids(tmp_path) == ESCAPED
    ids = pa.array([name.encode("utf-8", "surrogatepass") for name in ODD_IDS], pa.binary())
    pq.write_table(pa.table({"id": ids, "text": ["x"] * 4}), tmp_path / "b.parquet")
    assert read_ids(tmp_path / "b.parquet")[1:4:2] == [ESCAPED[1], ESCAPED[3]]
    assert read_ids(tmp_path / "b.parquet")[0] == "half \\xed\\xa0\\x80 pair"


def test_half_a_pair_anywhere_costs_at_most_its_own_line(tmp_path: Path) -> None:
    """One line of 300 for each field, through a whole build whose counts add up."""
    records: list[dict[str, Any]] = [{"id": str(n), "text": make_text(n), "score": 1.0} for n in range(300)]
    records[7]["id"] = "\ud800"
    records[8]["text"] += "\udc00"
    records[9]["score"] = "\ud800"
    records[10]["\ud800"] = "\udfff"
    records[11]["id"] = ["\ud800"]
    raw = tmp_path / "raw.jsonl"
    raw.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = make_config(raw, score_column="score")
    store = tmp_path / "store"
    manifest = build_token_store(config, make_byte_tokenizer(tmp_path), store, report=lambda line: None)
    assert manifest.counts == {"in": 300, "kept": 298, "quarantined": 2}
    listed = [json.loads(line) for line in (store / "quarantine.jsonl").read_text().splitlines()]
    assert len(listed) == 2 and "surrogates not allowed" in str(listed[0]) and "a number is expected" in str(listed[1])


def test_views_of_text_are_read_as_text_and_a_bad_one_costs_itself(tmp_path: Path) -> None:
    """As Polars writes strings and categories to Arrow files."""
    values = [b"good", b"\xff is the first byte of no character", b"\xe7\x9a\x84"]
    views = pa.Array.from_buffers(pa.string_view(), 3, pa.array(values, pa.binary_view()).buffers())
    columns = {"text": views, "id": pa.DictionaryArray.from_arrays([0, 2, 2], views)}
    table = pa.Table.from_arrays(list(columns.values()), names=list(columns))
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    good, bad, last = read_all(tmp_path)
    assert isinstance(good, Document) and (good.id, good.text) == ("good", "good")
    assert isinstance(bad, Malformed) and "invalid start byte" in bad.reason
    assert isinstance(last, Document) and (last.id, last.text) == ("的", "的")


def test_a_path_that_is_a_link_to_a_folder_is_that_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    write_jsonl(tmp_path / "real" / "a.jsonl", *RECORDS)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert [unit.path for unit in list_units(make_config(tmp_path / "link"))] == [str(tmp_path / "real" / "a.jsonl")]


def test_a_pattern_is_told_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"\*\.jsonl: no such file or folder; patterns are not read, name the folder"):
        list_files(str(tmp_path / "*.jsonl"))
