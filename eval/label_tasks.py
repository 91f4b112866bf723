"""Label tasks as values: prompts whose next token is one of a few labels, in fixed splits with one hash over all of it.

Which spelling of a label is used is not decided here: a class offers several, and the tokenizer at hand takes the first
that is one token (`eval/label_encoding.py`).
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import Formatter
from typing import Any

from eval.items import Question, load_benchmark
from eval.subjects import DATA
from layerplan.artifacts import compute_sha256
from layerplan.config.evaluation import BenchmarkConfig
from layerplan.config.finetune import (
    AntSynNetTaskConfig,
    CevalFieldTaskConfig,
    CmmluCategoryTaskConfig,
    HubTaskConfig,
    JsonlTaskConfig,
    TaskConfig,
)
from layerplan.corpus.hub import choose_subset
from layerplan.errors import EvaluationError

TEST_SHARE = 5
"""One prompt in so many is for the test where a task has no splits of its own."""
CATEGORY_SPELLINGS = {
    "STEM": (" science", " STEM", "科学"),
    "Social Science": (" society", " Social", "社会"),
    "Humanities": (" humanities", " culture", "人文"),
    "Other": (" other", " Other", "其他"),
}
RELATION_SPELLINGS = {"1": (" opposite", " antonym"), "0": (" same", " synonym")}


@dataclass(frozen=True)
class LabelledPrompt:
    """A prompt and its class."""

    id: str
    prompt: str
    label: str


@dataclass(frozen=True)
class LabelTask:
    """Prompts in two fixed splits, and how each class may be spelled after a prompt."""

    name: str
    spellings: Mapping[str, tuple[str, ...]]
    """By class, in the order of the classes."""
    train: tuple[LabelledPrompt, ...]
    test: tuple[LabelledPrompt, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        """Classes in order."""
        return tuple(self.spellings)

    @property
    def sha256(self) -> str:
        """Hash over every prompt, its label and its split, and over the spellings."""
        rows = [[[item.id, item.prompt, item.label] for item in split] for split in (self.train, self.test)]
        return compute_sha256([rows, [[label, *words] for label, words in self.spellings.items()]])


def load_task(config: TaskConfig) -> LabelTask:
    """Reads a task and checks that it can be learned and scored.

    Raises:
        EvaluationError: When a file cannot be read, a split is empty, there is one class only, or a class of the test
            is not in the training rows.
    """
    match config:
        case CmmluCategoryTaskConfig():
            task = _load_categories(config)
        case CevalFieldTaskConfig():
            task = _load_fields(config)
        case AntSynNetTaskConfig():
            task = _load_relations(config)
        case JsonlTaskConfig():
            task = _load_jsonl(config)
        case HubTaskConfig():
            task = _load_hub(config)
    task = replace(task, train=_take(task.train, config.max_train), test=_take(task.test, config.max_test))
    check_task(task)
    return task


def check_task(task: LabelTask) -> None:
    """Raises `EvaluationError` for a task that nothing can be learned or scored on."""
    where = f"finetune.task={task.name}"
    for name, split in (("train", task.train), ("test", task.test)):
        if not split:
            raise EvaluationError(f"{where}: its {name} split has no prompt")
        if strange := {item.label for item in split} - set(task.classes):
            raise EvaluationError(
                f"{where}: {name} has the label {min(strange)!r}; labels are {', '.join(map(repr, task.classes))}"
            )
    seen = Counter(item.label for item in task.train)
    if len(seen) < 2:
        raise EvaluationError(
            f"{where}: its training prompts are all of the class {next(iter(seen))!r}; two are needed"
        )
    unseen = {item.label for item in task.test} - set(seen)
    if unseen:
        raise EvaluationError(
            f"{where}: the label {min(unseen)!r} is in the test and not in the {len(task.train):,} training prompts;"
            " raise max_train, or leave the class out of the test"
        )


def _take(split: Sequence[LabelledPrompt], limit: int | None) -> tuple[LabelledPrompt, ...]:
    """The first prompts in the order of their ids' hashes, so that a smaller task is a part of a larger one."""
    if limit is None or limit >= len(split):
        return tuple(split)
    chosen = {item.id for item in sorted(split, key=lambda item: _hash(item.id))[:limit]}
    return tuple(item for item in split if item.id in chosen)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _split(items: Iterable[LabelledPrompt]) -> tuple[tuple[LabelledPrompt, ...], tuple[LabelledPrompt, ...]]:
    """Train and test by the hash of each id, which no other prompt moves."""
    train: list[LabelledPrompt] = []
    test: list[LabelledPrompt] = []
    for item in items:
        (train if int(_hash(item.id)[:8], 16) % TEST_SHARE else test).append(item)
    return tuple(train), tuple(test)


def _ask(question: Question, label: str, kind: str) -> LabelledPrompt:
    return LabelledPrompt(question.id, f"Question: {question.question}\n{kind}:", label)


def _load_categories(config: CmmluCategoryTaskConfig) -> LabelTask:
    questions = load_benchmark(BenchmarkConfig(name="cmmlu", path=config.path, content_sha256="any")).questions
    items = [_ask(question, question.category, "Category") for question in questions]
    return LabelTask(config.type, CATEGORY_SPELLINGS, *_split(items))


