"""Tokenizers whose class in `transformers` splits text otherwise than their own file, as those of many models on the hub do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2Tokenizer, Qwen2Tokenizer

from layerplan.corpus.encoders import TokenizersEncoder
from layerplan.errors import ModelError
from layerplan.models.causal_lm import load_tokenizer
from layerplan.models.written_tokenizer import name_plain_class
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
    before = (tmp_path / "tokenizer_config.json").read_bytes()
    assert name_plain_class(tmp_path) is None and (tmp_path / "tokenizer_config.json").read_bytes() == before


@pytest.mark.parametrize("config", [{"tokenizer_class": "LlamaTokenizerFast", "chat_template": CHAT}, None])
def test_who_opens_an_export_gets_the_tokens_of_its_training(config: dict[str, Any] | None, tmp_path: Path) -> None:
    """By transformers alone; what the class called its tokens keeps its name."""
    files = {"config": {"model_type": "gpt2" if config is None else "llama"}}
    files |= {} if config is None else {"tokenizer_config": config}
    folder = save_tokenizer(tmp_path, make_digits(), control=("<|endoftext|>",), **files)
    wanted = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    taken = AutoTokenizer.from_pretrained(folder)
    assert taken(TEXT).input_ids != wanted

    assert name_plain_class(folder) == type(taken).__name__

    opened = AutoTokenizer.from_pretrained(folder)
    assert opened(TEXT).input_ids == wanted == load_tokenizer(str(folder))(TEXT).input_ids
    assert (opened.chat_template == CHAT) == (config is not None)
    assert config is not None or opened.eos_token == "<|endoftext|>"
    assert name_plain_class(folder) is None


def add(text: str, **flags: Any) -> dict[str, Any]:
    return {
        "content": text,
        **dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word", "special"), False),
    } | flags


@pytest.mark.parametrize(
    "said",
    [
        {"added_tokens_decoder": {"300": add("Hello")}},
        {"added_tokens_decoder": {"256": add("<s>", special=True, lstrip=True, rstrip=True)}},
        {"extra_special_tokens": ["world"]},
        {"pad_token": "[PAD]"},
        {"split_special_tokens": True},
    ],
    ids=str,
)
def test_nothing_beside_the_file_changes_an_id(said: dict[str, Any], tmp_path: Path) -> None:
    written = {
        "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"} | said,
        "config": {"model_type": "llama"},
    }
    folder = save_tokenizer(tmp_path, make_bytes(), control=("<s>", "</s>"), begin=("<s>",), **written)
    text = "Hello <s> world [PAD]"

    found, plain = load_tokenizer(str(folder)), Tokenizer.from_file(str(folder / "tokenizer.json"))

    assert found(text).input_ids == plain.encode(text).ids
    assert len(found) == plain.get_vocab_size()


def test_an_end_that_is_no_entry_is_none(tmp_path: Path) -> None:
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "a"}
    folder = save_tokenizer(tmp_path, make_bytes(), tokenizer_config=said, config={"model_type": "llama"})
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == len(BYTES)  # a row that the model does not have
    assert load_tokenizer(str(folder)).eos_token_id is None


def test_mistrals_own_class_for_a_tekken_file_gives_way(tmp_path: Path) -> None:
    common = pytest.importorskip("mistral_common", reason="the package mistral_common is not installed")
    written = {"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"}, "config": {"model_type": "mistral"}}
    folder = save_tokenizer(tmp_path, make_bytes(), **written)
    (folder / "tekken.json").symlink_to(Path(common.__file__).parent / "data" / "tekken_240911.json")
    assert type(AutoTokenizer.from_pretrained(folder)).__name__ == "MistralCommonBackend"
    assert (
        load_tokenizer(str(folder))(TEXT).input_ids
        == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    )


def test_merges_are_not_drawn_by_chance(tmp_path: Path) -> None:
    tokenizer = Tokenizer(
        models.BPE({**{piece: number for number, piece in enumerate(BYTES)}, "12": 256}, [("1", "2")])
    )
    tokenizer.model.dropout = 0.5
    folder = save_tokenizer(tmp_path, tokenizer, config={"model_type": "llama"})
    corpus = TokenizersEncoder((folder / "tokenizer.json").read_text(encoding="utf-8"))
    found = load_tokenizer(str(folder))("12" * 100).input_ids
    assert found == [256] * 100 == np.frombuffer(corpus.encode(["12" * 100])[0], dtype=np.int32).tolist()


def test_what_a_class_calls_its_tokens_and_how_they_read_is_kept(tmp_path: Path) -> None:
    tokenizer = make_digits()
    assert tokenizer.decoder is None
    folder = save_tokenizer(tmp_path, tokenizer, control=("<|endoftext|>",), config={"model_type": "gpt2"})
    found = load_tokenizer(str(folder))
    assert type(found) is not GPT2Tokenizer and found.eos_token_id == 257
    assert found.decode(found(TEXT).input_ids) == TEXT


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, make_bytes(), config={"model_type": "llama"})
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(content | {"pre_tokenizer": {"type": "OfTomorrow"}}))
    with pytest.raises(ModelError, match=r"the tokenizer cannot be loaded \(data did not match"):
        load_tokenizer(str(folder))
