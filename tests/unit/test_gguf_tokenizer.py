"""Tokenizers of GGUF files against those they were stored from: SentencePiece's own, and byte-level ones as models publish them.

Vocabularies are trained here on Python's documentation and some Chinese. By hand, real ones were compared as well (docs/log.md).
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from layerplan.models.causal_lm import load_tokenizer
from layerplan.models.gguf_file import open_gguf
from layerplan.models.gguf_tokenizer import doubt_tokenizer, write_tokenizer
from tests.tiny_gguf import gguf

TEXTS = [
    *("", "a", " a", "  a", "\n =", "Hello, y'all! I'll go.", " leading and  double  spaces ", "\t\ttabs\n\n\n  x"),
    *(
        "3333",
        "12 345 6",
        "x  2",
        "in 1999,  200 or ½",
        "价格是1314元，我想去。",
        "Cửa Việt 😶‍🌫️",
        "a=b+c$%^~|`",
        "def f(x):\n    return x**2",
    ),
    *(text for name, text in sorted(topics.items()) if name in ("numbers", "strings", "operator-summary")),
]
ADDED = ["<｜end▁of▁text｜>", "<｜start▁of▁text｜>", "   ", "<fim>"]
"""Three of which have no spelling in a byte-level vocabulary's characters; the last two are user-defined."""


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def bytes_only() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
PUBLISHED = {
    "gpt-2": gpt2,
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2()]),
    "falcon": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            gpt2(),
            pre_tokenizers.Digits(individual_digits=False),
            split("[0-9][0-9][0-9]"),
        ]
    ),
    "deepseek-coder": lambda: pre_tokenizers.Sequence(
        [
            *map(split, (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+")),
            pre_tokenizers.Digits(individual_digits=True),
            bytes_only(),
        ]
    ),
    "bloom": lambda: pre_tokenizers.Sequence([split(r" ?[^(\s|.,!?…。，、।۔،)]+"), bytes_only()]),
    "llama-bpe": lambda: pre_tokenizers.Sequence([split(LLAMA3), bytes_only()]),
    "qwen2": lambda: pre_tokenizers.Sequence([split(QWEN2), bytes_only()]),
    "stablelm2": lambda: pre_tokenizers.Sequence([split(QWEN2), bytes_only()]),
}
"""How models of these rules split text, by their `tokenizer.json`."""


def train_byte_level(rule: str, *, whole: str = "") -> Tokenizer:
    """`whole` becomes an entry that no merge leads to, taken before merges are looked at."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = PUBLISHED[rule](), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([*topics.values(), *TEXTS * 20], trainer)
    if whole:
        content = json.loads(tokenizer.to_str())
        content["model"]["vocab"][whole] = tokenizer.get_vocab_size()
        content["model"]["ignore_merges"] = True
        tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ADDED[:2]])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ADDED[2:]])
    return tokenizer


def write_vocabulary(
    path: Path, kind: str, tokens: list[Any], types: list[int], *, arch: str = "llama", **extra: Any
) -> Path:
    """A GGUF file without weights; `extra` are values of `tokenizer.ggml.`."""
    writer = gguf.GGUFWriter(str(path), arch)
    for add, value in (
        (writer.add_context_length, 128),
        (writer.add_embedding_length, 64),
        (writer.add_block_count, 2),
        (writer.add_feed_forward_length, 96),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-6),
        (writer.add_vocab_size, len(tokens)),
        (writer.add_tokenizer_model, kind),
        (writer.add_token_list, tokens),
        (writer.add_token_types, types),
    ):
        add(value)
    for name, value in extra.items():
        if isinstance(value, list) and isinstance(value[0], str):
            writer.add_token_merges(value)
        elif isinstance(value, list):
            writer.add_token_scores(value)
        elif isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{name}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"tokenizer.ggml.{name}", value)
        else:
            writer.add_string(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def store_byte_level(path: Path, tokenizer: Tokenizer, rule: str | None, **extra: Any) -> Path:
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    added = tokenizer.get_added_tokens_decoder()
    types = [(3 if added[number].special else 4) if number in added else 1 for number in range(len(tokens))]
    merges = [" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    ends = {"eos_token_id": vocab[ADDED[0]], "bos_token_id": vocab[ADDED[1]]}
    said = {} if rule is None else {"pre": rule}
    return write_vocabulary(path, "gpt2", tokens, types, merges=merges, **said | ends | extra)


def convert(path: Path, folder: Path) -> Tokenizer:
    """The written `tokenizer.json`, which `transformers` must read as `tokenizers` does."""
    folder.mkdir()
    write_tokenizer(open_gguf(path), folder / "work", folder)
    made, theirs = Tokenizer.from_file(str(folder / "tokenizer.json")), load_tokenizer(str(folder))
    for text in TEXTS:
        assert theirs.encode(text) == made.encode(text).ids, text
    return made


@pytest.mark.parametrize("rule", PUBLISHED)
def test_a_byte_level_vocabulary_gives_the_tokens_of_the_tokenizer_it_was_stored_from(
    rule: str, tmp_path: Path
) -> None:
    tokenizer = train_byte_level(rule)
    path = store_byte_level(tmp_path / "v.gguf", tokenizer, rule, add_bos_token=False)
    made = convert(path, tmp_path / "made")
    for text in [*TEXTS, "so<｜end▁of▁text｜>it    ends", "a<fim>b"]:
        assert made.encode(text).ids == tokenizer.encode(text).ids, text
        assert made.decode(made.encode(text).ids) == tokenizer.decode(tokenizer.encode(text).ids)
    assert made.get_vocab() == tokenizer.get_vocab()
    theirs = load_tokenizer(str(tmp_path / "made"))
    assert (theirs.eos_token, theirs.eos_token_id) == (ADDED[0], tokenizer.token_to_id(ADDED[0]))
    assert len(theirs) == tokenizer.get_vocab_size(), "no id that the model has no row for"
    assert doubt_tokenizer(open_gguf(path)) == ""


def test_a_rule_may_take_entries_whole_that_no_merge_leads_to(tmp_path: Path) -> None:
    """Llama 3's `ignore_merges`: its words are not all made of its merges."""
    tokenizer = train_byte_level("llama-bpe", whole="Qwertyuiop")
    made = convert(store_byte_level(tmp_path / "v.gguf", tokenizer, "llama-bpe"), tmp_path / "made")
    begin = tokenizer.token_to_id(ADDED[1])
    for text in (*TEXTS, "Qwertyuiop", "a Qwertyuiop"):
        assert made.encode(text).ids == [begin, *tokenizer.encode(text).ids], text
    assert len(made.encode("Qwertyuiop").ids) == 2


@pytest.mark.parametrize(("begins", "ends"), [(True, True), (False, True), (True, False)])
def test_what_stands_before_and_after_a_text_is_what_the_file_says(begins: bool, ends: bool, tmp_path: Path) -> None:
    tokenizer = train_byte_level("gpt-2")
    path = store_byte_level(tmp_path / "v.gguf", tokenizer, "gpt-2", add_bos_token=begins, add_eos_token=ends)
    made = convert(path, tmp_path / "made")
    end, begin = (tokenizer.token_to_id(text) for text in ADDED[:2])
    inner = tokenizer.encode("a text").ids
    assert made.encode("a text").ids == [begin] * begins + inner + [end] * ends
    assert made.encode("a text", add_special_tokens=False).ids == inner


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_vocabulary_gives_the_tokens_of_sentencepiece(prefix: bool, tmp_path: Path) -> None:
    stored = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join([*topics.values(), *TEXTS * 20]).splitlines()),
        model_writer=stored,
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        add_dummy_prefix=prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_proto=stored.getvalue())
    numbers = range(theirs.get_piece_size())
    types = [
        2 if theirs.is_unknown(n) else 3 if theirs.is_control(n) else 6 if theirs.is_byte(n) else 1 for n in numbers
    ]
    scores = [theirs.get_score(number) for number in numbers]
    known = {"bos_token_id": theirs.bos_id(), "eos_token_id": theirs.eos_id(), "unknown_token_id": theirs.unk_id()}
    said = {} if prefix else {"add_space_prefix": False}
    tokens = [theirs.id_to_piece(number) for number in numbers]
    path = write_vocabulary(tmp_path / "v.gguf", "llama", tokens, types, scores=scores, **known, **said)
    made = convert(path, tmp_path / "made")
    for text in TEXTS:
        assert made.encode(text).ids == theirs.encode(text, add_bos=True), text
        assert made.decode(made.encode(text).ids) == text


def test_a_rule_that_nobody_here_knows_is_told(tmp_path: Path) -> None:
    path = store_byte_level(tmp_path / "v.gguf", train_byte_level("gpt-2"), "klingon")
    assert doubt_tokenizer(open_gguf(path)) == (
        "the tokenizer's rule 'klingon' is not known here, and text is split as GPT-2 does"
    )


def test_a_file_that_names_no_rule_has_that_of_its_architecture_or_says_so(tmp_path: Path) -> None:
    """As files of before May 2024, those of Qwen 1.5 and of Llama 3's first week among them."""
    tokenizer = train_byte_level("qwen2")
    named = store_byte_level(tmp_path / "named.gguf", tokenizer, None, arch="qwen2", add_bos_token=False)
    made = convert(named, tmp_path / "made")
    assert [made.encode(text).ids for text in TEXTS] == [tokenizer.encode(text).ids for text in TEXTS]
    assert doubt_tokenizer(open_gguf(named)) == ""
    unnamed = store_byte_level(tmp_path / "unnamed.gguf", tokenizer, None)
    assert doubt_tokenizer(open_gguf(unnamed)).startswith("the file names no rule by which text is split")
