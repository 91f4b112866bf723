"""When a score below the base stops a training, and which steps are scored, without a cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from eval.artifacts import load_answers, load_continued, load_results, write_continuations, write_results
from eval.during_training import CheckpointScoring, backfill, compare_with_base, find_breach, read_breach
from eval.engine import EngineAnswer, EngineSpec
from eval.items import Benchmark, Question
from eval.pool import Ledger
from eval.runner import order_repeat
from eval.scoring import Answer, score_answers
from layerplan.config.evaluation import EvaluationConfig
from layerplan.config.load import load_config
from layerplan.errors import ConfigError, EvaluationError
from layerplan.models.ref import ModelRef
from layerplan.plan.freeze_plan import FreezePlan

ROOT = Path(__file__).resolve().parents[2]


def write_scores(folder: Path, right: int, *, asked: int = 200, output: str = "") -> None:
    """`asked` questions of one subject, the first `right` answered rightly."""
    questions = tuple(
        Question(f"law/{index}", "law", "法学", "Humanities", "q", ("a", "b", "c", "d"), "A") for index in range(asked)
    )
    answers = [
        Answer(id=item.id, prompt="", output=output, predicted="A" if index < right else "B", answer="A")
        for index, item in enumerate(questions)
    ]
    benchmark = Benchmark("ceval", "val", questions, is_official=False)
    result = score_answers(benchmark, "logit", "p", [answers])
    write_results(folder, "ceval", {"ceval/logit": result}, {"logit": answers})


def make_scoring(run_dir: Path, **values: Any) -> CheckpointScoring:
    plan = FreezePlan.model_construct()
    return CheckpointScoring(
        run_dir,
        ModelRef("base"),
        plan,
        EvaluationConfig.model_validate(values),
        final_step=100,
        stop_file=run_dir / "stop",
    )


def judge(tmp_path: Path, right: int) -> Any:
    write_scores(tmp_path / "base", 100)
    write_scores(tmp_path / "step_00000010", right)
    return compare_with_base(tmp_path, "step_00000010", load_results(tmp_path / "step_00000010"))


@pytest.mark.parametrize(
    ("right", "points", "num_looks", "breaks"),
    [
        (80, 5, 1, True),  # 10 points below, 20 discordant pairs on one side: p = 2 / 2**20
        (80, 15, 1, False),  # significantly below, but not by so much
        (94, 2, 1, True),  # 3 points below, 6 discordant: p = 2 / 2**6 = 0.031
        (94, 2, 2, False),  # the same, looked at twice: 0.031 > 0.05 / 2
        (95, 2, 1, False),  # 5 discordant: p = 0.0625
        (120, 5, 1, False),  # better than the base
    ],
)
def test_a_guardrail_breaks_when_the_fall_is_large_and_significant(
    tmp_path: Path, right: int, points: float, num_looks: int, breaks: bool
) -> None:
    assert (find_breach(judge(tmp_path, right), points, num_looks=num_looks) is not None) == breaks


def test_a_breach_holds_until_the_guardrail_is_raised_above_it(tmp_path: Path) -> None:
    (verdict,) = judge(tmp_path, 80)
    assert read_breach(tmp_path, 5) is None
    found = {"step": 10, "verdict": verdict.model_dump(mode="json")}
    (tmp_path / "guardrail.json").write_text(json.dumps(found), encoding="utf-8")
    assert read_breach(tmp_path, 5) == f"step 10: {verdict.sentence}"
    assert "step_00000010 is worse than the base (-10.0 [95 %: " in verdict.sentence
    assert read_breach(tmp_path, 10.5) is None
    (tmp_path / "guardrail.json").write_text("{", encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"guardrail\.json: cannot be read"):
        read_breach(tmp_path, 5)


def test_a_guardrail_needs_the_base_scored_the_same_way(tmp_path: Path) -> None:
    write_scores(tmp_path / "step_00000010", 3)
    with pytest.raises(EvaluationError, match="base: has no ceval/logit; the base must be scored first"):
        compare_with_base(tmp_path, "step_00000010", load_results(tmp_path / "step_00000010"))


def test_the_last_step_is_left_to_the_chain(tmp_path: Path) -> None:
    assert list(make_scoring(tmp_path, score_every_steps=25).due_steps) == [25, 50, 75]
    assert not make_scoring(tmp_path).due_steps


def test_steps_whose_checkpoints_are_gone_are_named(tmp_path: Path) -> None:
    assert backfill(make_scoring(tmp_path, score_every_steps=25), [25, 50]) == ({}, [25, 50])


def test_a_run_that_was_asked_to_stop_scores_nothing_more(tmp_path: Path) -> None:
    from ray.exceptions import TaskCancelledError
    from ray.train import Checkpoint

    (tmp_path / "stop").touch()
    with pytest.raises(TaskCancelledError):
        make_scoring(tmp_path, score_every_steps=25)(Checkpoint(str(tmp_path)))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"guardrail_points": 5}, "guardrail_points=5.0: needs score_every_steps"),
        ({"guardrail_points": 5, "score_every_steps": 10, "evaluate_base": False}, "needs score_every_steps"),
        ({"benchmarks": [{"name": "ceval"}, {"name": "ceval", "path": "x"}]}, "benchmarks: ceval is named twice"),
        ({"held_out": [{"name": "a", "source": {"path": "x"}}] * 2}, "held_out: a is named twice"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        EvaluationConfig.model_validate(values)


def test_scored_steps_must_have_checkpoints() -> None:
    config = ROOT / "jobs" / "configs" / "quickstart_scratch.yaml"
    with pytest.raises(
        ConfigError, match=r"score_every_steps=30 must be a multiple of train\.checkpoint_every_steps=20"
    ):
        load_config(config, ["train.checkpoint_every_steps=20", "evaluation.score_every_steps=30"])


def test_what_a_model_writes_survives_the_files(tmp_path: Path) -> None:
    """U+2028 and U+0085 end a line for `str.splitlines`, not for JSON lines."""
    text = "一\u2028二\u0085三\x1c"
    write_scores(tmp_path, 1, asked=2, output=text)
    assert [item.output for item in load_answers(tmp_path, "ceval", "logit")] == [text, text]
    write_continuations(tmp_path, [(text, 4)], [EngineAnswer((), [1], text)])
    assert load_continued(tmp_path) == [(text, 4)]
    spec = EngineSpec(ModelRef("m"), "transformers", "float32", 0, (1, 2, 3, 4), 8)
    with Ledger(tmp_path / "ledger", ["p"], spec) as ledger:
        ledger.add({"index": [0], "logprobs": [[-1.0]], "token_ids": ["[7]"], "output": [text], "pid": [1]})
    assert Ledger(tmp_path / "ledger", ["p"], spec).answers == {0: EngineAnswer((-1.0,), [7], text)}


def test_every_repeat_asks_all_questions_in_an_order_of_its_own() -> None:
    orders = [order_repeat(50, repeat) for repeat in range(5)]
    assert orders[0] == list(range(50))
    assert all(sorted(order) == orders[0] for order in orders)
    assert len({tuple(order) for order in orders}) == 5
    assert orders[3] == order_repeat(50, 3)
