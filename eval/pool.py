"""Prompts through a pool of engines; answered once each, whatever dies on the way.

Answers are appended to a ledger as they arrive, so a killed job asks only what is left. An engine that keeps failing in a
process that lives is restarted as often as a process that dies; then the run fails with its last words.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.engine import EngineAnswer, EngineSpec
from eval.open_engine import open_engine
from eval.shared_prefix import group_by_prefix
from layerplan.actor_pool import MAX_RESTARTS, ActorPool, map_over_actors
from layerplan.artifacts import compute_sha256, write_text
from layerplan.config.evaluation import EvaluationConfig
from layerplan.errors import EvaluationError, LayerplanError
from layerplan.models.footprint import estimate_actor_memory
from layerplan.plan.cost import GIB
from layerplan.progress import ProgressLines
from layerplan.run_folder import ANSWERS_LEDGER_NAME, ENGINE_LOGS_NAME

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ask:
    """One prompt and how much may be generated after it."""

    ids: list[int]
    max_new_tokens: int


class EngineActor:
    """One engine, started once per actor and asked in batches."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._faults = 0
        spec.model.fetch()
        self._engine = open_engine(spec)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Answers a batch of rows `index, ids, max_new_tokens`."""
        prompts = [[int(token) for token in ids] for ids in batch["ids"]]
        answers = self._ask(prompts, [int(limit) for limit in batch["max_new_tokens"]])
        return {
            "index": batch["index"],
            "logprobs": [list(answer.letter_logprobs) for answer in answers],
            "token_ids": [json.dumps(answer.token_ids) for answer in answers],
            "output": [answer.text for answer in answers],
            "pid": [os.getpid()] * len(answers),
        }

    def _ask(self, prompts: list[list[int]], limits: list[int]) -> list[EngineAnswer]:
        while True:
            try:
                return self._engine.ask(prompts, limits)
            except LayerplanError:
                raise
            except Exception as error:
                self._faults += 1
                logger.warning("engine fault %d: %s: %s", self._faults, type(error).__name__, error)
                if self._faults > MAX_RESTARTS:
                    lines = [line for line in str(error).splitlines() if line.strip()]
                    raise EvaluationError(
                        f"{self._spec.model}: the engine died {self._faults} times; its last words:"
                        f" {type(error).__name__}: {lines[-1] if lines else 'none'}"
                    ) from error
                del self._engine
                self._engine = open_engine(self._spec)


def ask_all(
    asks: Sequence[Ask],
    spec: EngineSpec,
    config: EvaluationConfig,
    work_dir: Path,
    *,
    report: Callable[[str], None] = lambda line: None,
    after_batch: Callable[[], None] = lambda: None,
) -> list[EngineAnswer]:
    """Asks every prompt once and returns the answers in order. Ray must be initialised.

    Args:
        asks: Prompts.
        spec: The engine of each actor.
        config: Size of the pool and of its batches.
        work_dir: Folder, reachable from every node, for the ledger and the engines' logs.
        report: Receives a line from time to time.
        after_batch: Called once a batch is in the ledger; what it raises ends the asking and loses nothing.

    Raises:
        EvaluationError: When an engine cannot start or keeps dying.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    prompts = [[ask.ids, ask.max_new_tokens] for ask in asks]
    ledger = Ledger(work_dir / ANSWERS_LEDGER_NAME, prompts, spec, model_files=spec.model.hash_files())
    todo = [index for index in _order(asks, spec.backend) if index not in ledger.answers]
    if todo:
        progress = ProgressLines("prompts answered", len(asks), report, done=len(ledger.answers))
        rows = [{"index": each, "ids": asks[each].ids, "max_new_tokens": asks[each].max_new_tokens} for each in todo]
        pool = _describe_pool(spec, config, work_dir)
        batches = map_over_actors(pool, EngineActor, (spec,), rows, batch_size=config.batch_size, progress=progress)
        with ledger, closing(batches):
            for batch in batches:
                ledger.add(batch)
                after_batch()
    missing = len(asks) - len(ledger.answers)
    if missing:
        raise EvaluationError(f"{spec.model}: {missing} of {len(asks)} prompts came back without an answer")
    return [ledger.answers[index] for index in range(len(asks))]


