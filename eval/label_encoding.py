"""A label task as token ids: the tokenizer decides which spelling of a class is one token that follows a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.label_tasks import LabelledPrompt, LabelTask
from layerplan.errors import EvaluationError

ENCODED_AT_ONCE = 1024


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt's ids, and the one id that follows them."""

    id: str
    input_ids: tuple[int, ...]
    label_id: int


@dataclass(frozen=True)
class EncodedTask:
    """Both splits, and what each class became."""

    name: str
    sha256: str
    spelled: dict[str, str]
    """Class to the spelling that is one token."""
    label_ids: dict[str, int]
    """Class to that token."""
    train: tuple[EncodedPrompt, ...]
    test: tuple[EncodedPrompt, ...]
    num_too_long: dict[str, int]
    """Prompts of each split that had more than the tokens allowed."""

    @property
    def longest(self) -> int:
        """Tokens of the longest row, its label counted."""
        return 1 + max(len(item.input_ids) for item in (*self.train, *self.test))


def encode_task(task: LabelTask, tokenizer: Any, *, max_tokens: int | None, max_positions: int | None) -> EncodedTask:
    """Tokenizes a task with the special tokens the model is used to, except those after the prompt.

    Args:
        task: What to encode.
        tokenizer: A fast tokenizer from transformers.
        max_tokens: Rows with more are left out and counted.
        max_positions: Of the model; a longer row is an error.

    Raises:
        EvaluationError: When no spelling of a class is one token after every prompt, two classes share a token, a row
            does not fit the model, or nothing is left of a split.
    """
    prompts = {split: getattr(task, split) for split in ("train", "test")}
    ids = {split: _encode([item.prompt for item in items], tokenizer) for split, items in prompts.items()}
    spelled = {label: _choose_spelling(task, label, ids["train"][0], tokenizer) for label in task.classes}
    label_ids = {label: token for label, (_, token) in spelled.items()}
    if len(set(label_ids.values())) < len(label_ids):
        raise EvaluationError(f"finetune.task={task.name}: two classes are the same token: {label_ids}")
    words = {label: word for label, (word, _) in spelled.items()}
    encoded, num_too_long = {}, {}
    for split, items in prompts.items():
        _check_joined(task, items, ids[split], words, label_ids, tokenizer)
        rows = [EncodedPrompt(item.id, tuple(row), label_ids[item.label]) for item, row in zip(items, ids[split])]
        encoded[split] = tuple(row for row in rows if max_tokens is None or len(row.input_ids) < max_tokens)
        num_too_long[split] = len(rows) - len(encoded[split])
        _check_lengths(task, split, encoded[split], max_tokens, max_positions)
    return EncodedTask(task.name, task.sha256, words, label_ids, encoded["train"], encoded["test"], num_too_long)


def _encode(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Ids of each text without the tokens a template appends: those cover no character and stand at the end."""
    rows = []
    for start in range(0, len(texts), ENCODED_AT_ONCE):
        encoding = tokenizer(list(texts[start : start + ENCODED_AT_ONCE]), return_offsets_mapping=True)
        for ids, spans in zip(encoding["input_ids"], encoding["offset_mapping"]):
            length = len(ids)
            while length and spans[length - 1][0] == spans[length - 1][1]:
                length -= 1
            rows.append(list(ids[:length]))
    return rows


def _choose_spelling(task: LabelTask, label: str, prompt_ids: list[int], tokenizer: Any) -> tuple[str, int]:
    """The first spelling that adds exactly one token to a prompt."""
    refused = []
    prompt = task.train[0].prompt
    for word in task.spellings[label]:
        joined = _encode([prompt + word], tokenizer)[0]
        if joined[: len(prompt_ids)] == prompt_ids and len(joined) == len(prompt_ids) + 1:
            return word, joined[-1]
        added = tokenizer.convert_ids_to_tokens(joined[len(prompt_ids) :])
        refused.append(f"{word!r} is {len(added)} tokens ({', '.join(added)})")
    raise EvaluationError(
        f"finetune.task={task.name}: the label {label!r} must be one token after a prompt; {', '.join(refused)} of this"
        " tokenizer. Give another spelling"
    )


def _check_joined(
    task: LabelTask,
    items: Sequence[LabelledPrompt],
    ids: Sequence[list[int]],
    words: dict[str, str],
    label_ids: dict[str, int],
    tokenizer: Any,
) -> None:
    """Refuses a prompt whose end merges with its label: what is trained on would not be what a reader continues."""
    joined = _encode([item.prompt + words[item.label] for item in items], tokenizer)
    for item, row, whole in zip(items, ids, joined, strict=True):
        if whole != [*row, label_ids[item.label]]:
            raise EvaluationError(
                f"finetune.task={task.name}: after prompt {item.id} the label {words[item.label]!r} is not the one token"
                f" {label_ids[item.label]}; end prompts with a whole word or a sign"
            )


def _check_lengths(
    task: LabelTask, split: str, rows: Sequence[EncodedPrompt], max_tokens: int | None, max_positions: int | None
) -> None:
    if not rows:
        raise EvaluationError(f"finetune.task.max_tokens={max_tokens}: leaves no {split} prompt of {task.name}")
    longest = max(rows, key=lambda row: len(row.input_ids))
    if not longest.input_ids:
        raise EvaluationError(f"finetune.task={task.name}: prompt {longest.id} has no token")
    if max_positions is not None and len(longest.input_ids) + 1 > max_positions:
        raise EvaluationError(
            f"finetune.task={task.name}: prompt {longest.id} has {len(longest.input_ids) + 1} tokens, the model"
            f" {max_positions} positions; set finetune.task.max_tokens"
        )
