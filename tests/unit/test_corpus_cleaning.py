"""Sources, filters and decontamination: one bad line costs one line, and every drop has a reason."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerplan.config.corpus import CorpusConfig, DecontaminationConfig, FilterConfig, SourceConfig
from layerplan.corpus.cleaning import (
    NGRAM,
    SAMPLE_CHARS,
    bound_ngram_repetition,
    compute_cjk_ratio,
    compute_duplicate_key,
    compute_line_repetition,
    compute_ngram_repetition,
    find_filter_reason,
    normalize_text,
)
from layerplan.corpus.codepoints import encode_codes, fold_words, hash_ngrams
from layerplan.corpus.decontamination import BenchmarkText, QuestionIndex
from layerplan.corpus.readers import Document, Malformed, read_unit
from layerplan.corpus.sources import iter_documents, list_units
from layerplan.errors import CorpusError
from tests.tiny_corpus import make_text


def read_all(path: Path | str, **options: object) -> list[Document | Malformed]:
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
    assert bad[-1].reason == "column 'text' is missing; it has id"


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


def test_columns_of_any_arrow_kind_are_read_and_a_bad_value_costs_itself(tmp_path: Path):
    bad = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\x02\0\0\0\x04\0\0\0\x06\0\0\0"), pa.py_buffer(b"ab\xff\xfecd")]
    )
    pq.write_table(pa.table({"id": [7, 8, 9], "text": bad}), tmp_path / "a.parquet")
    found = read_all(tmp_path / "a.parquet")
    assert [item.text if isinstance(item, Document) else "bad" for item in found] == ["ab", "bad", "cd"]
    assert isinstance(found[0], Document) and found[0].id == "7"
    table = pa.table({"text": pa.array(["x", "y", "x"]).dictionary_encode()})
    for name, open_writer in (("b.arrow", pa.ipc.new_stream), ("c.arrow", pa.ipc.new_file)):
        with open_writer(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
        assert [item.text for item in read_all(tmp_path / name) if isinstance(item, Document)] == ["x", "y", "x"]


def test_a_damaged_row_group_costs_its_own_rows(tmp_path: Path):
    texts = [f"{i} " + "x" * 500 for i in range(40)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts}), path, row_group_size=10, compression="none", use_dictionary=False)
    raw = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    raw[start : start + 200] = b"\xff" * 200
    path.write_bytes(raw)
    found = read_all(path)
    assert [item.text for item in found if isinstance(item, Document)] == texts[:10] + texts[20:]
    assert [item.num_documents for item in found if isinstance(item, Malformed)] == [10]


def test_stretches_of_a_file_hold_each_document_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    records = [{"id": str(i), "text": "é" * (i * 37 % 91)} for i in range(300)]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(*records)[:-1])
    pq.write_table(
        pa.table({"id": [r["id"] for r in records], "text": [r["text"] for r in records]}),
        tmp_path / "b.parquet",
        row_group_size=7,
    )
    for size in (53, 1000, 10**6):
        monkeypatch.setattr("layerplan.corpus.sources.UNIT_BYTES", size)
        for name in ("a.jsonl", "b.parquet"):
            assert [item.id for item in read_all(tmp_path / name)] == [r["id"] for r in records], (size, name)


def test_a_zst_of_many_frames_is_read_to_its_end(tmp_path: Path):
    import zstandard

    frames = [zstandard.compress(lines({"text": text})) for text in "abc"]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert [item.text for item in read_all(tmp_path) if isinstance(item, Document)] == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.txt.zst", "a.json.zst"])
def test_a_zst_cut_short_is_said_to_be_that_and_what_came_before_is_kept(tmp_path: Path, name: str):
    """At a line's end too, where nothing else shows it; a text is no document without its end."""
    import zstandard

    first, second = (lines({"text": text * 50}) for text in "ab")
    whole, last = zstandard.compress(first), zstandard.compress(second)
    for cut in (1, len(last) // 2, len(last) - 1):
        (tmp_path / name).write_bytes(whole + last[:-cut])
        *kept, fault = read_all(tmp_path)
        assert isinstance(fault, Malformed) and "EOFError: Compressed file ended before the end" in fault.reason
        assert [item.text for item in kept] == ([] if name == "a.txt.zst" else ["a" * 50])
        assert fault.lost_bytes == ((tmp_path / name).stat().st_size if name == "a.txt.zst" else 0)
    (tmp_path / name).write_bytes(whole + b"no frame")
    assert "Unknown frame" in read_all(tmp_path)[-1].reason


def test_a_line_too_long_for_memory_and_a_lone_surrogate_cost_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("layerplan.corpus.readers.MAX_DOCUMENT_BYTES", 1000)
    content = lines({"id": "a", "text": "x"}, {"text": "y" * 5000}, {"text": "\ud800"}, {"id": "b", "text": "z"})
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.txt").write_text("w" * 2000)
    found = read_all(tmp_path)
    assert [type(item).__name__ for item in found] == ["Document", "Malformed", "Malformed", "Document", "Malformed"]
    assert "a line of 5,0" in found[1].reason and "surrogates" in found[2].reason and "b.txt" in found[4].where


def test_addresses_are_read_through_fsspec_and_pyarrow(tmp_path: Path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/raw/a.jsonl", lines({"id": "1", "text": "hello"}))
    memory.pipe("/bucket/raw/_hidden.jsonl", lines({"id": "2", "text": "no"}))
    memory.pipe("/bucket/odd/what?.jsonl", lines({"id": "3", "text": "marks are part of a name here"}))
    odd = CorpusConfig(sources=[SourceConfig(path="memory://bucket/odd")])
    assert [item.id for unit in list_units(odd) for item in read_unit(unit, odd.sources[0])] == ["3"]
    (tmp_path / "a.jsonl").write_bytes(lines({"id": "1", "text": "hello"}))
    for address in ("memory://bucket/raw", f"file://{tmp_path}", f"local://{tmp_path}"):
        config = CorpusConfig(sources=[SourceConfig(path=address)])
        units = list_units(config)
        assert all("://" in unit.path for unit in units)
        assert [item.id for unit in units for item in read_unit(unit, config.sources[0])] == ["1"], address
    with pytest.raises(CorpusError, match=r"corpus.sources.0.path=nosuch://x: cannot be opened \(no file system"):
        list_units(CorpusConfig(sources=[SourceConfig(path="nosuch://x")]))


def test_a_hub_data_set_is_resolved_by_its_card_and_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for split in ("train", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}-00000.jsonl").write_bytes(lines({"id": split, "text": "t"}) + b"{broken\n")
    card = "configs:\n- config_name: default\n  data_files:\n" + "".join(
        f"  - split: {split}\n    path: data/{split}-*.jsonl\n" for split in ("train", "test")
    )
    (tmp_path / "README.md").write_text(f"---\n{card}---\n# a card, not a document\n")
    found = read_all(f"hub://{tmp_path}", split="test")
    assert [type(item).__name__ for item in found] == ["Document", "Malformed"] and found[0].id == "test"
    with pytest.raises(CorpusError, match=r"has no split 'dev'; it has train, test"):
        read_all(f"hub://{tmp_path}", split="dev")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(CorpusError, match=r"corpus.sources.0.path=hub://nobody/nothing: cannot be read.*HF_TOKEN"):
        read_all("hub://nobody/nothing")


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
    assert compute_line_repetition("aa\n aa\n\n\nbb") == 2 / 6
    assert compute_line_repetition("aa\n\n\nbb") == compute_line_repetition("\n\n") == 0


@given(st.text(alphabet="ab天 ", max_size=300), st.floats(0, 0.99))
def test_the_bound_of_the_ngram_filter_changes_no_decision(text: str, limit: float):
    exact, bound = compute_ngram_repetition(text), bound_ngram_repetition(text)
    assert 0 <= exact <= bound <= 1
    filters = FilterConfig(min_chars=0, max_line_repetition=1, max_ngram_repetition=limit)
    assert (find_filter_reason(text, None, filters) is None) == (exact <= limit)


def test_the_bound_of_the_ngram_filter_tells_plain_text_apart():
    page = make_text(0, size=60_000)
    assert len(page) == SAMPLE_CHARS and bound_ngram_repetition(page) < 0.2


def test_both_ngram_measures_look_at_the_same_beginning():
    page = "a" * SAMPLE_CHARS + make_text(0, size=450_000)
    assert bound_ngram_repetition(page) >= compute_ngram_repetition(page) > 0.99
    assert find_filter_reason(page, None, FilterConfig(max_line_repetition=1)) == "ngram_repetition"


TEXTS = [
    "",
    "a",
    "abcabcabcabcabc",
    "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。" * 3,
    "Ａｂｃ def\n１２3 _é ß😀 x\u3000y" * 2,
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_array_filters_equal_their_plain_definitions(text: str):
    grams = [text[i : i + NGRAM] for i in range(len(text) - NGRAM + 1)]
    assert compute_ngram_repetition(text) == pytest.approx(1 - len(set(grams)) / len(grams) if grams else 0)
    assert bound_ngram_repetition(text) >= compute_ngram_repetition(text)
    letters = [character for character in text if character.isalpha()]
    cjk = sum("\u4e00" <= character <= "\u9fff" for character in letters)
    assert compute_cjk_ratio(text) == pytest.approx(cjk / len(letters) if letters else 0)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [4, 13])
def test_ngram_hashes_are_equal_exactly_where_the_ngrams_are(text: str, size: int):
    codes = encode_codes(text)
    grams = [text[i : i + size] for i in range(len(text) - size + 1)]
    hashes = hash_ngrams(codes, size).tolist()
    assert len(hashes) == len(grams)
    assert sorted(Counter(grams).values()) == sorted(Counter(hashes).values())
    assert len(set(zip(grams, hashes, strict=True))) == len(set(grams)) == len(set(hashes))


def test_folding_drops_width_case_space_and_punctuation():
    assert fold_words(encode_codes("Ａｂ，c\u3000_Ｄ！１天")).tolist() == [ord(c) for c in "abcd1天"]


def test_duplicates_are_equal_up_to_case_width_and_space():
    assert compute_duplicate_key("Hello  World\n") == compute_duplicate_key("hello world")
    assert compute_duplicate_key("ＨＥＬＬＯ，天") == compute_duplicate_key("hello,天")
    assert compute_duplicate_key("hello world") != compute_duplicate_key("hello worlds")
    assert normalize_text("a\r\nb\x00\ufeff ") == "a\nb"


def test_a_page_with_a_benchmark_question_is_found_and_others_are_not():
    question = BenchmarkText("ceval/law/1", "下列关于法律推理的表述，能够成立的是哪一项呢？请选择。")
    index = QuestionIndex([question, BenchmarkText("short", "短")], DecontaminationConfig(ngram=8, min_share=0.5))
    hit = index.find("练习题：下列关于法律推理的表述 能够成立的是哪一项呢。")
    assert hit is not None and hit.question == "ceval/law/1" and 0.5 <= hit.share < 1
    assert index.find("法律推理是法学的一个概念，与逻辑推理有关，本文讨论它的历史。") is None
    assert index.num_too_short == 1
    assert QuestionIndex([question], DecontaminationConfig(enabled=False)).find(question.text) is None
