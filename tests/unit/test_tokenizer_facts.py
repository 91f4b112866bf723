"""What a model's files say about its tokenizer; the oracle is `transformers`, where it can tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, processors
from transformers import AutoTokenizer

from layerplan.errors import ModelError
from layerplan.models.tokenizer_facts import describe_tokenizer, read_tokenizer_facts
from tests.tiny_tokenizer import make_bytes, make_pieces, save_tokenizer

FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
DEEPSEEK = {"__type": "AddedToken", "content": "<｜end▁of▁sentence｜>", "lstrip": False, "normalized": True}
NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "<eos> beside </s>": ("<eos>", {"tokenizer_config": FAST | {"eos_token": "<eos>"}}),
    "[EOS] beside <|im_end|>": ("[EOS]", {"tokenizer_config": FAST | {"eos_token": "[EOS]"}}),
    "DeepSeek": ("<｜end▁of▁sentence｜>", {"tokenizer_config": FAST | {"eos_token": DEEPSEEK}}),
    "Command R": ("<|END_OF_TURN_TOKEN|>", {"tokenizer_config": FAST | {"eos_token": "<|END_OF_TURN_TOKEN|>"}}),
    "Seed": ("<seed:eos>", {"tokenizer_config": FAST | {"eos_token": "<seed:eos>"}}),
    "older layout": (
        "<eos>",
        {"tokenizer_config": FAST | {"eos_token": "</s>"}, "special_tokens_map": {"eos_token": "<eos>"}},
    ),
    "newer layout": (
        "<eos>",
        {
            "tokenizer_config": FAST | {"eos_token": "<eos>", "added_tokens_decoder": {}},
            "special_tokens_map": {"eos_token": "</s>"},
        },
    ),
    "special_tokens_map": (
        "[EOS]",
        {"tokenizer_config": FAST, "special_tokens_map": {"eos_token": {"content": "[EOS]"}}},
    ),
}
ENDS = ("<eos>", "[EOS]", "<｜end▁of▁sentence｜>", "<EOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<seed:eos>", "<|im_end|>")


def save(folder: Path, **files: Any) -> Path:
    """A tokenizer with all of `ENDS`, and `</s>` as an ordinary entry."""
    return save_tokenizer(folder, make_bytes(("</s>",)), control=ENDS, **files)


@pytest.mark.parametrize("name", NAMED)
def test_the_end_of_text_is_the_one_transformers_reads(name: str, tmp_path: Path) -> None:
    expected, files = NAMED[name]
    facts = read_tokenizer_facts(save(tmp_path, **files))
    assert facts.end.text == expected
    assert facts.end.id == AutoTokenizer.from_pretrained(tmp_path).eos_token_id


def test_configs_tell_the_end_where_the_tokenizer_names_none(tmp_path: Path) -> None:
    """Ids, of which the first counts; `config.json` before `generation_config.json`."""
    save(tmp_path, config={"eos_token_id": [258, 257]}, generation_config={"eos_token_id": 259})
    facts = read_tokenizer_facts(tmp_path)
    assert (facts.end.id, facts.end.text, facts.end_source) == (258, ENDS[1], "config.json")
    (tmp_path / "config.json").unlink()
    assert read_tokenizer_facts(tmp_path).end.text == ENDS[2]


def test_a_conflict_is_said_in_one_line_that_names_every_file(tmp_path: Path) -> None:
    agree = save(tmp_path / "agree", tokenizer_config=FAST | {"eos_token": "<eos>"}, config={"eos_token_id": [9, 257]})
    assert read_tokenizer_facts(agree).notes == ()
    settings = FAST | {"eos_token": "<nowhere>", "added_tokens_decoder": {}}
    save(
        tmp_path,
        tokenizer_config=settings,
        special_tokens_map={"eos_token": "[EOS]"},
        config={"eos_token_id": 257},
    )
    facts = read_tokenizer_facts(tmp_path)
    assert facts.end.text == "[EOS]"
    (note,) = facts.notes
    assert note == (
        "end of text: special_tokens_map.json names '[EOS]' (258), but tokenizer_config.json \"<nowhere>\" (no entry),"
        " config.json 257; the first is taken"
    )
    assert note in describe_tokenizer(facts)


def test_an_end_that_no_file_names_is_taken_by_its_name_only_when_it_is_the_only_one(tmp_path: Path) -> None:
    alone = save_tokenizer(tmp_path / "alone", make_bytes(), control=("<|endoftext|>", "<mark>"))
    assert read_tokenizer_facts(alone).end.text == "<|endoftext|>"
    with pytest.raises(
        ModelError, match=r"no file names the end-of-text token; set corpus.end_of_text to one of </s>, <"
    ):
        read_tokenizer_facts(save(tmp_path / "several"))
    asked = read_tokenizer_facts(tmp_path / "several", end_of_text="[EOS]")
    assert (asked.end.text, asked.end_source) == ("[EOS]", "corpus.end_of_text")
    with pytest.raises(ModelError, match=r"corpus.end_of_text='<gone>': .* has no such entry"):
        read_tokenizer_facts(tmp_path / "several", end_of_text="<gone>")
    none = save_tokenizer(tmp_path / "none", make_bytes(), config={"eos_token_id": 4000})
    with pytest.raises(
        ModelError, match=r"config.json names 4000, which is no entry; set corpus.end_of_text to the entry"
    ):
        read_tokenizer_facts(none)


def test_an_end_that_the_tokenizer_itself_puts_after_a_text_is_taken(tmp_path: Path) -> None:
    """As those of T5 and BERT do; beside names that would be taken otherwise."""
    tokenizer = make_bytes()
    tokenizer.add_special_tokens(["[CLS]", "[STOP]", "</s>", "<eos>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [STOP]", special_tokens=[("[CLS]", 256), ("[STOP]", 257)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    facts = read_tokenizer_facts(tmp_path)
    assert (facts.end.text, [token.text for token in facts.begin]) == ("[STOP]", ["[CLS]"])


@pytest.mark.parametrize("begin", [(), ("<s>",), ("[gMASK]", "<sop>")])
def test_the_begin_is_what_the_tokenizer_puts_before_a_text(begin: tuple[str, ...], tmp_path: Path) -> None:
    """Not what is merely called so: GPT-2, Qwen and DeepSeek name one and put none."""
    settings = FAST | {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    control = ("<s>", "[gMASK]", "<sop>", "</s>", "<pad>")
    save_tokenizer(tmp_path, make_bytes(), control=control, begin=begin, tokenizer_config=settings)
    facts = read_tokenizer_facts(tmp_path)
    oracle = AutoTokenizer.from_pretrained(tmp_path)
    assert [token.id for token in facts.begin] == oracle.encode("字")[: len(begin)]
    assert [token.text for token in facts.begin] == list(begin)
    assert (str(facts.named_begin), str(facts.pad)) == ("'<s>' (256)", "'<pad>' (260)")
    assert (facts.named_begin.id, facts.pad.id) == (oracle.bos_token_id, oracle.pad_token_id)


def word_level(words: tuple[str, ...]) -> Tokenizer:
    return Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[-1]))


@pytest.mark.parametrize(
    ("tokenizer", "control", "ordinary", "num_text_ids", "num_ids"),
    [
        (make_bytes, ("</s>", "<late>"), (), 257, 258),
        (lambda: make_bytes(("nobody",)), ("</s>",), (), 258, 258),
        (lambda: make_bytes(("nobody", "makes")), (), ("</s>",), 259, 259),
        (make_bytes, ("</s>", "<late>"), ("<tool>",), 259, 259),
        (lambda: word_level(("</s>", "a", "?")), ("</s>",), (), 3, 3),
        (lambda: make_pieces(("<unk>", "</s>", "▁", "a", "▁a", "last")), ("<unk>", "</s>"), (), 6, 6),
    ],
    ids=["a control token", "an entry no merge makes", "an added end", "an added word", "the unknown", "a piece"],
)
def test_only_ids_that_a_text_can_yield_count(
    tokenizer: Any,
    control: tuple[str, ...],
    ordinary: tuple[str, ...],
    num_text_ids: int,
    num_ids: int,
    tmp_path: Path,
) -> None:
    """One more than the highest of them, of the 256 bytes or the pieces listed, by hand."""
    save_tokenizer(tmp_path, tokenizer(), control=control, ordinary=ordinary, config={"eos_token_id": None})
    facts = read_tokenizer_facts(tmp_path)
    assert (facts.num_text_ids, facts.num_ids) == (num_text_ids, num_ids)
    assert [token.text for token in facts.control] == list(control)
    assert [token.text for token in facts.added] == list(ordinary)


def test_a_changed_file_is_read_anew_and_a_broken_one_is_named(tmp_path: Path) -> None:
    save(tmp_path, tokenizer_config=FAST | {"eos_token": "<eos>"})
    assert read_tokenizer_facts(tmp_path / "tokenizer.json").end.text == "<eos>"
    save(tmp_path, tokenizer_config=FAST | {"eos_token": "<seed:eos>"})
    assert read_tokenizer_facts(tmp_path).end.text == "<seed:eos>"
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"config.json: cannot be read"):
        read_tokenizer_facts(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match=r"tokenizer.json: is not a readable tokenizer"):
        read_tokenizer_facts(tmp_path)
    with pytest.raises(ModelError, match=r"nowhere.*: cannot be read"):
        read_tokenizer_facts(tmp_path / "nowhere")
