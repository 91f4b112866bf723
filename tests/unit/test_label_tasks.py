"""Label tasks: fixed splits, and labels that the tokenizer at hand holds for one token."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from eval.label_encoding import EncodedTask, encode_task
from eval.label_scores import score_labels
from eval.label_tasks import LabelTask, load_task
from layerplan.config.finetune import (
    AntSynNetTaskConfig,
    CevalFieldTaskConfig,
    CmmluCategoryTaskConfig,
    HubTaskConfig,
    JsonlTaskConfig,
)
from layerplan.errors import EvaluationError
from layerplan.pipeline.label_stages import describe_unasked
from tests.tiny_tokenizer import make_bytes, save_tokenizer

WORDS = (" cat", " dog")
"""What the tokenizer knows beside bytes; an ordinary added token takes its space along."""
DATA = os.environ.get("LAYERPLAN_DATA")


def make_tokenizer(folder: Path) -> Any:
    save_tokenizer(folder, make_bytes(), control=("<s>",), ordinary=WORDS, begin=("<s>",))
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def write_task(folder: Path, train: list[tuple[str, str]], test: list[tuple[str, str]]) -> JsonlTaskConfig:
    for name, rows in (("train", train), ("test", test)):
        lines = [json.dumps({"prompt": prompt, "label": label}) for prompt, label in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return JsonlTaskConfig(path=str(folder))


def encode(config: JsonlTaskConfig, folder: Path, *, max_positions: int = 99) -> EncodedTask:
    task = load_task(config)
    return encode_task(task, make_tokenizer(folder / "t"), max_tokens=config.max_tokens, max_positions=max_positions)


def test_a_row_is_the_prompt_as_the_model_reads_it_and_its_label_one_token(tmp_path: Path) -> None:
    config = write_task(tmp_path, [("ab:", "cat"), ("abc:", "dog")], [("b:", "dog")])
    found = encode(config, tmp_path)
    tokenizer = make_tokenizer(tmp_path / "t")
    begin, cat, dog = tokenizer.convert_tokens_to_ids(["<s>", *WORDS])
    letters = tokenizer("ab:", add_special_tokens=False)["input_ids"]
    assert (found.train[0].input_ids, found.train[0].label_id) == ((begin, *letters), cat)
    assert (found.label_ids, found.test[0].label_id, found.longest) == ({"cat": cat, "dog": dog}, dog, 6)


def test_of_several_spellings_the_first_that_is_one_token_is_taken(tmp_path: Path) -> None:
    config = write_task(tmp_path, [("a:", "feline"), ("b:", "dog")], [("c:", "dog")])
    config = config.model_copy(update={"labels": {"feline": [" feline", " cat"]}})
    assert encode(config, tmp_path).spelled == {"dog": " dog", "feline": " cat"}
    longer = config.model_copy(update={"labels": {"feline": [" ape", " feline"]}})
    with pytest.raises(
        EvaluationError, match=r"the label 'feline' must be one token after a prompt; ' ape' is 4 tokens"
    ):
        encode(longer, tmp_path)


def test_a_line_of_a_task_ends_at_a_line_feed_and_nowhere_else(tmp_path: Path) -> None:
    """What other programs write unescaped: U+2028, U+0085."""
    for split in ("train", "test"):
        lines = [
            json.dumps({"prompt": f"a\u2028b\x85{word}:", "label": word}, ensure_ascii=False) for word in ("cat", "dog")
        ]
        (tmp_path / f"{split}.jsonl").write_text("\r\n".join(lines) + "\r\n", encoding="utf-8", newline="")
    task = load_task(JsonlTaskConfig(path=str(tmp_path)))
    assert [item.prompt for item in task.train] == ["a\u2028b\x85cat:", "a\u2028b\x85dog:"]


def test_classes_that_the_test_does_not_ask_for_are_told(tmp_path: Path) -> None:
    """Their F1 is 0 whatever a model answers: all right is a macro F1 of a third."""
    rows = [("ab:", "cat"), ("abc:", "dog")]
    assert describe_unasked(encode(write_task(tmp_path, rows, rows), tmp_path)) == ""
    config = write_task(tmp_path, rows, rows[1:]).model_copy(update={"labels": {"bird": ["!"]}})
    line = describe_unasked(encode(config, tmp_path))
    assert line == "the test has no prompt of 'bird', 'cat': an F1 of 0 each, so that macro F1 is at most 33.3%"
    found = score_labels([2], [2], ["bird", "cat", "dog"], task="t", task_sha256="0")
    assert (found.accuracy, found.macro_f1) == (1.0, pytest.approx(1 / 3))


def test_a_prompt_that_eats_the_beginning_of_its_label_is_named(tmp_path: Path) -> None:
    """The prompt ends with what the tokenizer joins to the label: the row would not be the text that is meant."""
    save_tokenizer(tmp_path / "t", make_bytes(), ordinary=(*WORDS, "x cat"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "t" / "tokenizer.json"))
    config = write_task(tmp_path, [("a", "cat"), ("b", "dog"), ("ax", "cat")], [("c", "dog")])
    with pytest.raises(EvaluationError, match="after prompt train/3 the label ' cat' is not the one token"):
        encode_task(load_task(config), tokenizer, max_tokens=None, max_positions=None)


@pytest.mark.parametrize(
    ("train", "test", "fault"),
    [
        ([("a:", "cat"), ("b:", "cat")], [("c:", "cat")], "are all of the class 'cat'; two are needed"),
        ([("a:", "cat"), ("b:", "dog")], [("c:", "cow")], "'cow' is in the test and not in the 2 training prompts"),
        ([("a:", "cat"), ("b:", "dog")], [], "its test split has no prompt"),
    ],
)
def test_a_task_that_cannot_be_learned_or_scored_is_one_line(
    tmp_path: Path, train: list[tuple[str, str]], test: list[tuple[str, str]], fault: str
) -> None:
    with pytest.raises(EvaluationError, match=fault) as told:
        load_task(write_task(tmp_path, train, test))
    assert "\n" not in str(told.value)


def test_long_prompts_are_counted_or_refused_and_never_cut(tmp_path: Path) -> None:
    config = write_task(tmp_path, [("a:", "cat"), ("b:", "dog"), ("abcdefgh:", "dog")], [("c:", "dog")])
    shorter = encode(config.model_copy(update={"max_tokens": 6}), tmp_path)
    assert (len(shorter.train), shorter.num_too_long) == (2, {"train": 1, "test": 0})
    with pytest.raises(EvaluationError, match="prompt train/3 has 11 tokens, the model 10 positions"):
        encode(config, tmp_path, max_positions=10)


def test_a_smaller_task_is_a_part_of_a_larger_one(tmp_path: Path) -> None:
    config = write_task(tmp_path, [(f"{n}:", "cat" if n % 2 else "dog") for n in range(40)], [("c:", "dog")])
    sizes = [load_task(config.model_copy(update={"max_train": size})).train for size in (8, 20, 60)]
    assert [len(train) for train in sizes] == [8, 20, 40]
    assert set(sizes[0]) < set(sizes[1]) < set(sizes[2])


def test_a_hub_data_set_is_read_by_its_layout_columns_and_labels(tmp_path: Path) -> None:
    """A folder in the hub's layout stands for an id: there is no network in the tests."""
    for split in ("train", "test"):
        rows = [{"first": "a", "second": "b", "label": 0}, {"first": "c", "second": "d", "label": 1}]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = HubTaskConfig(name=str(tmp_path), prompt="{first} and {second} are", labels={"0": [" cat"], "1": [" dog"]})
    task = load_task(config)
    assert [(item.prompt, item.label) for item in task.train] == [("a and b are", "0"), ("c and d are", "1")]
    with pytest.raises(EvaluationError, match=r"prompt: 'third' is no column of .*; it has first, second, label"):
        load_task(config.model_copy(update={"prompt": "{third}"}))
    with pytest.raises(EvaluationError, match=r"prompt: .* has no attribute 'b' is no column of"):
        load_task(config.model_copy(update={"prompt": "{first.b}"}))


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path: Path) -> None:
    for kind in ("adjective", "noun", "verb"):
        for split in ("train", "test"):
            (tmp_path / f"{kind}-pairs.{split}").write_text("hot\tcold\t1\r\nbig\tlarge\t0\r\n", encoding="utf-8-sig")
    task = load_task(AntSynNetTaskConfig(path=str(tmp_path)))
    assert task.train[0].prompt == "The words hot and cold mean the"