def clear_ledger(work_dir: Path) -> None:
    """Removes what only an unfinished scoring needs."""
    (work_dir / ANSWERS_LEDGER_NAME).unlink(missing_ok=True)
    for path in (work_dir / ENGINE_LOGS_NAME).glob("*.log"):
        path.unlink(missing_ok=True)
    if (work_dir / ENGINE_LOGS_NAME).is_dir():
        (work_dir / ENGINE_LOGS_NAME).rmdir()


class Ledger:
    """Answers on disk as they arrive; the first line says to which prompts and model they belong.

    A folder's name does not say which model: `model_files` are hashes of what lies in it.
    """

    def __init__(
        self, path: Path, prompts: Sequence[Any], spec: EngineSpec, *, model_files: Mapping[str, str] | None = None
    ) -> None:
        self._path = path
        engine = [spec.model.revision, spec.backend, spec.dtype, spec.num_gpus > 0, spec.letter_ids]
        self._key = compute_sha256([list(prompts), spec.model.name, model_files, *engine])
        self.answers: dict[int, EngineAnswer] = {}
        if path.exists():
            self._read()

    def __enter__(self) -> Ledger:
        is_new = not self.answers
        self._handle = self._path.open("w" if is_new else "a", encoding="utf-8")
        if is_new:
            self._handle.write(json.dumps({"key": self._key}) + "\n")
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.close()

    def add(self, batch: dict[str, Any]) -> None:
        """Keeps a batch's answers.

        Raises:
            EvaluationError: When a prompt is answered twice.
        """
        for index, logprobs, ids, text, pid in zip(
            *(batch[name] for name in ("index", "logprobs", "token_ids", "output", "pid")), strict=True
        ):
            if int(index) in self.answers:
                raise EvaluationError(f"prompt {int(index)} was answered twice")
            answer = EngineAnswer(tuple(float(value) for value in logprobs), json.loads(ids), str(text))
            self.answers[int(index)] = answer
            line = {"index": int(index), "pid": int(pid), "answer": answer}
            self._handle.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._handle.flush()

    def _read(self) -> None:
        """Takes over what an earlier job answered; a line cut off by its death ends the reading."""
        *lines, _ = self._path.read_text(encoding="utf-8", errors="replace").split("\n")
        if not lines or json.loads(lines[0]).get("key") != self._key:
            return
        for line in lines[1:]:
            record = json.loads(line)
            logprobs, ids, text = record["answer"]
            self.answers[record["index"]] = EngineAnswer(tuple(logprobs), ids, text)
        write_text(self._path, "\n".join(lines) + "\n")


def _describe_pool(spec: EngineSpec, config: EvaluationConfig, work_dir: Path) -> ActorPool:
    return ActorPool(
        config.num_actors,
        config.num_cpus_per_actor,
        config.num_gpus_per_actor,
        what=f"{spec.model}: the engine's process",
        error=EvaluationError,
        memory_bytes=estimate_actor_memory(
            spec.model,
            spec.dtype,
            num_gpus=spec.num_gpus,
            num_logits=config.batch_size * len(spec.model.tokenizer()),
            cache_bytes=_find_cache_bytes(spec.backend),
        ),
        labels=config.labels,
        log_dir=work_dir / ENGINE_LOGS_NAME,
    )


def _find_cache_bytes(backend: str) -> float:
    """Of keys and values on a CPU, by the variable that tells vLLM; transformers keeps those of a few prompts only."""
    return float(os.environ.get("VLLM_CPU_KVCACHE_SPACE") or 1) * GIB if backend == "vllm" else 0.0


def _order(asks: Sequence[Ask], backend: str) -> list[int]:
    """VLLM gets prompts as they come, those of a subject together; transformers those that begin alike, or are equally long."""
    if backend == "vllm":
        return list(range(len(asks)))
    read = [index for index, ask in enumerate(asks) if ask.max_new_tokens == 1]
    groups = group_by_prefix([asks[index].ids for index in read], min_saved=1)
    continued = [index for index, ask in enumerate(asks) if ask.max_new_tokens > 1]
    by_length = sorted(continued, key=lambda index: (asks[index].max_new_tokens, len(asks[index].ids), index))
    return [read[member] for group in groups for member in group.members] + by_length
