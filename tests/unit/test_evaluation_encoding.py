"""Prompts as ids: what stands before them, the letter's token as it follows the cue, and control tokens in questions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, processors
from transformers import AutoTokenizer

from eval.encoding import count_control_tokens, describe_encoding, encode_prompts, find_answer_tokens
from eval.items import LETTERS
from tests.tiny_tokenizer import make_bytes, make_pieces, save_tokenizer

FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
CUE = "\n答案："
PIECES = ("<unk>", "<s>", "</s>", "▁", *"\n答案：ABCD<s/>", *(f"▁{letter}" for letter in LETTERS))
PROMPTS = ["题目\nA. 甲\n答案：", "B\n答案："]


def open_tokenizer(folder: Path, tokenizer: Tokenizer, *begin: str) -> Any:
    """As `transformers` opens it."""
    return AutoTokenizer.from_pretrained(
        save_tokenizer(folder, tokenizer, control=("<s>", "</s>"), begin=begin, tokenizer_config=FAST)
    )


def test_the_letter_is_the_token_that_follows_the_cue(tmp_path: Path) -> None:
    """A dummy space is put before a text: "▁A" alone, "A" after a cue, "▁A" after a cue and a space."""
    tokenizer = open_tokenizer(tmp_path, make_pieces(PIECES), "<s>")
    found = find_answer_tokens(tokenizer, "m", cue=CUE, prefix="")
    oracle = [tokenizer.encode(CUE + letter)[-1] for letter in LETTERS]
    assert [list(found.letters), found.appended] == [oracle, ()]
    assert tokenizer.convert_ids_to_tokens(oracle) == list(LETTERS)
    spaced = find_answer_tokens(tokenizer, "m", cue=CUE, prefix=" ")
    assert tokenizer.convert_ids_to_tokens(spaced.letters) == ["▁A", "▁B", "▁C", "▁D"]
    assert tokenizer.convert_ids_to_tokens([tokenizer.encode(letter)[-1] for letter in LETTERS])[0] == "▁A"


def make_joining() -> Tokenizer:
    """Byte pairs that join the cue's colon with each letter."""
    pieces = ("<unk>", *"\n答案：ABCD", *(f"：{letter}" for letter in LETTERS))
    vocab = {piece: number for number, piece in enumerate(pieces)}
    merges = [("：", letter) for letter in LETTERS]
    return Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))


def test_a_cue_that_joins_with_the_letter_leaves_the_letter_as_it_stands_after_other_text(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(tmp_path, make_joining())
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(CUE + "A"))[-1] == "：A"
    found = find_answer_tokens(tokenizer, "m", cue=CUE, prefix="")
    assert tokenizer.convert_ids_to_tokens(found.letters) == list(LETTERS)


@pytest.mark.parametrize("make", [make_bytes, lambda: make_pieces(PIECES)], ids=["bytes", "pieces"])
@pytest.mark.parametrize("begin", [(), ("<s>",)], ids=["no begin", "begin"])
def test_lm_eval_pairs_are_those_of_the_harness(
    begin: tuple[str, ...], make: Callable[[], Tokenizer], tmp_path: Path
) -> None:
    """`HFLM.tok_encode` and `_encode_pair` of 0.4.13: with the tokenizer's own begin; context, then the rest by length."""
    tokenizer = open_tokenizer(tmp_path, make(), *begin)
    tokens = find_answer_tokens(tokenizer, "m", cue=CUE, prefix=" ")
    ours = encode_prompts(tokenizer, PROMPTS, add_special_tokens=True, control_tokens="token")
    for prompt, ids in zip(PROMPTS, ours, strict=True):
        for letter, last in zip(LETTERS, tokens.letters, strict=True):
            context, whole = tokenizer.encode(prompt), tokenizer.encode(f"{prompt} {letter}")
            assert [*ids, *tokens.appended, last] == context + whole[len(context) :]
        assert ids[: len(begin)] == tokenizer.convert_tokens_to_ids(list(begin))


def test_what_a_tokenizer_puts_after_a_text_is_left_out_of_a_prompt(tmp_path: Path) -> None:
    made = make_bytes()
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path, made, tokenizer_config=FAST))
    bare = tokenizer.encode("题", add_special_tokens=False)
    assert tokenizer.encode("题") == [256, *bare, 257]
    assert encode_prompts(tokenizer, ["题"], add_special_tokens=True) == [[256, *bare]]
    assert encode_prompts(tokenizer, ["题"], add_special_tokens=False) == [bare]


@pytest.mark.parametrize("make", [make_bytes, lambda: make_pieces(PIECES)], ids=["bytes", "pieces"])
def test_a_control_token_in_a_question_is_text_unless_asked_for(make: Callable[[], Tokenizer], tmp_path: Path) -> None:
    tokenizer = open_tokenizer(tmp_path, make())
    prompts = ["A</s>B", "A"]
    assert count_control_tokens(tokenizer, prompts) == 1
    end = tokenizer.eos_token_id
    as_text, plain = encode_prompts(tokenizer, prompts, add_special_tokens=True)
    assert end not in as_text and tokenizer.decode(as_text).replace(" ", "").replace("▁", "") == "A</s>B"
    as_token, same = encode_prompts(tokenizer, prompts, add_special_tokens=True, control_tokens="token")
    assert end in as_token and len(as_token) < len(as_text) and same == plain
    assert as_token == tokenizer.encode(prompts[0]), "the tokenizer itself is as it was"


def test_scores_say_where_their_prompts_are_other_than_before(tmp_path: Path) -> None:
    """Nothing is said of tokenizers without a begin, whose letters are the same everywhere: their scores are read back."""
    plain = open_tokenizer(tmp_path / "bytes", make_bytes())
    for style, prefix in (("official", ""), ("lm_eval", " ")):
        tokens = find_answer_tokens(plain, "m", cue=CUE, prefix=prefix)
        assert describe_encoding(plain, PROMPTS, tokens, style=style) == ""
    assert describe_encoding(plain, ["</s>"], find_answer_tokens(plain, "m", cue=CUE, prefix=""), style="official") == (
        "1 control tokens as text"
    )
    pieces = open_tokenizer(tmp_path / "pieces", make_pieces(PIECES), "<s>")
    bare, spaced = (find_answer_tokens(pieces, "m", cue=CUE, prefix=prefix) for prefix in ("", " "))
    assert describe_encoding(pieces, PROMPTS, bare, style="official") == "letters [8, 9, 10, 11]"
    assert describe_encoding(pieces, PROMPTS, spaced, style="lm_eval") == "begin [1]"
