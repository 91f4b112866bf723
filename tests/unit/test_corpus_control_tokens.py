"""A control token that a document spells out is text, and counted; the token itself only when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from layerplan.config.corpus import CorpusConfig, SourceConfig
from layerplan.corpus.build import build_token_store
from layerplan.corpus.encoders import Encoder, FastokensEncoder, TokenizersEncoder
from layerplan.corpus.manifest import Manifest
from layerplan.models.control_tokens import ControlTokens
from tests.tiny_corpus import make_text, write_jsonl
from tests.tiny_tokenizer import make_bytes, make_pieces, save_tokenizer

END, LATE, TOOL = 256, 257, 258
TEXTS = ["", "plain 字", "a<|end|>b", "<|end|><|end|>", "<|late|> <tool>", "<|end <|end|", "字<tool>\n<|late|>"]
BOTH = pytest.mark.parametrize("library", [FastokensEncoder, TokenizersEncoder])
OpenEncoder = Callable[..., Encoder]


def make_folder(folder: Path) -> Path:
    """Bytes, two control tokens, and an added token that is part of the vocabulary."""
    return save_tokenizer(
        folder,
        make_bytes(),
        control=("<|end|>", "<|late|>"),
        ordinary=("<tool>",),
        tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"},
    )


def encode(encoder: Encoder, *texts: str) -> list[list[int]]:
    return [np.frombuffer(ids, dtype=np.int32).tolist() for ids in encoder.encode(texts)]


@BOTH
def test_control_tokens_are_text_to_both_libraries_as_transformers_has_it(library: OpenEncoder, tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    content = (folder / "tokenizer.json").read_text(encoding="utf-8")
    oracle = AutoTokenizer.from_pretrained(folder)
    for control_tokens in ("text", "token"):
        splits = control_tokens == "text"
        expected = [oracle.encode(text, add_special_tokens=False, split_special_tokens=splits) for text in TEXTS]
        assert encode(library(content, control_tokens), *TEXTS) == expected
    found = {number for ids in encode(library(content), *TEXTS) for number in ids}
    assert TOOL in found and not {END, LATE} & found
    assert encode(library(content, "token"), "a<|end|>")[0][1:] == [END]


def make_merging() -> Tokenizer:
    """Byte pairs that join "</" and "s>" to the control token itself, and it to a longer entry."""
    pieces = ("<", "/", "s", ">", "x", "</", "s>", "</s>", "x</s>", "<unk>")
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("x", "</s>")]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    return Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))


def make_words() -> Tokenizer:
    """Whole words; the control tokens among them."""
    return Tokenizer(models.WordLevel({"x": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))


PIECES = ("<unk>", "</s>", "▁", "x", "<", "/", "s", ">")


@pytest.mark.parametrize(
    ("tokenizer", "text", "expected"),
    [
        (make_merging, "x</s></s>", ["x", "</", "s>", "</", "s>"]),
        (lambda: make_pieces(PIECES), "x</s>", ["▁", "x", "<", "/", "s", ">"]),
        (make_words, "</s>", ["<unk>"]),
    ],
    ids=["merges", "pieces", "words"],
)
def test_a_vocabulary_that_lists_its_control_tokens_does_not_find_them_in_text(
    tokenizer: Callable[[], Tokenizer], text: str, expected: list[str], tmp_path: Path
) -> None:
    """The libraries pass over the added token and find the entry; the ids of all others stay."""
    made = tokenizer()
    save_tokenizer(tmp_path, made, control=("<unk>", "</s>"))
    content = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    (ids,) = encode(TokenizersEncoder(content), text)
    assert [made.id_to_token(number) for number in ids] == expected
    assert made.token_to_id("</s>") in encode(TokenizersEncoder(content, "token"), text)[0]


def test_the_libraries_agree_when_merges_make_a_control_token(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, make_merging(), control=("<unk>", "</s>"))
    content = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    texts = ["x</s></s>", "</s", "s>x", "<</s>>"]
    assert encode(FastokensEncoder(content), *texts) == encode(TokenizersEncoder(content), *texts)


def test_control_tokens_are_counted_the_longest_at_each_place(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, make_bytes(), control=("<s>", "<s>[INST]", "[MASK]"), ordinary=("<tool>",))
    control = ControlTokens.from_json((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert [control.count(text) for text in ("", "<s", "a<s>b<s>", "<s>[INST]", "[MASK]<tool>[MASK")] == [0, 0, 2, 1, 1]
    save_tokenizer(tmp_path / "none", make_bytes(), ordinary=("<tool>",))
    none = ControlTokens.from_json((tmp_path / "none" / "tokenizer.json").read_text(encoding="utf-8"))
    assert none.count("<tool><s>") == 0


def build(folder: Path, name: str, **fields: Any) -> tuple[Manifest, list[int]]:
    """The manifest, and every id of the rows in order."""
    values: dict[str, Any] = {"seq_len": 64, "validation_rows": 0} | fields
    config = CorpusConfig(sources=[SourceConfig(path=str(folder / "raw.jsonl"))], **values)
    manifest = build_token_store(config, folder, folder / name, report=lambda line: None)
    rows = [pq.read_table(folder / name / shard.name)["input_ids"].to_pylist() for shard in manifest.shards]
    return manifest, [number for shard in rows for row in shard for number in row]


def test_a_store_counts_what_documents_spell_out_and_says_what_became_of_it(tmp_path: Path) -> None:
    """Of five documents two spell out three; a duplicate is counted as a duplicate and not again."""
    make_folder(tmp_path)
    texts = [make_text(1), "<|end|>" + make_text(2) + "<|late|>", make_text(3) + "<tool>", make_text(4) + "<|end|>"]
    write_jsonl(tmp_path / "raw.jsonl", *({"text": text} for text in [*texts, texts[3]]))
    manifest, ids = build(tmp_path, "text")
    assert (manifest.num_control_documents, manifest.num_control_tokens) == (2, 3)
    assert (manifest.sources[0].num_control_documents, manifest.sources[0].num_control_tokens) == (2, 3)
    assert (manifest.control_tokens, manifest.end_of_text, manifest.vocab_size) == ("text", "<|end|>", TOOL + 1)
    padding = manifest.num_padding_tokens
    assert (ids.count(END) - padding, ids.count(LATE), ids.count(TOOL)) == (4, 0, 1)
    asked, ids = build(tmp_path, "token", control_tokens="token")
    assert (asked.num_control_documents, asked.num_control_tokens, asked.control_tokens) == (2, 3, "token")
    assert (ids.count(END) - asked.num_padding_tokens, ids.count(LATE)) == (4 + 2, 1)
    assert manifest.num_tokens - asked.num_tokens == 2 * (len("<|end|>") - 1) + len("<|late|>") - 1
    assert asked.content_sha256 != manifest.content_sha256
