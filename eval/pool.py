"""Prompts through a Ray Data actor pool of engines; answered once each, whatever dies on the way.

Answers are appended to a ledger as they arrive, so a killed job asks only what is left. A killed actor is started
again and only its batch in flight is asked again. An engine that keeps dying is restarted twice; then the run
fails with the engine's own last words, which its process wrote to a log before it went.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.engine import EngineAnswer, EngineSpec, open_engine
from eval.progress import ProgressLines
from layerplan.config.evaluation import EvaluationConfig
from layerplan.errors import EvaluationError, LayerplanError, find_layerplan_error
from layerplan.plan.hashing import compute_sha256

logger = logging.getLogger(__name__)

MAX_RESTARTS = 2
LEDGER_NAME = "answers.partial.jsonl"
LOGS_NAME = "engine_logs"


@dataclass(frozen=True)
class Ask:
    """One prompt and how much may be generated after it."""

    ids: list[int]
    max_new_tokens: int


class EngineActor:
    """One engine, started once per actor and asked in batches."""

    def __init__(self, spec: EngineSpec, log_dir: str) -> None:
        self._spec = spec
        self._faults = 0
        _log_stderr(Path(log_dir))
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
    ledger = Ledger(work_dir / LEDGER_NAME, [[ask.ids, ask.max_new_tokens] for ask in asks], spec)
    todo = [index for index in _order(asks, spec.backend) if index not in ledger.answers]
    logs = work_dir / LOGS_NAME
    if todo:
        progress = ProgressLines("prompts answered", len(asks), report, done=len(ledger.answers))
        with _explained(spec, logs), ledger, closing(progress):
            for batch in _stream([(index, asks[index]) for index in todo], spec, config, logs):
                ledger.add(batch)
                progress.add(len(batch["index"]))
                after_batch()
    missing = len(asks) - len(ledger.answers)
    if missing:
        raise EvaluationError(f"{spec.model}: {missing} of {len(asks)} prompts came back without an answer")
    return [ledger.answers[index] for index in range(len(asks))]


def clear_ledger(work_dir: Path) -> None:
    """Removes what only an unfinished scoring needs."""
    (work_dir / LEDGER_NAME).unlink(missing_ok=True)
    for path in (work_dir / LOGS_NAME).glob("*.log"):
        path.unlink(missing_ok=True)
    if (work_dir / LOGS_NAME).is_dir():
        (work_dir / LOGS_NAME).rmdir()


class Ledger:
    """Answers on disk as they arrive; the first line says to which prompts and model they belong."""

    def __init__(self, path: Path, prompts: Sequence[Any], spec: EngineSpec) -> None:
        self._path = path
        self._key = compute_sha256(
            [list(prompts), spec.model, spec.revision, spec.backend, spec.dtype, spec.letter_ids]
        )
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
        self._path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _order(asks: Sequence[Ask], backend: str) -> list[int]:
    """VLLM gets prompts as they come, those of a subject together; transformers gets equal lengths together."""
    if backend == "vllm":
        return list(range(len(asks)))
    return sorted(range(len(asks)), key=lambda index: (asks[index].max_new_tokens, len(asks[index].ids), index))


def _stream(
    todo: Sequence[tuple[int, Ask]], spec: EngineSpec, config: EvaluationConfig, logs: Path
) -> Iterator[dict[str, Any]]:
    import ray

    rows = [{"index": index, "ids": ask.ids, "max_new_tokens": ask.max_new_tokens} for index, ask in todo]
    batches = -(-len(rows) // config.batch_size)
    with warnings.catch_warnings():
        # Ray 2.60 deprecates the two limits of restarts and has no other way to say them; without them it restarts forever
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        asked = ray.data.from_items(rows, override_num_blocks=batches).map_batches(
            EngineActor,
            fn_constructor_args=(spec, str(logs.resolve())),
            batch_size=config.batch_size,
            compute=ray.data.ActorPoolStrategy(size=min(config.num_actors, batches)),
            num_cpus=config.num_cpus_per_actor,
            num_gpus=config.num_gpus_per_actor,
            max_restarts=MAX_RESTARTS,
            max_task_retries=MAX_RESTARTS,
        )
    yield from asked.iter_batches(batch_size=None, prefetch_batches=0)


@contextmanager
def _explained(spec: EngineSpec, logs: Path) -> Iterator[None]:
    """Turns the pool's failure into one line: our own fault inside it, or what the engine wrote last."""
    from ray.exceptions import TaskCancelledError

    try:
        yield
    except (LayerplanError, TaskCancelledError):
        raise
    except Exception as error:
        fault = find_layerplan_error(error)
        if fault is not None:
            raise type(fault)(*fault.args) from error
        words = _last_words(logs) or " ".join(str(error).split())[:300]
        raise EvaluationError(
            f"{spec.model}: the engine's process died and was restarted {MAX_RESTARTS} times; its last words: {words}"
        ) from error


def _last_words(logs: Path) -> str:
    """The first line of the last crash in the newest log, where faulthandler puts the signal, else the last line."""
    newest = sorted(logs.glob("*.log"), key=lambda path: path.stat().st_mtime)
    for path in reversed(newest):
        lines = [
            line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
        fatal = [line for line in lines if line.startswith("Fatal Python error")]
        if fatal or lines:
            return (fatal or lines)[-1]
    return ""


def _log_stderr(folder: Path) -> None:
    """Sends this process's standard error to a file of its own, where it outlives the process."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{time.time_ns()}_{os.uname().nodename}_{os.getpid()}.log"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    faulthandler.enable(file=2)
