"""Folders of finished runs with scores of one small benchmark and of held-out texts, as evaluation leaves them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from eval.artifacts import write_results
from eval.held_out import HeldOutResult
from eval.items import Benchmark, Question
from eval.scoring import Answer, score_answers
from layerplan.artifacts import write_json
from layerplan.run_folder import BASE, HELD_OUT_NAME, RunFolder, name_step
from layerplan.train.request import TrainResult

QUESTIONS = 16
DOCUMENTS = 20


def finish_run(folder: Path, *, final_step: int) -> None:
    """Leaves the `training.json` of a run that ended at this step."""
    result = TrainResult(
        final_step=final_step,
        final_checkpoint=folder / "checkpoints",
        first_loss=5.0,
        final_loss=4.0,
        validation_loss=None,
        tokens_seen=100,
        train_s=1.0,
        wall_s=1.0,
        tokens_per_s=100.0,
        mfu=0.1,
        skipped_steps=0,
        rollbacks=0,
        proof={},
        stopped_early=False,
        hf_dir=None,
    )
    result.save(folder)


def leave_scored_run(
    folder: Path,
    *,
    right: int,
    bits: Mapping[str, float],
    base_right: int = 4,
    asked: Sequence[str] = (),
    of_other_documents: Collection[str] = (),
) -> Path:
    """A run of 10 steps whose base answers `base_right` of 16 questions and reads every text at 1 bit per byte.

    Args:
        folder: Where.
        right: Questions that the trained model answers.
        bits: Its bits per byte by text.
        base_right: Questions that the base answers.
        asked: Texts that the config asks for; those of `bits` when left out.
        of_other_documents: Texts whose documents are not those of other runs.
    """
    config = {"benchmarks": [{"name": "ceval"}], "protocols": ["logit"], "evaluate_base": True}
    write_json(
        RunFolder(folder).config, {"evaluation": config | {"held_out": [{"name": name} for name in asked or bits]}}
    )
    finish_run(folder, final_step=10)
    for label, count, rates in ((BASE, base_right, dict.fromkeys(asked or bits, 1.0)), (name_step(10), right, bits)):
        scores = RunFolder(folder).scores_of(label)
        _leave_answers(scores, count)
        for name, rate in rates.items():
            text = "other" if name in of_other_documents else "same"
            write_json(scores / HELD_OUT_NAME / f"{name}.json", make_held_out(name, rate, text).model_dump(mode="json"))
    return folder


def make_held_out(name: str, bits: float, text_sha256: str) -> HeldOutResult:
    """20 documents of 100 bytes, each a little harder than the one before."""
    nats = [math.log(2) * 100 * (bits + 0.001 * place) for place in range(DOCUMENTS)]
    return HeldOutResult(
        name=name,
        text_sha256=text_sha256,
        model="m",
        weights_sha256=None,
        dtype="float32",
        window=8,
        bits_per_byte=sum(nats) / math.log(2) / (100 * DOCUMENTS),
        num_tokens=DOCUMENTS,
        document_nats=nats,
        document_bytes=[100] * DOCUMENTS,
    )


def _leave_answers(scores: Path, right: int) -> None:
    questions = tuple(
        Question(f"law/{index}", "law", "law", "Humanities", "q", ("a", "b", "c", "d"), "ABCD"[index % 4])
        for index in range(QUESTIONS)
    )
    benchmark = Benchmark("ceval", "val", questions, is_official=False)
    answers = [
        Answer(
            id=question.id,
            prompt="",
            output="",
            predicted=question.answer if index < right else "ABCD"[(index + 1) % 4],
            answer=question.answer,
        )
        for index, question in enumerate(questions)
    ]
    results = {"ceval/logit": score_answers(benchmark, "logit", "p", [answers])}
    write_results(scores, "ceval", results, {"logit": answers})
