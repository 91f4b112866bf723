"""The ids of a long text do not say that it was encoded in pieces."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from layerplan.corpus.encoders import TokenizersEncoder
from layerplan.corpus.long_texts import cut_text
from tests.tiny_corpus import make_text
from tests.unit.test_corpus_encoders import draw_text, make_tokenizer

KINDS = ["quick start", "qwen", "llama-3", "llama-2", "o200k", "deepseek", "unigram", "word pieces", "characters"]


def make_any_tokenizer(kind: str, folder: Path) -> TokenizersEncoder:
    """Byte pairs as families split them, and the other models of the `tokenizers` library."""
    texts = [draw_text(random.Random(seed)) for seed in range(300)]
    if kind == "unigram":
        letters = ["<unk>", "▁", *"abcdefghijklmnopqrstuvwxyzé\n"]
        pairs = ["▁" + a for a in letters[2:]] + [a + b for a in letters[2:] for b in letters[2:]]
        tokenizer = Tokenizer(models.Unigram([(piece, -3.0 - len(piece)) for piece in letters + pairs], unk_id=0))
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    elif kind == "word pieces":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        tokenizer.train_from_iterator(
            texts, trainers.WordPieceTrainer(vocab_size=3000, special_tokens=["[UNK]"], show_progress=False)
        )
    elif kind == "characters":
        tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "▁": 1, "\n": 2, "?": 3}, merges=[], unk_token="?"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        return TokenizersEncoder(make_tokenizer(kind, folder))
    return TokenizersEncoder(tokenizer.to_str())


def draw_long_texts() -> list[str]:
    """Prose, indented code, one line without end, spaces, accents that join the letter before them, anything."""
    rng = random.Random("long")
    code = "".join(" " * (4 * rng.randrange(4)) + make_text(seed, 30) + "\n" * rng.randint(1, 3) for seed in range(60))
    return [
        "\n\n".join(make_text(seed, 80) for seed in range(30)),
        code,
        make_text(7, 4000).replace("\n", " "),
        "word " * 700,
        ("\n" * 40 + " " * 40 + "x") * 20,
        "e\u0301te\u0301 " * 400,
        "".join(draw_text(rng) for _ in range(30)),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_give_the_ids_of_the_whole(kind: str, tmp_path: Path):
    encoder = make_any_tokenizer(kind, tmp_path)
    for text in draw_long_texts():
        pieces = cut_text(text, encoder, limit=700)
        assert len(pieces) > 1 and all(0 < len(piece.text) <= 701 for piece in pieces)
        assert "".join([pieces[0].text, *(piece.text[1:] for piece in pieces[1:])]) == text
        found = b"".join(piece.take(*encoder.encode([piece.text])) for piece in pieces)
        assert found == encoder.encode([text])[0], text[:40]


def test_line_ends_go_before_other_places(tmp_path: Path):
    encoder = make_any_tokenizer("quick start", tmp_path)
    text = "line one\nline two\n" * 40
    assert [piece.text[-1] for piece in cut_text(text, encoder, limit=100)] == ["\n"] * 8
    assert cut_text("", encoder) == []
    assert [piece.text for piece in cut_text("short", encoder)] == ["short"]
