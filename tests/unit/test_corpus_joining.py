"""How documents become one row of tokens: [begin] text end; a store is not gone on with in another way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from layerplan.config.corpus import CorpusConfig, SourceConfig
from layerplan.corpus import writer
from layerplan.corpus.build import build_token_store
from layerplan.corpus.chunks import Chunks
from layerplan.corpus.manifest import SEAL_KEY, Manifest
from layerplan.corpus.on_the_fly import write_stream
from layerplan.errors import CorpusError
from tests.tiny_corpus import make_byte_tokenizer, make_text, write_jsonl
from tests.tiny_tokenizer import make_bytes, save_tokenizer

BEGIN, END, OTHER = 256, 257, 258
NEW_FIELDS = ("end_of_text", "begin_ids", "control_tokens", "num_control_documents", "num_control_tokens", SEAL_KEY)


def make_folder(folder: Path, *, begin: tuple[str, ...] = (), end: str = "<eos>") -> Path:
    """Bytes and three control tokens; documents of 300 bytes each."""
    write_jsonl(folder / "raw.jsonl", *({"id": str(number), "text": make_text(number)} for number in range(40)))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "bos_token": "<bos>"}
    control = ("<bos>", "<eos>", "<|im_end|>")
    return save_tokenizer(folder, make_bytes(), control=control, begin=begin, tokenizer_config=settings)


def make_config(folder: Path, **fields: Any) -> CorpusConfig:
    values: dict[str, Any] = {"seq_len": 64, "rows_per_group": 4, "groups_per_shard": 4, "validation_rows": 0} | fields
    return CorpusConfig(sources=[SourceConfig(path=str(folder / "raw.jsonl"))], **values)


def build(folder: Path, said: list[str] | None = None, **fields: Any) -> Manifest:
    report = (lambda line: None) if said is None else said.append
    return build_token_store(make_config(folder, **fields), folder, folder / "store", report=report)


def read_ids(folder: Path, manifest: Manifest) -> list[int]:
    rows = [pq.read_table(folder / "store" / shard.name)["input_ids"].to_pylist() for shard in manifest.shards]
    return [number for shard in rows for row in shard for number in row]


def test_documents_begin_with_what_the_tokenizer_puts_before_a_text(tmp_path: Path) -> None:
    """As those of Llama and Gemma do; 40 documents of 300 bytes, each with its begin and its end."""
    manifest = build(make_folder(tmp_path, begin=("<bos>",)))
    ids = read_ids(tmp_path, manifest)[: manifest.num_tokens]
    assert (manifest.begin_ids, manifest.end_of_text_id, manifest.num_tokens) == ([BEGIN], END, 40 * 302)
    assert [ids[place] for place in range(0, len(ids), 302)] == [BEGIN] * 40
    assert [ids[place] for place in range(301, len(ids), 302)] == [END] * 40
    assert (ids.count(BEGIN), ids.count(END)) == (40, 40)
    starts = pq.read_table(tmp_path / "store" / "shard_000000.parquet")["starts"].to_pylist()
    assert starts[:10] == [[0]] * 4 + [[0, 302 - 256]] + [[0]] * 4 + [[0, 604 - 576]]


def test_a_begin_that_is_only_named_is_not_put_and_one_that_is_put_can_be_left_out(tmp_path: Path) -> None:
    """Then the rows are those of every version before."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = build(make_folder(tmp_path / "a"))
    left_out = build(make_folder(tmp_path / "b", begin=("<bos>",)), begin_token="none")
    assert plain.begin_ids == left_out.begin_ids == []
    assert plain.num_tokens == 40 * 301
    assert [shard.sha256 for shard in plain.shards] == [shard.sha256 for shard in left_out.shards]


def test_rows_of_a_tokenizer_without_begin_are_text_and_end_as_they_were(tmp_path: Path) -> None:
    texts = [make_text(number) for number in range(40)]
    write_jsonl(tmp_path / "raw.jsonl", *({"text": text} for text in texts))
    tokenizer = Tokenizer.from_file(str(make_byte_tokenizer(tmp_path)))
    manifest = build(tmp_path)
    expected = [number for text in texts for number in (*tokenizer.encode(text).ids, 256)]
    assert read_ids(tmp_path, manifest)[: manifest.num_tokens] == expected


