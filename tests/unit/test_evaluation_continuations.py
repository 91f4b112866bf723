"""Prompts that nobody chose: the first words of the held-out texts, cut where a reader would cut them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eval.artifacts import write_continuations
from eval.continuations import WITHOUT_TEXT, are_continued, choose_continuations, cut_prompt
from eval.engine import EngineAnswer
from layerplan.config.evaluation import EvaluationConfig
from tests.tiny_corpus import write_jsonl

LINE = "The quick brown fox jumps over the lazy dog and runs away from here at once"


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        (f"A title\n\n  {LINE}", "The quick brown fox jumps over the lazy dog and runs away"),
        ("Short.\nA little longer.\nShort.", "A little longer."),
        ("汉" * 80, "汉" * 30),
        ("x" * 100, "x" * 60),
        ("a" * 60 + " and more", "a" * 60),
    ],
)
def test_a_prompt_ends_with_a_word_and_fits_a_line(text: str, prompt: str) -> None:
    """60 columns, of which a Chinese character takes two; a title alone is no beginning of a sentence."""
    assert cut_prompt(text) == prompt


def config_over(folder: Path, **fields: Any) -> EvaluationConfig:
    texts = {"one": [f"{number} {LINE}" for number in range(4)], "two": ["", "Only this."]}
    for name, lines in texts.items():
        write_jsonl(folder / f"{name}.jsonl", *({"id": str(n), "text": text} for n, text in enumerate(lines)))
    held_out = [{"name": name, "source": {"path": str(folder / f"{name}.jsonl")}} for name in texts]
    return EvaluationConfig.model_validate({"held_out": held_out, "continuation_tokens": 9} | fields)


def test_two_documents_of_every_held_out_text_are_continued(tmp_path: Path) -> None:
    cut = "The quick brown fox jumps over the lazy dog and runs"
    assert choose_continuations(config_over(tmp_path)) == [(f"0 {cut}", 9), (f"1 {cut}", 9), ("Only this.", 9)]
    assert choose_continuations(config_over(tmp_path, continuation_prompts=["mine"])) == [("mine", 9)]
    assert choose_continuations(config_over(tmp_path, continuation_prompts=[])) == []
    assert [prompt for prompt, _ in choose_continuations(EvaluationConfig())] == list(WITHOUT_TEXT)


def test_scores_of_before_are_whole_unless_prompts_were_asked_for(tmp_path: Path) -> None:
    """No engine is started over a finished scoring for prompts that nobody chose."""
    assert are_continued(config_over(tmp_path), tmp_path)
    chosen = config_over(tmp_path, continuation_prompts=["mine"])
    assert not are_continued(chosen, tmp_path)
    write_continuations(tmp_path, [("mine", 9)], [EngineAnswer((), [1], "yes")])
    assert are_continued(chosen, tmp_path)
