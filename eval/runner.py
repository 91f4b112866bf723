"""A model's scores: prompts through an actor pool of engines, answers to disk, results that say how they were made."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eval.extraction import EXTRACTION_VERSION, extract_answer
from eval.items import LETTERS, Benchmark, load_benchmark
from eval.prompts import describe_template, format_prompt
from eval.scoring import Answer, EvaluationResult, Protocol, pick_letter, score_answers
from layerplan.config.evaluation import EvaluationConfig
from layerplan.errors import EvaluationError
from layerplan.models.causal_lm import load_tokenizer
from layerplan.models.files import load_hf_config
from layerplan.plan.hashing import compute_sha256

Results = dict[str, EvaluationResult]


class EngineActor:
    """One engine, started once per actor and asked in batches."""

    def __init__(self, model: str, revision: str, config: EvaluationConfig, letter_ids: Sequence[int]) -> None:
        engine: Any
        if config.backend == "vllm":
            from eval.generation import VllmEngine as engine
        else:
            from eval.logits import TransformersEngine as engine
        self._engine = engine(
            model,
            dtype=config.dtype,
            max_new_tokens=config.max_new_tokens if "generate" in config.protocols else 1,
            num_gpus=config.num_gpus_per_actor,
            letter_ids=letter_ids,
            revision=revision,
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Answers a batch of rows `index, ids`."""
        answers = self._engine.ask([[int(token) for token in ids] for ids in batch["ids"]])
        return {
            "index": batch["index"],
            "logprobs": [list(logprobs) for logprobs, _ in answers],
            "output": [output for _, output in answers],
        }


def evaluate_model(
    model: str,
    config: EvaluationConfig,
    out_dir: Path,
    *,
    revision: str = "main",
    report: Callable[[str], None] = print,
) -> Results:
    """Scores a model on every benchmark under every protocol; finished benchmarks are read back.

    Writes `<benchmark>.json` with the results and `<benchmark>.jsonl` with one line per question and protocol. Ray
    must be initialised. All benchmarks share one pool, so an engine starts once.

    Returns:
        `"<benchmark>/<protocol>"` to its result.

    Raises:
        EvaluationError: When a benchmark, prompt or engine cannot give a trustworthy score.
    """
    benchmarks = [load_benchmark(benchmark) for benchmark in config.benchmarks]
    done = {benchmark.name: _read_finished(out_dir, benchmark, config) for benchmark in benchmarks}
    todo = [benchmark for benchmark in benchmarks if done[benchmark.name] is None]
    if todo:
        report(f"asking {sum(len(benchmark.questions) for benchmark in todo):,} questions with {config.backend}")
        outputs = _ask_all(model, revision, config, todo)
        for benchmark in todo:
            done[benchmark.name] = _finish(out_dir, benchmark, config, outputs[benchmark.name])
    return {key: result for results in done.values() if results is not None for key, result in results.items()}


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
        except (OSError, ValueError) as error:
            raise EvaluationError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})") from None
    return results


def load_answers(out_dir: Path, benchmark: str, protocol: str) -> list[Answer]:
    """Reads the per-question file of one protocol, in the benchmark's order.

    Raises:
        EvaluationError: When the file is missing.
    """
    path = out_dir / f"{benchmark}.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read ({error})") from None
    records = [json.loads(line) for line in lines]
    return [Answer.model_validate(record["answer"]) for record in records if record["protocol"] == protocol]


def make_protocol_id(benchmark: Benchmark, protocol: Protocol, config: EvaluationConfig) -> str:
    """Hash of everything that decides a score beside the model: questions, prompt, extraction, decoding."""
    parts: list[Any] = [
        benchmark.name,
        benchmark.split,
        benchmark.content_sha256,
        describe_template(benchmark.name),
        protocol,
    ]
    if protocol == "generate":
        parts += [EXTRACTION_VERSION, config.max_new_tokens, "greedy"]
    return compute_sha256(parts)


def find_letter_ids(tokenizer: Any, model: str) -> list[int]:
    """Token ids of the bare letters A to D.

    Raises:
        EvaluationError: When a letter is not a single token.
    """
    found = [tokenizer.encode(letter, add_special_tokens=False) for letter in LETTERS]
    wrong = [letter for letter, ids in zip(LETTERS, found) if len(ids) != 1]
    if wrong:
        raise EvaluationError(
            f"{model}: its tokenizer splits the letter {wrong[0]!r}; the logit protocol needs single tokens"
        )
    return [ids[0] for ids in found]


