"""Tokenizers whose class in `transformers` splits text otherwise than their own file, as those of many models on the hub do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, Qwen2Tokenizer

from layerplan.models.causal_lm import load_tokenizer
from tests.tiny_tokenizer import BYTES, make_bytes, save_tokenizer

TEXT = "Hello  world, 1212:\n\n  的意思"
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def make_digits() -> Tokenizer:
    """Each digit alone, although `12` is an entry that a merge leads to: as SmolLM2 has it."""
    vocab = {piece: number for number, piece in enumerate([*BYTES, "12"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("1", "2")]))
    digits, pieces = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "kind"), [(make_bytes(), "LlamaTokenizerFast"), (make_digits(), "GPT2Tokenizer")]
)
def test_text_is_split_as_the_file_says_whatever_the_class(tokenizer: Tokenizer, kind: str, tmp_path: Path) -> None:
    tokenizer.decoder = decoders.ByteLevel()
    said: dict[str, Any] = {"tokenizer_class": kind, "eos_token": "</s>", "pad_token": "<pad>", "chat_template": CHAT}
    written = {"tokenizer_config": said, "config": {"model_type": "llama"}}
    folder = save_tokenizer(tmp_path, tokenizer, control=("<s>", "</s>"), begin=("<s>",), **written)

    found = load_tokenizer(str(folder))

    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert found(TEXT).input_ids == plain.encode(TEXT).ids != AutoTokenizer.from_pretrained(folder)(TEXT).input_ids
    assert found.decode(found(TEXT, add_special_tokens=False).input_ids) == TEXT
    assert (found.eos_token, found.pad_token) == ("</s>", "<pad>")
    assert found.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"


def test_a_class_that_splits_as_the_file_stays(tmp_path: Path) -> None:
    Qwen2Tokenizer(vocab={piece: number for number, piece in enumerate(BYTES)}, merges=[]).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    assert type(load_tokenizer(str(tmp_path))) is Qwen2Tokenizer