def test_a_row_without_a_value_is_no_prompt_that_says_none(tmp_path: Path) -> None:
    rows = [{"first": "a", "label": 0}, {"first": None, "label": 1}]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = HubTaskConfig(name=str(tmp_path), prompt="{first} is", labels={"0": [" cat"], "1": [" dog"]})
    with pytest.raises(EvaluationError, match=r"row 1 of train has no value in the column 'first'"):
        load_task(config)


def test_a_list_is_no_text_and_its_parts_may_be_named(tmp_path: Path) -> None:
    rows = [{"turns": [{"role": "user", "content": word}], "label": number} for number, word in enumerate("ab")]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = HubTaskConfig(name=str(tmp_path), prompt="{turns} is", labels={"0": [" cat"], "1": [" dog"]})
    with pytest.raises(EvaluationError, match=r"'turns' holds a list in row 0 of train; .*such as \{turns\[0\]\}"):
        load_task(config)
    task = load_task(config.model_copy(update={"prompt": "{turns[0][content]} is"}))
    assert [item.prompt for item in task.train] == ["a is", "b is"]


SPLITS = {
    "cmmlu": (CmmluCategoryTaskConfig, 9240, 2342, 4, "a615734d09148492"),
    "ceval": (CevalFieldTaskConfig, 1299, 307, 11, "30402b057b4b4181"),
    "antsynnet": (AntSynNetTaskConfig, 10932, 3914, 2, "8304c2d5ca841c07"),
}


@pytest.mark.skipif(DATA is None, reason="LAYERPLAN_DATA names no folder")
@pytest.mark.parametrize("name", SPLITS)
def test_the_splits_made_of_benchmarks_are_fixed(name: str) -> None:
    """Hash and counts; 1,606 and 11,582 questions are what C-Eval's dev and val and CMMLU's test hold."""
    kind, num_train, num_test, num_classes, sha256 = SPLITS[name]
    task: LabelTask = load_task(kind(path=f"{DATA}/{name}"))
    assert (len(task.train), len(task.test), len(task.classes)) == (num_train, num_test, num_classes)
    assert task.sha256.startswith(sha256)
    assert not {item.id for item in task.train} & {item.id for item in task.test}