def _ask_all(
    model: str, revision: str, config: EvaluationConfig, benchmarks: Sequence[Benchmark]
) -> dict[str, list[dict[str, Any]]]:
    import ray

    tokenizer = load_tokenizer(model, revision=revision)
    letter_ids = find_letter_ids(tokenizer, model)
    owners = [(benchmark, question) for benchmark in benchmarks for question in benchmark.questions]
    rows = [
        {"index": index, "ids": tokenizer.encode(format_prompt(benchmark.name, question), add_special_tokens=True)}
        for index, (benchmark, question) in enumerate(owners)
    ]
    _check_lengths(model, revision, config, rows, [question.id for _, question in owners])
    batches = -(-len(rows) // config.batch_size)
    asked = ray.data.from_items(rows, override_num_blocks=batches).map_batches(
        EngineActor,
        fn_constructor_args=(model, revision, config, letter_ids),
        batch_size=config.batch_size,
        compute=ray.data.ActorPoolStrategy(size=min(config.num_actors, batches)),
        num_cpus=config.num_cpus_per_actor,
        num_gpus=config.num_gpus_per_actor,
    )
    answers = {int(record["index"]): record for record in asked.take_all()}
    if sorted(answers) != list(range(len(rows))):
        raise EvaluationError(f"{model}: {len(answers)} answers for {len(rows)} questions")
    grouped: dict[str, list[dict[str, Any]]] = {benchmark.name: [] for benchmark in benchmarks}
    for index, (benchmark, _) in enumerate(owners):
        grouped[benchmark.name].append(answers[index])
    return grouped


def _check_lengths(
    model: str, revision: str, config: EvaluationConfig, rows: Sequence[dict[str, Any]], ids: Sequence[str]
) -> None:
    limit = load_hf_config(model, revision=revision).get("max_position_embeddings")
    for row, identifier in zip(rows, ids):
        needed = len(row["ids"]) + config.max_new_tokens
        if limit is not None and needed > limit:
            raise EvaluationError(
                f"{model}: question {identifier} needs {needed} tokens with its answer, the model has {limit} positions"
            )


def _finish(
    out_dir: Path, benchmark: Benchmark, config: EvaluationConfig, outputs: Sequence[dict[str, Any]]
) -> Results:
    results: Results = {}
    lines: list[str] = []
    for protocol in config.protocols:
        answers = [
            _make_answer(benchmark.name, question, protocol, output)
            for question, output in zip(benchmark.questions, outputs, strict=True)
        ]
        lines += [
            json.dumps({"protocol": protocol, "answer": item.model_dump()}, ensure_ascii=False) for item in answers
        ]
        protocol_id = make_protocol_id(benchmark, protocol, config)
        results[f"{benchmark.name}/{protocol}"] = score_answers(benchmark, protocol, protocol_id, answers)
    out_dir.mkdir(parents=True, exist_ok=True)
    _write(out_dir / f"{benchmark.name}.jsonl", "\n".join(lines) + "\n")
    dumped = {key: result.model_dump(mode="json") for key, result in results.items()}
    _write(out_dir / f"{benchmark.name}.json", json.dumps(dumped, indent=2, ensure_ascii=False) + "\n")
    return results


def _make_answer(benchmark: str, question: Any, protocol: Protocol, output: dict[str, Any]) -> Answer:
    logprobs = tuple(float(value) for value in output["logprobs"])
    text = str(output["output"])
    predicted = pick_letter(logprobs) if protocol == "logit" else extract_answer(text, question.choices)
    return Answer(
        id=question.id,
        prompt=format_prompt(benchmark, question),
        output="" if protocol == "logit" else text,
        letter_logprobs=logprobs,  # type: ignore[arg-type]
        predicted=predicted,
        answer=question.answer,
    )


def _read_finished(out_dir: Path, benchmark: Benchmark, config: EvaluationConfig) -> Results | None:
    path = out_dir / f"{benchmark.name}.json"
    if not path.exists():
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))
    results = {key: EvaluationResult.model_validate(value) for key, value in stored.items()}
    wanted = {
        f"{benchmark.name}/{protocol}": make_protocol_id(benchmark, protocol, config) for protocol in config.protocols
    }
    same = all(key in results and results[key].protocol_id == identifier for key, identifier in wanted.items())
    return {key: results[key] for key in wanted} if same else None


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
