"""The fast library gives the ids of `tokenizers`, whatever the text; where it does not, a build ends with an error."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from layerplan.config.corpus import CorpusConfig, SourceConfig
from layerplan.corpus import encoders
from layerplan.corpus.build import build_token_store, join_units
from layerplan.corpus.encoders import (
    FastokensEncoder,
    TokenizersEncoder,
    explain_fallback,
    is_in_sample,
    load_encoder,
)
from layerplan.corpus.manifest import Manifest
from layerplan.corpus.sources import list_units
from layerplan.corpus.tokenize import UnitTokenizer
from layerplan.errors import CorpusError
from layerplan.models.scratch import train_tokenizer
from tests.tiny_corpus import make_byte_tokenizer, make_disagreement, make_text, write_jsonl

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CAPITALS, SMALLS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERNS = {
    "qwen": [WORDS % 1],
    "llama-3": [WORDS % 3],
    "o200k": [
        rf"[^\r\n\p{{L}}\p{{N}}]?{CAPITALS}*{SMALLS}+{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?{CAPITALS}+{SMALLS}*{ENDINGS}"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "deepseek": [
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        r"[!-/:-~]?[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
}
BLOCKS = (0, 0x80, 0x300, 0x600, 0x900, 0xE00, 0x1E00, 0x2000, 0x20D0, 0x3000, 0x4E00, 0xAC00, 0xFF00, 0x1F600)
PLANTED = ("'s", "'RE", "'ſ", "<|endoftext|>", "<|endof", "İ", "ß", "\u3000", "\u2028", "\x85", "\r\n", " \n ", "  ")


def draw_text(rng: random.Random) -> str:
    """Stretches of Chinese, of one Unicode block, of any code points at all, and what regular expressions trip over."""
    draws: Sequence[Callable[[], str]] = (
        lambda: make_text(rng.randrange(10**6), rng.randint(1, 40)),
        lambda: "".join(map(chr, rng.choices(range(block := rng.choice(BLOCKS), block + 128), k=rng.randint(1, 8)))),
        lambda: "".join(chr(code) for code in rng.choices(range(0x110000), k=4) if not 0xD800 <= code < 0xE000),
        lambda: rng.choice(PLANTED),
        lambda: "".join(rng.choices("abcXYZ0123456789.,-_'\"() ", k=rng.randint(1, 20))),
    )
    return "".join(rng.choice(draws)() for _ in range(rng.randint(0, 50)))


def make_tokenizer(kind: str, folder: Path) -> str:
    """As the quick start trains one, or with the patterns of model families."""
    texts = [draw_text(random.Random(seed)) for seed in range(600)]
    if kind == "quick start":
        return train_tokenizer(texts, vocab_size=4000, out_dir=folder, max_length=64).to_str()
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama-3", byte_fallback=kind == "llama-2"))
    alphabet: list[str] = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    if kind == "llama-2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        alphabet = []
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        tokenizer.normalizer = normalizers.NFC() if kind == "qwen" else None
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in PATTERNS[kind]]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, special_tokens=special, initial_alphabet=alphabet, show_progress=False, limit_alphabet=2000
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


@pytest.mark.parametrize("kind", ["quick start", "qwen", "llama-3", "llama-2", "o200k", "deepseek"])
def test_ids_are_those_of_tokenizers(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encoders, "CHECK_EVERY", 10**9)
    content = make_tokenizer(kind, tmp_path)
    rng = random.Random(kind)
    texts = [draw_text(rng) for _ in range(2000)] + [make_text(1, 600_000)]
    fast = FastokensEncoder(content).encode(texts)
    exact = TokenizersEncoder(content).encode(texts)
    differ = [text for text, one, other in zip(texts, fast, exact, strict=True) if one != other]
    assert not differ, f"{len(differ)} of {len(texts)}, the shortest is {min(differ, key=len)!r}"
    assert sum(map(len, exact)) > 4 * len(texts)


def test_other_kinds_of_tokenizer_take_the_slow_way():
    """And the user is told why."""
    unigram = Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], 0)).to_str()
    encoder = load_encoder(unigram, "auto")
    assert isinstance(encoder, TokenizersEncoder)
    assert "fastokens does not know this kind" in str(explain_fallback(unigram, "auto"))
    assert explain_fallback(unigram, "tokenizers") is None
    assert [np.frombuffer(ids, dtype=np.int32).tolist() for ids in encoder.encode(["ab", "b"])] == [[0, 1], [1]]


def test_library_is_chosen_by_the_config(tmp_path: Path):
    content = make_byte_tokenizer(tmp_path).read_text(encoding="utf-8")
    assert isinstance(load_encoder(content, "auto"), FastokensEncoder)
    assert explain_fallback(content, "auto") is None
    assert isinstance(load_encoder(content, "tokenizers"), TokenizersEncoder)


def test_settings_for_other_uses_are_put_aside(tmp_path: Path):
    """A tokenizer file may cut texts, fill them up or merge at random; a corpus wants every token, the same each time."""
    plain = make_tokenizer("quick start", tmp_path)
    tokenizer = Tokenizer.from_str(plain)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=8)
    content = json.loads(tokenizer.to_str())
    content["model"]["dropout"] = 0.5
    texts = ["", "字", make_text(3, 5000)]
    expected = TokenizersEncoder(plain).encode(texts)
    assert len(expected[2]) > 1000
    for library in (FastokensEncoder, TokenizersEncoder):
        assert library(json.dumps(content)).encode(texts) == expected


def test_the_first_text_and_a_sample_are_checked(tmp_path: Path):
    encoder = FastokensEncoder(make_tokenizer("quick start", tmp_path))
    encoder._reference = TokenizersEncoder(make_byte_tokenizer(tmp_path).read_text(encoding="utf-8"))
    first, *texts = [make_text(number) for number in range(20 * encoders.CHECK_EVERY)]
    with pytest.raises(CorpusError, match="tokenizer_library=auto: fastokens gives other ids") as failure:
        encoder.encode([first])
    assert repr(first[:40]) in str(failure.value)
    sample = [text for text in texts if is_in_sample(text)]
    assert 5 < len(sample) < 40
    encoder.encode([text for text in texts if text not in sample])
    for text in sample[:3]:
        with pytest.raises(CorpusError):
            encoder.encode([texts[0], text])


def test_a_worker_tells_of_a_disagreement(tmp_path: Path):
    disagreement = make_disagreement(tmp_path)
    content = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    batch = {"units": list(join_units(list_units(disagreement), num_workers=1))}
    tables = UnitTokenizer(disagreement, content, ())(batch)
    assert next(tables).num_rows == 256
    with pytest.raises(
        CorpusError, match=r"^corpus\.tokenizer_library=auto: fastokens gives other ids than tokenizers"
    ):
        next(tables)


def test_a_store_is_of_one_library(tmp_path: Path):
    """What was written before a disagreement was found may be wrong too: no build goes on from there."""
    disagreement = make_disagreement(tmp_path)

    def build(config: CorpusConfig) -> Manifest:
        return build_token_store(config, tmp_path / "tokenizer.json", tmp_path / "store", report=lambda line: None)

    with pytest.raises(CorpusError, match="set it to tokenizers, and remove the unfinished store"):
        build(disagreement)
    assert list((tmp_path / "store").glob("shard_*.parquet"))
    slow = disagreement.model_copy(update={"tokenizer_library": "tokenizers"})
    with pytest.raises(CorpusError, match="an unfinished build with another corpus config"):
        build(slow)
    shutil.rmtree(tmp_path / "store")
    assert build(slow).counts["kept"] == 301


def test_stores_are_the_same_bytes(tmp_path: Path):
    """And a finished one may be found with the other library's setting."""
    write_jsonl(tmp_path / "raw.jsonl", *({"id": str(seed), "text": make_text(seed, 800)} for seed in range(200)))
    (tmp_path / "tokenizer.json").write_text(make_tokenizer("qwen", tmp_path), encoding="utf-8")
    stores = []
    for library in ("auto", "tokenizers"):
        fields: dict[str, Any] = {"seq_len": 64, "rows_per_group": 4, "tokenizer_library": library}
        config = CorpusConfig(sources=[SourceConfig(path=str(tmp_path / "raw.jsonl"))], **fields)
        build_token_store(config, tmp_path / "tokenizer.json", tmp_path / library, report=lambda line: None)
        stores.append({path.name: path.read_bytes() for path in (tmp_path / library).iterdir()})
    assert stores[0] == stores[1]
    config = CorpusConfig(sources=[SourceConfig(path=str(tmp_path / "raw.jsonl"))], seq_len=64, rows_per_group=4)
    build_token_store(config, tmp_path / "tokenizer.json", tmp_path / "tokenizers", report=lambda line: None)