def forget(store: Path) -> None:
    """Makes the manifest one of an earlier version."""
    content = json.loads((store / "manifest.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in content.items() if key not in NEW_FIELDS}
    for source in kept["sources"]:
        source.pop("num_control_documents", None), source.pop("num_control_tokens", None)
    (store / "manifest.json").write_text(json.dumps(kept), encoding="utf-8")


def test_a_store_of_an_earlier_version_is_read_and_what_is_not_known_of_it_is_said(tmp_path: Path) -> None:
    manifest = build(make_folder(tmp_path))
    forget(tmp_path / "store")
    old = Manifest.load(tmp_path / "store")
    assert (old.control_tokens, old.begin_ids, old.num_control_tokens) == ("unknown", [], None)
    assert old.content_sha256 == manifest.content_sha256
    said: list[str] = []
    assert build(tmp_path, said) == old
    assert "is of an earlier version: where a document spelled out a control token" in said[0]


def test_a_store_that_ends_its_texts_with_another_token_is_refused_by_both_names(tmp_path: Path) -> None:
    """Whether this version wrote it or one before; the remedy goes on with it."""
    build(make_folder(tmp_path, end="<|im_end|>"))
    make_folder(tmp_path, end="<eos>")
    for _ in range(2):
        with pytest.raises(CorpusError) as failure:
            build(tmp_path)
        assert f"ended with '<|im_end|>' ({OTHER})" in str(failure.value)
        assert f"now they would be ended with '<eos>' ({END})" in str(failure.value)
        assert "set corpus.end_of_text: '<|im_end|>' to go on with it" in str(failure.value)
        assert build(tmp_path, end_of_text="<|im_end|>").end_of_text_id == OTHER
        forget(tmp_path / "store")


@pytest.mark.parametrize(
    ("before", "remedy"),
    [({"begin_token": "none"}, "begin_token: none"), ({"control_tokens": "token"}, "control_tokens: token")],
)
def test_a_store_joined_in_another_way_is_refused_with_the_setting_it_had(
    before: dict[str, Any], remedy: str, tmp_path: Path
) -> None:
    build(make_folder(tmp_path, begin=("<bos>",)), **before)
    with pytest.raises(CorpusError, match=f"or set corpus.{remedy} to go on with it"):
        build(tmp_path)
    build(tmp_path, **before)


@pytest.mark.parametrize("is_old", [False, True])
def test_an_unfinished_build_is_not_gone_on_with_under_another_end(
    is_old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path, end="<|im_end|>")
    with monkeypatch.context() as patch:
        patch.setattr(writer.StoreWriter, "write_validation", stop)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path)
    if is_old:
        import sqlite3

        with sqlite3.connect(tmp_path / "store" / "build.sqlite") as journal:
            journal.execute("DELETE FROM state WHERE name = 'joining'")
    make_folder(tmp_path, end="<eos>")
    before = "joined as an earlier version did, which is not noted" if is_old else r"ended with '<\|im_end\|>' \(258\)"
    with pytest.raises(
        CorpusError, match=rf"unfinished build whose documents are {before}.*ended with '<eos>' \(257\)"
    ):
        build(tmp_path)


def stop(self: object) -> None:
    raise KeyboardInterrupt


def test_a_document_with_an_id_that_was_not_thought_possible_ends_the_build_by_its_name() -> None:
    ids = np.array([1, 600, 2], dtype=np.int32)
    writer.check_ids(ids, 601, "page 7")
    writer.check_ids(ids[:0], 1, "page 7")
    with pytest.raises(CorpusError, match="document page 7: its text yields token 600, and ids below 600 are expected"):
        writer.check_ids(ids, 600, "page 7")


def test_rows_made_while_training_are_joined_in_the_same_way(tmp_path: Path) -> None:
    """And a stream of an earlier version goes on with control tokens as the tokens they were."""
    folder = make_folder(tmp_path, begin=("<bos>",))
    write_jsonl(tmp_path / "raw.jsonl", *({"text": make_text(number) + "<eos>"} for number in range(3)))
    config = make_config(folder, mode="on_the_fly", deduplicate=False)
    said: list[str] = []
    write_stream(config, folder, tmp_path / "stream", report=said.append)
    first = Chunks(str(tmp_path / "stream")).read(0).input_ids.ravel().tolist()
    assert first[:1] + first[306:308] == [BEGIN, END, BEGIN]
    content = json.loads((tmp_path / "stream" / "stream.json").read_text(encoding="utf-8"))
    for name in ("end_of_text", "begin_token", "control_tokens"):
        del content["config"][name]
    del content["begin_ids"], content["num_ids"]
    (tmp_path / "stream" / "stream.json").write_text(json.dumps(content), encoding="utf-8")
    forget(tmp_path / "stream")
    before = Chunks(str(tmp_path / "stream")).read(0).input_ids
    assert before.ravel().tolist()[300:302] == [END, END]
    write_stream(
        make_config(folder, mode="on_the_fly", deduplicate=False, begin_token="none"), folder, tmp_path / "stream"
    )
    assert np.array_equal(Chunks(str(tmp_path / "stream")).read(0).input_ids, before)
