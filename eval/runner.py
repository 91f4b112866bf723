"""A model's scores: prompts through the pool of engines, answers to disk, results that say how they were made."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, Literal, cast

from eval.artifacts import Results, load_results, write_continuations, write_results
from eval.continuations import are_continued, choose_continuations
from eval.encoding import AnswerTokens, describe_encoding, encode_prompts, find_answer_tokens
from eval.engine import EngineAnswer, EngineSpec
from eval.extraction import EXTRACTION_VERSION, extract_answer
from eval.held_out import is_held_out_scored
from eval.held_out_scoring import check_held_out, score_held_out
from eval.items import Benchmark, Question, load_benchmark
from eval.pool import Ask, ask_all, clear_ledger
from eval.preflight import check_lengths, check_model_files
from eval.prompts import TEMPLATES, describe_template, format_prompts
from eval.scoring import Answer, EvaluationResult, Protocol, ScoreOrigin, pick_letter, score_answers
from layerplan.artifacts import compute_sha256
from layerplan.config.evaluation import EvaluationConfig
from layerplan.errors import EvaluationError
from layerplan.models.files import name_folder
from layerplan.models.ref import ModelRef

logger = logging.getLogger(__name__)


def evaluate_model(
    model: ModelRef,
    config: EvaluationConfig,
    out_dir: Path,
    *,
    report: Callable[[str], None] = logger.info,
    after_batch: Callable[[], None] = lambda: None,
) -> Results:
    """Scores a model on every benchmark under every protocol; benchmarks finished before are read back.

    Writes `<benchmark>.json` with the results, `<benchmark>.jsonl` with one line per question and protocol,
    `continuations.jsonl` and `held_out/<name>.json`. Ray must be initialised. All prompts share one pool, so an engine
    starts once. `after_batch` is called whenever answers are safe on disk; what it raises ends the scoring.

    Returns:
        `"<benchmark>/<protocol>"` to its result.

    Raises:
        EvaluationError: When a benchmark, prompt or engine cannot give a trustworthy score.
        ModelError: When the model's files are not whole.
    """
    check_model_files(model)
    benchmarks = _load_benchmarks(config)
    origins = _describe_origins(model, benchmarks, config)
    finished = load_results(out_dir)
    done = {item.name: _read_finished(finished, item, config, origins[item.name]) for item in benchmarks}
    todo = [benchmark for benchmark in benchmarks if done[benchmark.name] is None]
    if todo or not are_continued(config, out_dir):
        check_held_out(model, config)
        report(f"asking {sum(len(benchmark.questions) for benchmark in todo):,} questions with {config.backend}")
        prompts = choose_continuations(config)
        outputs, continuations = _ask_benchmarks(
            model,
            config,
            todo or benchmarks[:1],
            todo,
            prompts,
            out_dir,
            report,
            after_batch,
        )
        write_continuations(out_dir, prompts, continuations)
        for benchmark in todo:
            answers = {
                protocol: [_make_answers(benchmark, protocol, config, repeat) for repeat in outputs[benchmark.name]]
                for protocol in config.protocols
            }
            done[benchmark.name] = {
                f"{benchmark.name}/{protocol}": score_answers(
                    benchmark,
                    protocol,
                    make_protocol_id(benchmark, protocol, config),
                    answers[protocol],
                    origin=origins[benchmark.name],
                )
                for protocol in config.protocols
            }
            write_results(
                out_dir,
                benchmark.name,
                cast(Results, done[benchmark.name]),
                {protocol: repeats[0] for protocol, repeats in answers.items()},
            )
        clear_ledger(out_dir)
    score_held_out(model, config, out_dir, report=report)
    return {key: result for results in done.values() if results is not None for key, result in results.items()}


def load_finished(model: ModelRef, config: EvaluationConfig, out_dir: Path) -> Results | None:
    """Everything asked for, when it was scored before; the model's folder need not exist any more, so its name counts.

    Raises:
        EvaluationError: When a benchmark or a stored result cannot be read.
    """
    stored = load_results(out_dir)
    found: Results = {}
    for benchmark in _load_benchmarks(config):
        first = stored.get(f"{benchmark.name}/{config.protocols[0]}")
        if first is None or first.origin is None:
            return None
        known = first.origin.model_dump(include={"weights_sha256", "encoding", "config_sha256"})
        origin = _make_origin(name_folder(Path(model.name)), model, config, **known)
        results = _read_finished(stored, benchmark, config, origin)
        if results is None:
            return None
        found |= results
    return found if are_continued(config, out_dir) and is_held_out_scored(config, out_dir) else None


def _load_benchmarks(config: EvaluationConfig) -> list[Benchmark]:
    return [load_benchmark(item, num_few_shot=config.num_few_shot) for item in config.benchmarks]


def make_protocol_id(benchmark: Benchmark, protocol: Protocol, config: EvaluationConfig) -> str:
    """Hash of everything that decides a score beside the model: questions, prompts, extraction, decoding."""
    parts: list[Any] = [
        benchmark.name,
        benchmark.split,
        benchmark.content_sha256,
        describe_template(benchmark.name, config.style),
        config.num_few_shot,
        [
            [item.id, item.question, *item.choices, item.answer]
            for group in benchmark.examples.values()
            for item in group
        ],
        protocol,
    ]
    if protocol == "generate":
        parts += [EXTRACTION_VERSION, config.max_new_tokens, "greedy"]
    return compute_sha256(parts)


def _describe_origins(
    model: ModelRef, benchmarks: Sequence[Benchmark], config: EvaluationConfig
) -> dict[str, ScoreOrigin]:
    """Of each benchmark, what its scores come from."""
    identity = model.identity()
    tokenizer, config_sha256 = model.tokenizer(), model.hash_files()["config"]
    origins = {}
    for benchmark in benchmarks:
        tokens = _answer_tokens(tokenizer, model, benchmark, config)
        prompts = format_prompts(benchmark, style=config.style)
        encoding = describe_encoding(tokenizer, prompts, tokens, style=config.style)
        known = {"weights_sha256": identity.weights_sha256, "encoding": encoding, "config_sha256": config_sha256}
        origins[benchmark.name] = _make_origin(identity.name, model, config, **known)
    return origins


def _make_origin(name: str, model: ModelRef, config: EvaluationConfig, **known: Any) -> ScoreOrigin:
    return ScoreOrigin(
        model=name,
        revision=model.revision,
        **known,
        style=config.style,
        num_few_shot=config.num_few_shot,
        backend=config.backend,
        dtype=config.computed_dtype,
    )


def _settle_dtype(origin: ScoreOrigin, config: EvaluationConfig) -> ScoreOrigin:
    return origin.model_copy(update={"dtype": config.read_dtype(origin.dtype)})


def _ask_benchmarks(
    model: ModelRef,
    config: EvaluationConfig,
    worded: Sequence[Benchmark],
    asked: Sequence[Benchmark],
    to_continue: Sequence[tuple[str, int]],
    out_dir: Path,
    report: Callable[[str], None],
    after_batch: Callable[[], None],
) -> tuple[dict[str, list[list[EngineAnswer]]], list[EngineAnswer]]:
    """Answers per benchmark and repeat, and the continuations; `worded` benchmarks say which tokens the letters are."""
    tokenizer = model.tokenizer()
    limit = config.max_new_tokens if "generate" in config.protocols else 1
    tokens = {benchmark.name: _answer_tokens(tokenizer, model, benchmark, config) for benchmark in worded}
    letters = {item.letters for item in tokens.values()}
    if len(letters) > 1:
        raise EvaluationError(
            f"{model}: the letters have other tokens in one benchmark than in another; score them apart"
        )
    asks: list[Ask] = []
    for benchmark in asked:
        prompts = format_prompts(benchmark, style=config.style)
        policy: Literal["text", "token"] = "text" if config.style == "official" else "token"
        encoded = encode_prompts(tokenizer, prompts, add_special_tokens=True, control_tokens=policy)
        asks += [Ask([*ids, *tokens[benchmark.name].appended], limit) for ids in encoded]
    spelled: Literal["text", "token"] = "text" if config.continuation_prompts is None else "token"
    continued = encode_prompts(
        tokenizer, [text for text, _ in to_continue], add_special_tokens=True, control_tokens=spelled
    )
    names = [question.id for benchmark in asked for question in benchmark.questions]
    names += [f"continuation {index + 1}" for index in range(len(continued))]
    num_questions = len(asks)
    asks += [Ask(ids, length) for ids, (_, length) in zip(continued, to_continue, strict=True)]
    lengths = [len(ask.ids) + ask.max_new_tokens for ask in asks]
    check_lengths(model, lengths, names)
    spec = EngineSpec(
        model=model,
        backend=config.backend,
        dtype=config.dtype,
        num_gpus=config.num_gpus_per_actor,
        letter_ids=letters.pop(),
        max_length=max(lengths),
        num_threads=config.num_threads_per_actor,
        num_engines=config.num_actors,
    )
    orders = [order_repeat(num_questions, repeat) for repeat in range(config.repeats)]
    shuffled = [asks[index] for order in orders for index in order]
    every = [*shuffled, *asks[num_questions:]]
    answers = ask_all(every, spec, config, out_dir, report=report, after_batch=after_batch)
    outputs: dict[str, list[list[EngineAnswer]]] = {benchmark.name: [] for benchmark in asked}
    for repeat, order in enumerate(orders):
        by_question = dict(zip(order, answers[repeat * num_questions :]))
        found = iter([by_question[index] for index in range(num_questions)])
        for benchmark in asked:
            outputs[benchmark.name].append([next(found) for _ in benchmark.questions])
    return outputs, answers[num_questions * config.repeats :]


def order_repeat(num_questions: int, repeat: int) -> list[int]:
    """Order in which a repeat asks: the first one as written, each other one in a permutation of its own."""
    order = list(range(num_questions))
    if repeat:
        Random(repeat).shuffle(order)
    return order


def _answer_tokens(tokenizer: Any, model: ModelRef, benchmark: Benchmark, config: EvaluationConfig) -> AnswerTokens:
    template = TEMPLATES[config.style, benchmark.name]
    return find_answer_tokens(tokenizer, model.name, cue="\n" + template.cue, prefix=template.answer_prefix)


def _make_answers(
    benchmark: Benchmark, protocol: Protocol, config: EvaluationConfig, outputs: Sequence[EngineAnswer]
) -> list[Answer]:
    prompts = format_prompts(benchmark, style=config.style)
    return [
        _make_answer(question, prompt, protocol, output)
        for question, prompt, output in zip(benchmark.questions, prompts, outputs, strict=True)
    ]


def _make_answer(question: Question, prompt: str, protocol: Protocol, output: EngineAnswer) -> Answer:
    predicted = (
        pick_letter(output.letter_logprobs) if protocol == "logit" else extract_answer(output.text, question.choices)
    )
    return Answer(
        id=question.id,
        prompt=prompt,
        output="" if protocol == "logit" else output.text,
        letter_logprobs=cast(tuple[float, float, float, float], output.letter_logprobs),
        predicted=predicted,
        answer=question.answer,
    )


def _read_finished(
    stored: Results, benchmark: Benchmark, config: EvaluationConfig, origin: ScoreOrigin
) -> Results | None:
    """What was scored before under the same protocol, with the same weights and at least as many repeats."""
    found: dict[str, EvaluationResult] = {}
    for protocol in config.protocols:
        key = f"{benchmark.name}/{protocol}"
        result = stored.get(key)
        if (
            result is None
            or result.protocol_id != make_protocol_id(benchmark, protocol, config)
            or result.origin is None
            or not _settle_dtype(result.origin, config).is_that_of(origin)
            or len(result.repeats) < config.repeats
        ):
            return None
        found[key] = result
    return found