def _load_fields(config: CevalFieldTaskConfig) -> LabelTask:
    with (DATA / "ceval_fields.tsv").open(encoding="utf-8", newline="") as handle:
        fields = {row["field"]: row["subjects"].split() for row in csv.DictReader(handle, delimiter="\t")}
    field_of = {subject: field for field, subjects in fields.items() for subject in subjects}
    items = []
    for split in ("dev", "val"):
        benchmark = load_benchmark(BenchmarkConfig(name="ceval", path=config.path, split=split, content_sha256="any"))
        for question in benchmark.questions:
            if question.subject not in field_of:
                raise EvaluationError(f"finetune.task.path={config.path}: subject {question.subject!r} has no field")
            item = _ask(question, field_of[question.subject], "Field")
            items.append(replace(item, id=f"{split}/{item.id}"))
    return LabelTask(config.type, {field: (f" {field}",) for field in fields}, *_split(items))


def _load_relations(config: AntSynNetTaskConfig) -> LabelTask:
    splits = []
    for split in ("train", "test"):
        items = []
        for kind in ("adjective", "noun", "verb"):
            path = Path(config.path).expanduser() / f"{kind}-pairs.{split}"
            for number, line in enumerate(_read_lines(path), 1):
                words = line.split()
                if len(words) != 3 or words[2] not in RELATION_SPELLINGS:
                    raise EvaluationError(f"{path}:{number}: two words and 0 or 1 are expected, not {line!r}")
                prompt = f"The words {words[0]} and {words[1]} mean the"
                items.append(LabelledPrompt(f"{kind}/{split}/{number}", prompt, words[2]))
        splits.append(tuple(items))
    return LabelTask(config.type, RELATION_SPELLINGS, *splits)


def _load_jsonl(config: JsonlTaskConfig) -> LabelTask:
    folder = Path(config.path).expanduser()
    splits = [_read_objects(folder / f"{split}.jsonl") for split in ("train", "test")]
    found = sorted({item.label for split in splits for item in split} | set(config.labels))
    spellings = {label: tuple(config.labels.get(label, [f" {label}"])) for label in found}
    return LabelTask(config.type, spellings, *splits)


def _read_objects(path: Path) -> tuple[LabelledPrompt, ...]:
    items = []
    for number, line in enumerate(_read_lines(path), 1):
        try:
            record: Any = json.loads(line)
            prompt, label = record["prompt"], record["label"]
        except (ValueError, KeyError, TypeError):
            prompt = label = None
        if not isinstance(prompt, str) or not isinstance(label, str):
            raise EvaluationError(f"{path}:{number}: an object with the strings `prompt` and `label` is expected")
        items.append(LabelledPrompt(f"{path.stem}/{number}", prompt, label))
    return tuple(items)


def _read_lines(path: Path) -> list[str]:
    """Lines that hold something; they end at a line feed and nowhere else, as a prompt may hold U+2028.

    What spreadsheets and editors of Windows put before them, a byte-order mark, is no part of the first.
    """
    try:
        return [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"finetune.task.path: {path} cannot be read ({error})") from None


def _load_hub(config: HubTaskConfig) -> LabelTask:
    splits = [
        tuple(_make_hub_prompt(config, split, number, row) for number, row in enumerate(_read_hub(config, split)))
        for split in (config.train_split, config.test_split)
    ]
    return LabelTask(config.name, {label: tuple(words) for label, words in config.labels.items()}, *splits)


def _read_hub(config: HubTaskConfig, split: str) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset

    load: Callable[..., Any] = load_dataset
    revision = None if Path(config.name).is_dir() else config.revision
    try:
        subset = choose_subset(config.name, config.subset, revision)
        found: Iterable[dict[str, Any]] = load(config.name, **subset, split=split, revision=revision)
        return found
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise EvaluationError(
            f"finetune.task.name={config.name}: cannot be read from the hub ({type(error).__name__}: {reason}); check id,"
            " subset, split and revision, and the network (HF_HUB_OFFLINE must not be 1)"
        ) from None


def _make_hub_prompt(config: HubTaskConfig, split: str, number: int, row: dict[str, Any]) -> LabelledPrompt:
    try:
        prompt, label = config.prompt.format(**row), str(row[config.label_column])
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise EvaluationError(
            f"finetune.task.prompt: {error} is no column of {config.name}; it has {', '.join(row)}"
        ) from None
    for column in (name for _, name, _, _ in Formatter().parse(config.prompt) if name in row):
        if row[column] is None:
            raise EvaluationError(
                f"finetune.task.prompt: row {number} of {split} has no value in the column {column!r}"
            )
        if isinstance(row[column], list | dict):
            raise EvaluationError(
                f"finetune.task.prompt: the column {column!r} holds a {type(row[column]).__name__} in row {number} of"
                f" {split}; name the text in it, such as {{{column}[0]}} or {{{column}[name]}}"
            )
    return LabelledPrompt(f"{split}/{number}", prompt, label)
