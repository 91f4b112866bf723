"""What an evaluation leaves on disk, and how it is read back with one clear error."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from eval.engine import EngineAnswer
from eval.scoring import Answer, EvaluationResult, Protocol
from layerplan.artifacts import read_every_line, write_json, write_lines
from layerplan.config.base import describe_fault
from layerplan.errors import EvaluationError
from layerplan.run_folder import CONTINUATIONS_NAME

Results = dict[str, EvaluationResult]


def write_results(
    out_dir: Path, benchmark: str, results: Results, answers: Mapping[Protocol, Sequence[Answer]]
) -> None:
    """Writes `<benchmark>.jsonl`, then `<benchmark>.json`, whose presence says that both are whole."""
    write_lines(
        out_dir / f"{benchmark}.jsonl",
        [{"protocol": protocol, "answer": item.model_dump()} for protocol, items in answers.items() for item in items],
    )
    write_json(out_dir / f"{benchmark}.json", {key: result.model_dump(mode="json") for key, result in results.items()})


def write_continuations(out_dir: Path, asked: Sequence[tuple[str, int]], answers: Sequence[EngineAnswer]) -> None:
    """Writes one line per continued prompt and its limit of new tokens; no file when there is none."""
    path = out_dir / CONTINUATIONS_NAME
    if not asked:
        path.unlink(missing_ok=True)
        return
    write_lines(
        path,
        [
            {"prompt": prompt, "max_new_tokens": limit, "text": answer.text}
            for (prompt, limit), answer in zip(asked, answers, strict=True)
        ],
    )


def load_continued(out_dir: Path) -> list[tuple[str, int]]:
    """The prompts that were continued, and how far; empty when there is none.

    Raises:
        EvaluationError: When the file is malformed.
    """
    path = out_dir / CONTINUATIONS_NAME
    if not path.exists():
        return []
    try:
        records = read_every_line(path)
        return [(record["prompt"], record["max_new_tokens"]) for record in records]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None


def load_results(out_dir: Path) -> Results:
    """Reads every result of a scored model; empty when there is none.

    Raises:
        EvaluationError: When a file is malformed.
    """
    results: Results = {}
    for path in sorted(out_dir.glob("*.json")):
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            results |= {key: EvaluationResult.model_validate(value) for key, value in stored.items()}
        except ValidationError as error:
            raise EvaluationError(f"{path}: not the scores of a model ({describe_fault(error)})") from None
        except (OSError, ValueError, AttributeError) as error:
            raise EvaluationError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None
    return results


def load_answers(out_dir: Path, benchmark: str, protocol: str) -> list[Answer]:
    """Reads the per-question file of one protocol, in the benchmark's order.

    Raises:
        EvaluationError: When the file is missing or malformed.
    """
    path = out_dir / f"{benchmark}.jsonl"
    try:
        records = read_every_line(path)
        return [Answer.model_validate(record["answer"]) for record in records if record["protocol"] == protocol]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None
