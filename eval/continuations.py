"""Prompts that base and result continue, so that a reader sees what training changed in the words themselves.

They go through the engine that answers the questions. Prompts nobody chose are the first words of the held-out texts:
what training is for, in text that it did not see.
"""

from __future__ import annotations

import unicodedata
from itertools import islice
from pathlib import Path

from eval.artifacts import load_continued
from eval.held_out import name_source
from layerplan.config.corpus import CorpusConfig
from layerplan.config.evaluation import EvaluationConfig
from layerplan.corpus.sources import iter_documents

PROMPTS_PER_TEXT = 2
PROMPT_COLUMNS = 60
"""Longest prompt taken from a text, in columns of a terminal: a Chinese character has two."""
WITHOUT_TEXT = ("In short, the most important thing to know about it is that",)


def choose_continuations(config: EvaluationConfig) -> list[tuple[str, int]]:
    """Each prompt to continue, and how many tokens at most.

    Raises:
        CorpusError: When a held-out text cannot be read.
    """
    prompts = config.continuation_prompts
    if prompts is None:
        prompts = _take_first_words(config) if config.held_out else list(WITHOUT_TEXT)
    return [(prompt, config.continuation_tokens) for prompt in prompts]


def are_continued(config: EvaluationConfig, out_dir: Path) -> bool:
    """Whether a scored model needs no engine for them; scores of before there were prompts nobody chose count as whole."""
    return config.continuation_prompts is None or load_continued(out_dir) == choose_continuations(config)


def cut_prompt(text: str) -> str:
    """The beginning of the first line that is longer than a prompt, or the whole of the longest, up to a word's end."""
    lines = [line.strip() for line in text.splitlines()]
    line = next((line for line in lines if _count_columns(line) > PROMPT_COLUMNS), max(lines, key=_count_columns))
    length = next(end for end in range(len(line), -1, -1) if _count_columns(line[:end]) <= PROMPT_COLUMNS)
    cut = line[:length]
    within_word = length < len(line) and not line[length].isspace()
    return cut.rsplit(None, 1)[0] if within_word and " " in cut else cut.rstrip()


def _take_first_words(config: EvaluationConfig) -> list[str]:
    prompts: list[str] = []
    for item in config.held_out:
        documents = iter_documents(CorpusConfig(sources=[item.source]), field=name_source(item))
        texts = (document.text for document in documents)
        prompts += map(cut_prompt, islice((text for text in texts if text.strip()), PROMPTS_PER_TEXT))
    return list(dict.fromkeys(prompts))


def _count_columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "FW" else 1 for character in text)
