"""Whole builds in one process: counts add up on damaged input, and an interrupted build ends with the same bytes."""

from __future__ import annotations

import contextlib
import gzip
import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from layerplan.config.corpus import CorpusConfig, SourceConfig
from layerplan.corpus import build, readers, shard_threads, sources
from layerplan.corpus.build import build_token_store
from layerplan.corpus.decontamination import BenchmarkText
from layerplan.corpus.journal import BuildJournal
from layerplan.corpus.manifest import Manifest, Shard
from layerplan.corpus.pack import RawRow
from layerplan.corpus.store import StoreReader, load_validation_rows
from layerplan.errors import CorpusError
from layerplan.run_folder import JOURNAL_NAME
from tests.tiny_corpus import make_byte_tokenizer, make_text, write_jsonl

QUESTION = "下列关于法律推理的表述，能够成立的是哪一项呢？请从四个选项中选择。"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token per byte, so that tokens can be counted by hand."""
    return make_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def make_config(*paths: Path, **fields: Any) -> CorpusConfig:
    values = {"seq_len": 64, "rows_per_group": 4, "groups_per_shard": 4, "validation_rows": 3} | fields
    return CorpusConfig(sources=[SourceConfig(path=str(path)) for path in paths], **values)


def read_store(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(store.iterdir())}


def check_sums(manifest: Manifest, store: Path) -> None:
    for counts in (manifest.counts, *(source.counts for source in manifest.sources)):
        assert counts["in"] == sum(count for name, count in counts.items() if name != "in")
    assert manifest.num_tokens + manifest.num_padding_tokens == manifest.num_rows * manifest.seq_len
    assert manifest.num_rows == sum(shard.num_rows for shard in manifest.shards)
    assert manifest.num_tokens == sum(shard.num_tokens for shard in manifest.shards)
    rows = StoreReader(store).read_rows(np.arange(manifest.num_rows))
    assert int(np.sum(rows.document_ids >= 0)) == manifest.num_tokens


def test_counts_add_up_on_damaged_input(tokenizer: Path, tmp_path: Path):
    """Every kind of damage at once; each costs itself, and every document is counted under one name."""
    raw = tmp_path / "raw"
    raw.mkdir()
    good = [{"id": f"a{number}", "text": make_text(number)} for number in range(40)]
    write_jsonl(raw / "a.jsonl", *good, {"id": "a-copy", "text": good[3]["text"] + " \n"}, {"id": "no text"})
    with (raw / "a.jsonl").open("ab") as handle:
        handle.write(b'{"id": "broken", "te\n' + b'{"id": "utf8", "text": "\xff\xfe"}\n')
    page = f"{make_text(100)}\n练习：{QUESTION}\n{make_text(101)}"
    write_jsonl(raw / "b.jsonl", {"id": "exam", "text": page}, {"id": "short", "text": "短"})
    write_jsonl(raw / "b2.jsonl.gz", *({"id": f"g{number}", "text": make_text(number)} for number in range(200, 400)))
    whole = (raw / "b2.jsonl.gz").read_bytes()
    (raw / "b2.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    table = pa.table({"id": ["p1", "p2"], "text": [make_text(500), make_text(501)]})
    pq.write_table(table, raw / "c.parquet")
    (raw / "d.parquet").write_bytes((raw / "c.parquet").read_bytes()[:-30])
    pq.write_table(table.rename_columns(["id", "body"]), raw / "e.parquet")
    (raw / "f.jsonl").write_bytes(b"")
    (raw / "g.txt").write_bytes(b"")
    write_jsonl(
        raw / "h.jsonl", {"id": "huge", "text": make_text(7, 50_000_000)}, {"id": "after", "text": make_text(8888)}
    )
    questions = [BenchmarkText("ceval/law/1", QUESTION), BenchmarkText("ceval/law/2", "短")]
    config = make_config(raw, max_bad_fraction=0.5)
    manifest = build_token_store(config, tokenizer, tmp_path / "store", questions=questions, report=lambda line: None)
    check_sums(manifest, tmp_path / "store")
    gzipped = manifest.counts["kept"] - 40 - 2 - 1
    assert 50 < gzipped < 200, "what came before the cut is kept"
    assert {name: count for name, count in manifest.counts.items() if name not in ("in", "kept")} == {
        "duplicate": 1,
        "contaminated": 1,
        "filtered/too_short": 1,
        "filtered/too_long": 1,
        "quarantined": 3 + 1 + 1 + 2,
    }
    assert (manifest.num_questions, manifest.num_questions_too_short) == (2, 1)
    lists = {
        name: [json.loads(line) for line in (tmp_path / "store" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("contaminated", "quarantine")
    }
    assert [(hit["question"], hit["document"]) for hit in lists["contaminated"]] == [("ceval/law/1", "exam")]
    assert lists["contaminated"][0]["share"] == 1.0
    places = [entry["where"].rpartition("/")[2].partition("@")[0] for entry in lists["quarantine"]]
    assert places == ["a.jsonl:42", "a.jsonl:43", "a.jsonl:44", "b2.jsonl.gz", "d.parquet", "e.parquet"]
    assert "has body, id" in lists["quarantine"][-1]["reason"]
    kept = sum(len((make_text(n)).encode()) + 1 for n in (*range(40), *range(200, 200 + gzipped), 500, 501, 8888))
    assert manifest.num_tokens + manifest.sources[0].num_validation_tokens == kept, "no token is lost or made"


def test_too_much_damage_stops_the_build_and_a_higher_limit_goes_on(tokenizer: Path, tmp_path: Path):
    raw, store = tmp_path / "raw", tmp_path / "store"
    raw.mkdir()
    write_jsonl(raw / "a.jsonl", *({"text": make_text(number)} for number in range(30)), 1, 2, 3)
    with pytest.raises(CorpusError, match=r"max_bad_fraction=0.05: 3 of 33 inputs are malformed \(9.1%\).*a.jsonl:31"):
        build_token_store(make_config(raw, max_bad_fraction=0.05), tokenizer, store)
    assert not (store / "manifest.json").exists()
    said: list[str] = []
    manifest = build_token_store(make_config(raw, max_bad_fraction=0.1), tokenizer, store, report=said.append)
    assert manifest.counts["kept"] == 30 and "goes on after" in said[0]


def test_a_file_nobody_can_read_stops_the_build_at_once_by_its_bytes(tokenizer: Path, tmp_path: Path):
    table = pa.table({"text": [make_text(number) for number in range(50)]})
    for name in "abc":
        pq.write_table(table, tmp_path / f"{name}.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-30])
    with pytest.raises(CorpusError, match=r"max_bad_fraction=0.1: files of .* bytes cannot be read; .*a.parquet"):
        build_token_store(make_config(tmp_path, max_bad_fraction=0.1), tokenizer, tmp_path / "store")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("b.txt", make_text(1, 60_000).encode("gb18030"), "UnicodeDecodeError"),
        ("b.txt", make_text(1, 120_000).encode(), "a text of more than 100,000 bytes"),
        ("b.txt.gz", gzip.compress(make_text(1, 60_000).encode())[:-9], "EOFError"),
        ("b.jsonl", b'{"text": "' + b"x" * 120_000 + b'"}\n', "a line of 120,013 bytes"),
    ],
    ids=["encoding", "long text", "text cut short", "long line"],
)
def test_one_document_nobody_can_read_that_is_most_of_the_input_stops_the_build(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, reason: str
):
    """It is one document of 121, and more than a third of the bytes."""
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 100_000)
    write_jsonl(tmp_path / "a.jsonl", *({"text": make_text(number)} for number in range(120)))
    (tmp_path / name).write_bytes(content)
    pattern = rf"files of {len(content):,} of .* bytes cannot be read; the first is .*{name}.*{reason}"
    with pytest.raises(CorpusError, match=pattern):
        build_token_store(make_config(tmp_path, max_bad_fraction=0.3), tokenizer, tmp_path / "store")


def test_a_limit_of_documents_is_exact_and_nothing_is_read_beyond_it(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for folder, first in (("one", 0), ("two", 1000)):
        (tmp_path / folder).mkdir()
        for part in range(10):
            records = [{"text": make_text(first + part * 10 + number)} for number in range(10)]
            write_jsonl(tmp_path / folder / f"{part}.jsonl", *records)
    opened: list[str] = []
    real = readers.open_file
    monkeypatch.setattr(readers, "open_file", lambda path: opened.append(Path(path).name) or real(path))
    limited = [SourceConfig(path=str(tmp_path / name), max_documents=25) for name in ("one", "two")]
    config = make_config(tmp_path).model_copy(update={"sources": limited})
    manifest = build_token_store(config, tokenizer, tmp_path / "store", report=lambda line: None)
    assert [source.counts["in"] for source in manifest.sources] == [25, 25]
    assert opened == ["0.jsonl", "1.jsonl", "2.jsonl"] * 2
    assert [document.text for document in sources.iter_documents(config)] == [
        make_text(first + number) for first in (0, 1000) for number in range(25)
    ]


@pytest.fixture
def two_sources(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, first in zip(folders, (0, 60), strict=True):
        folder.mkdir()
        texts = [make_text(first + number % 35, 100 + number * 7) for number in range(40)]
        write_jsonl(folder / "a.jsonl", *({"id": f"{first + n}", "text": text} for n, text in enumerate(texts)), 13)
    return folders


def test_sources_have_shards_of_their_own_and_padding_at_their_end(
    tokenizer: Path, two_sources: list[Path], tmp_path: Path
):
    manifest = build_token_store(make_config(*two_sources, max_bad_fraction=0.5), tokenizer, tmp_path / "store")
    check_sums(manifest, tmp_path / "store")
    first, second = manifest.sources
    assert first.num_rows + second.num_rows == manifest.num_rows
    reader = StoreReader(tmp_path / "store")
    last = reader.read_rows(np.array([first.num_rows - 1, manifest.num_rows - 1]))
    assert np.sum(last.document_ids == -1, axis=1).tolist() == [first.num_padding_tokens, second.num_padding_tokens]
    held = load_validation_rows(tmp_path / "store")
    assert held is not None and len(held) == 3 and held.row_ids.tolist() == [-3, -2, -1]
    mixed = reader.read_rows(np.array([manifest.num_rows - 1, 0, first.num_rows, 0]))
    assert mixed.input_ids[1].tolist() == mixed.input_ids[3].tolist()
    assert mixed.row_ids.tolist() == [manifest.num_rows - 1, 0, first.num_rows, 0]


class Killed(BaseException):
    """Ends a build between two records as a kill would: nothing is caught, nothing is committed."""


def test_a_build_killed_after_any_record_ends_with_the_same_bytes(
    tokenizer: Path, two_sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = make_config(*two_sources, max_bad_fraction=0.5)
    build_token_store(config, tokenizer, tmp_path / "whole", report=lambda line: None)
    whole = read_store(tmp_path / "whole")
    assert JOURNAL_NAME not in whole and len([name for name in whole if name.startswith("shard")]) > 5
    real = build.iter_records

    def killing_iter(*arguments: Any) -> Iterator[Any]:
        for number, record in enumerate(real(*arguments)):
            if number == patience:
                raise Killed
            yield record

    for patience in (1, 7, 19, 33):
        store = tmp_path / f"killed{patience}"
        monkeypatch.setattr(build, "iter_records", killing_iter)
        for attempt in range(4):
            with pytest.raises(Killed) if attempt < 2 else contextlib.suppress(Killed):
                build_token_store(config, tokenizer, store, report=lambda line: None)
            if attempt < 2:
                (store / "shard_009999.parquet.partial").write_bytes(b"half a shard")
        monkeypatch.setattr(build, "iter_records", real)
        build_token_store(config, tokenizer, store, report=lambda line: None)
        assert read_store(store) == whole, patience


@pytest.mark.parametrize("num_writers", [1, 2, 5])
def test_any_number_of_writers_writes_the_same_bytes_however_slow_the_disk_and_whenever_it_is_killed(
    num_writers: int, tokenizer: Path, two_sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Shards take some records' time, later ones less than earlier ones, so that commits lag behind the packing."""
    config = make_config(*two_sources, max_bad_fraction=0.5, groups_per_shard=1)
    build_token_store(config, tokenizer, tmp_path / "whole", report=lambda line: None)
    whole = read_store(tmp_path / "whole")
    assert len([name for name in whole if name.startswith("shard")]) > 20
    config = config.model_copy(update={"num_writers": num_writers})
    real_write, real_iter = shard_threads.write_rows, build.iter_records
    in_flight, most = 0, 0

    def write_slowly(path: Path, rows: list[RawRow], **fields: int) -> Shard:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        time.sleep(0.012 if int(path.stem[-1]) % 3 == 0 else 0.001)
        in_flight -= 1
        return real_write(path, rows, **fields)

    def killing_iter(*arguments: Any) -> Iterator[Any]:
        for number, record in enumerate(real_iter(*arguments)):
            if number == 17:
                raise Killed
            yield record

    monkeypatch.setattr(shard_threads, "write_rows", write_slowly)
    monkeypatch.setattr(build, "iter_records", killing_iter)
    with pytest.raises(Killed):
        build_token_store(config, tokenizer, tmp_path / "store", report=lambda line: None)
    monkeypatch.setattr(build, "iter_records", real_iter)
    said: list[str] = []
    build_token_store(config, tokenizer, tmp_path / "store", report=said.append)
    assert "goes on after" in said[0] and read_store(tmp_path / "store") == whole
    assert most == min(num_writers, most) and (most > 1) == (num_writers > 1), "they write side by side"


