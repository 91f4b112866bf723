"""Sources, filters and decontamination: one bad line costs one line, and every drop has a reason."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from layerplan.config.corpus import CorpusConfig, DecontaminationConfig, FilterConfig, SourceConfig
from layerplan.corpus.cleaning import compute_duplicate_key, compute_line_repetition, find_filter_reason, normalize_text
from layerplan.corpus.decontamination import BenchmarkText, QuestionIndex
from layerplan.corpus.sources import Document, Malformed, iter_documents, list_units, read_unit
from layerplan.errors import CorpusError


def read_all(path: Path, **options: object) -> list[Document | Malformed]:
    config = CorpusConfig(sources=[SourceConfig(path=str(path), **options)])  # type: ignore[arg-type]
    return [item for unit in list_units(config) for item in read_unit(unit, config.sources[unit.source])]


def lines(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def test_a_broken_line_costs_one_line(tmp_path: Path):
    content = (
        lines({"id": "a", "text": "x"})
        + b'{"id": "b", "te\n'
        + b"\xff\xfe\n[1]\n"
        + lines({"id": "c"}, {"id": "d", "text": "y"})
    )
    (tmp_path / "raw.jsonl").write_bytes(content)
    found = read_all(tmp_path)
    assert [item.id for item in found if isinstance(item, Document)] == ["a", "d"]
    bad = [item for item in found if isinstance(item, Malformed)]
    assert [item.where.rpartition(":")[2] for item in bad] == ["2", "3", "4", "5"]
    assert "column 'text' is missing" in bad[-1].reason


def test_a_truncated_gzip_keeps_what_came_before_it(tmp_path: Path):
    whole = gzip.compress(lines(*({"id": str(i), "text": "word " * 200 + str(i)} for i in range(500))))
    (tmp_path / "raw.jsonl.gz").write_bytes(whole[: len(whole) * 3 // 4])
    found = read_all(tmp_path)
    assert sum(isinstance(item, Document) for item in found) > 0
    assert isinstance(found[-1], Malformed)


def test_a_cut_parquet_file_and_a_missing_column_are_named(tmp_path: Path):
    pq.write_table(pa.table({"id": ["1"], "text": ["hello"]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    pq.write_table(pa.table({"id": ["1"], "body": ["hello"]}), tmp_path / "c.parquet")
    found = read_all(tmp_path)
    assert [type(item).__name__ for item in found] == ["Document", "Malformed", "Malformed"]
    assert "b.parquet" in found[1].where and "it has body, id" in found[2].reason


@pytest.mark.parametrize("name", ["a.txt", "b.md"])
def test_text_files_are_documents(tmp_path: Path, name: str):
    (tmp_path / name).write_text("hello")
    assert [item.text for item in read_all(tmp_path) if isinstance(item, Document)] == ["hello"]


def test_a_missing_folder_and_an_empty_one_are_refused(tmp_path: Path):
    with pytest.raises(CorpusError, match=r"corpus.sources.0.path=.*nowhere: no such file"):
        read_all(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match="no readable file"):
        read_all(tmp_path)


def test_machine_docs_have_text_and_a_fixed_order():
    config = CorpusConfig(sources=[SourceConfig(path="machine://docs", max_documents=30)])
    first, second = ([document.id for document in iter_documents(config)] for _ in range(2))
    assert len(first) == 30 and first == second


def test_filters_give_their_reason():
    filters = FilterConfig(min_chars=5, max_chars=400, min_score=2.0, min_cjk_ratio=0.0)
    assert find_filter_reason("short text", 3.0, filters) is None
    assert find_filter_reason("short text", None, filters) is None
    assert find_filter_reason("short text", 1.0, filters) == "score"
    assert find_filter_reason("abc", None, filters) == "too_short"
    assert find_filter_reason("x" * 401, None, filters) == "too_long"
    assert find_filter_reason("same line\n" * 20, None, filters) == "line_repetition"
    assert find_filter_reason("abab" * 60, None, filters) == "ngram_repetition"
    assert find_filter_reason("plain words", None, FilterConfig(min_chars=1, min_cjk_ratio=0.5)) == "language"


def test_line_repetition_by_hand():
    assert compute_line_repetition("aa\naa\nbb") == pytest.approx(2 / 6)


def test_duplicates_are_equal_up_to_case_and_space():
    assert compute_duplicate_key("Hello  World\n") == compute_duplicate_key("hello world")
    assert compute_duplicate_key("hello world") != compute_duplicate_key("hello worlds")
    assert normalize_text("a\r\nb\x00\ufeff ") == "a\nb"


def test_a_page_with_a_benchmark_question_is_found_and_others_are_not():
    question = BenchmarkText("ceval/law/1", "下列关于法律推理的表述，能够成立的是哪一项呢？请选择。")
    index = QuestionIndex([question, BenchmarkText("short", "短")], DecontaminationConfig(ngram=8, min_share=0.5))
    assert index.find("练习题：下列关于法律推理的表述 能够成立的是哪一项呢。") == "ceval/law/1"
    assert index.find("法律推理是法学的一个概念，与逻辑推理有关，本文讨论它的历史。") is None
    assert index.num_too_short == 1
    assert QuestionIndex([question], DecontaminationConfig(enabled=False)).find(question.text) is None