def test_a_shard_that_cannot_be_written_ends_the_build_and_those_before_it_are_kept(
    tokenizer: Path, two_sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The fifth shard fails after the sixth and seventh were written: neither may be taken for it."""
    config = make_config(*two_sources, max_bad_fraction=0.5, groups_per_shard=1, num_writers=3)
    build_token_store(config, tokenizer, tmp_path / "whole", report=lambda line: None)
    real = shard_threads.write_rows

    def refuse_the_fifth(path: Path, rows: list[RawRow], **fields: int) -> Shard:
        if path.stem.endswith("04"):
            time.sleep(0.1)
            raise OSError(28, "No space left on device")
        return real(path, rows, **fields)

    monkeypatch.setattr(shard_threads, "write_rows", refuse_the_fifth)
    with pytest.raises(CorpusError, match=r"No space left on device.*every finished shard is kept: make room"):
        build_token_store(config, tokenizer, tmp_path / "store", report=lambda line: None)
    monkeypatch.setattr(shard_threads, "write_rows", real)
    said: list[str] = []
    build_token_store(config, tokenizer, tmp_path / "store", report=said.append)
    assert said[0].startswith("goes on after 4 shards")
    assert read_store(tmp_path / "store") == read_store(tmp_path / "whole")


def test_keys_of_documents_after_a_mark_wait_for_their_own_commit(tmp_path: Path):
    """A build that is killed meets them again, and must not take them for duplicates of themselves."""
    journal = BuildJournal(tmp_path, "a build")
    assert journal.add_key(b"one")
    journal.mark()
    assert journal.add_key(b"two") and not journal.add_key(b"one") and not journal.add_key(b"two")
    journal.commit({"unit": 1}, {})
    assert not journal.add_key(b"one") and not journal.add_key(b"two")
    journal.close()
    again = BuildJournal(tmp_path, "a build")
    assert not again.add_key(b"one") and again.add_key(b"two")
    again.close()


def test_after_a_commit_that_failed_nothing_more_is_committed(tmp_path: Path):
    """SQLite ends a transaction that meets a full disk; statements after it would be permanent one by one."""
    journal = BuildJournal(tmp_path, "a build")
    journal.commit({"unit": 1}, {})
    journal._connection.execute("PRAGMA max_page_count=8")
    row = RawRow(np.arange(100_000, dtype=np.int32), np.zeros(1, dtype=np.int32), 100_000)
    with pytest.raises(sqlite3.OperationalError, match="full"):
        journal.commit({"unit": 2}, {"pending": [row]})
    with pytest.raises(sqlite3.OperationalError, match="an earlier commit failed"):
        journal.commit({"unit": 3}, {})
    journal.close()
    again = BuildJournal(tmp_path, "a build")
    assert again.load() == ({"unit": 1}, {})
    again.close()


def test_a_finished_store_is_found_and_another_config_is_refused(
    tokenizer: Path, two_sources: list[Path], tmp_path: Path
):
    config = make_config(*two_sources, max_bad_fraction=0.5)
    first = build_token_store(config, tokenizer, tmp_path / "store")
    said: list[str] = []
    assert build_token_store(config, tokenizer, tmp_path / "store", report=said.append) == first
    assert said[0].startswith("found")
    assert not any("other files" in line for line in said)
    with pytest.raises(CorpusError, match="built from another corpus config or tokenizer"):
        build_token_store(config, tokenizer, tmp_path / "store", seed=1)


def test_a_finished_store_stays_as_it_is_and_says_that_its_sources_changed(
    tokenizer: Path, two_sources: list[Path], tmp_path: Path
):
    config = make_config(*two_sources, max_bad_fraction=0.5)
    first = build_token_store(config, tokenizer, tmp_path / "store")
    said: list[str] = []
    with (two_sources[0] / "a.jsonl").open("ab") as file:
        file.write(b"\n")
    assert build_token_store(config, tokenizer, tmp_path / "store", report=said.append) == first
    assert "its sources have other files now, or of other sizes, and it stays as it is" in said[-1]
    (two_sources[0] / "a.jsonl").unlink()  # gone, as on another machine
    assert build_token_store(config, tokenizer, tmp_path / "store") == first


def test_a_store_has_one_builder_and_belongs_to_one_config(tokenizer: Path, two_sources: list[Path], tmp_path: Path):
    (tmp_path / "store").mkdir()
    config = make_config(*two_sources)
    journal = BuildJournal(tmp_path / "store", "other")
    with pytest.raises(CorpusError, match="another build is writing to it"):
        build_token_store(config, tokenizer, tmp_path / "store")
    journal.commit({}, {})
    journal.close()
    with pytest.raises(CorpusError, match="an unfinished build with another corpus config"):
        build_token_store(config, tokenizer, tmp_path / "store")


def test_an_unfinished_build_does_not_go_on_with_other_input(tokenizer: Path, two_sources: list[Path], tmp_path: Path):
    """It would skip as many documents as it had read, of files that now hold others."""
    config = make_config(*two_sources, max_bad_fraction=0.0)
    with pytest.raises(CorpusError, match=r"max_bad_fraction=0.0: 2 of 82"):
        build_token_store(config, tokenizer, tmp_path / "store")
    with (two_sources[0] / "a.jsonl").open("a") as handle:
        handle.write(json.dumps({"text": make_text(999)}) + "\n")
    with pytest.raises(CorpusError, match="an unfinished build with another corpus config, tokenizer or input files"):
        build_token_store(config, tokenizer, tmp_path / "store")


def test_questions_and_seed_belong_to_the_config(tokenizer: Path, two_sources: list[Path]):
    config = make_config(*two_sources)
    hashes = {
        build.hash_config(config, asked, seed) for asked in ([], [BenchmarkText("a", QUESTION)]) for seed in (0, 1)
    }
    assert len(hashes) == 4
    more_workers = config.model_copy(update={"num_workers": 7, "max_bad_fraction": 0.9, "document_mask": False})
    assert build.hash_config(more_workers, [], 0) == build.hash_config(config, [], 0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"upload_to": "/data/store"}, "upload_to\n.*an address such as s3://bucket/store is expected"),
        ({"upload_to": "s3://bucket/a", "store": "s3://bucket/b"}, "upload_to: nothing is built when `store` names"),
    ],
)
def test_an_upload_that_cannot_be_meant_is_refused(fields: dict[str, str], words: str):
    with pytest.raises(ValueError, match=words):
        CorpusConfig.model_validate(fields)


def test_an_upload_that_cannot_start_is_one_clear_error(tmp_path: Path):
    write_jsonl(tmp_path / "raw.jsonl", {"text": "one"})
    config = CorpusConfig(sources=[SourceConfig(path=str(tmp_path / "raw.jsonl"))], upload_to="nowhere://bucket/store")
    with pytest.raises(CorpusError, match=r"^corpus.upload_to=nowhere://bucket/store: cannot be opened \(.*nowhere"):
        build_token_store(config, make_byte_tokenizer(tmp_path), tmp_path / "store")


def test_a_corpus_that_is_too_small_leaves_nothing_in_the_way_of_more(tokenizer: Path, tmp_path: Path) -> None:
    raw, store = tmp_path / "raw", tmp_path / "store"
    raw.mkdir()
    write_jsonl(raw / "a.jsonl", {"text": make_text(99, 30)})
    with pytest.raises(
        CorpusError, match=r"1 documents in, 0 kept \(1 filtered/too_short\), none fills a row of seq_len=64"
    ):
        build_token_store(make_config(raw), tokenizer, store)
    write_jsonl(raw / "b.jsonl", *({"text": make_text(seed)} for seed in range(20)))
    manifest = build_token_store(make_config(raw), tokenizer, store)
    assert manifest.counts["in"] == 21 and manifest.num_rows > 10
    alone = build_token_store(make_config(raw), tokenizer, tmp_path / "alone")
    assert alone.content_sha256 == manifest.content_sha256
    assert read_store(store) == read_store(tmp_path / "alone")


def test_a_build_without_a_row_for_want_of_a_column_begins_anew_with_the_right_one(
    tokenizer: Path, tmp_path: Path
) -> None:
    """Nothing it read is of use; one that has rows goes on, with a higher `max_bad_fraction`."""
    (tmp_path / "raw").mkdir()
    write_jsonl(tmp_path / "raw" / "a.jsonl", *({"body": make_text(seed)} for seed in range(8)))
    config = make_config(tmp_path / "raw")
    with pytest.raises(CorpusError, match=r"max_bad_fraction=0.01: 8 of 8 inputs are malformed \(100.0%\)"):
        build_token_store(config, tokenizer, tmp_path / "store")
    sources = [config.sources[0].model_copy(update={"text_column": "body"})]
    manifest = build_token_store(config.model_copy(update={"sources": sources}), tokenizer, tmp_path / "store")
    assert manifest.counts["in"] == manifest.counts["kept"] == 8
