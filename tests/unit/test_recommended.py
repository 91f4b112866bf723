"""`plan.type: recommended`: what the finished study says is what is taken, under the user's limit, and it is named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from layerplan.artifacts import render_json
from layerplan.config.plan import RecommendedPlanConfig
from layerplan.errors import PlanError
from layerplan.plan import recommended
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_plan
from layerplan.plan.study_evidence import StudiedPlan, Study, StudyEvidence, load_study_evidence
from tests.qwen3 import QWEN3_0P6B

ROOT = Path(__file__).parents[2]
FILE = ROOT / "layerplan/plan/study_evidence.json"
SHAPE = ModelShape.from_hf_config({**QWEN3_0P6B, "num_hidden_layers": 12})
MODEL = ModelIdentity(name="twelve", model_type="qwen3", num_layers=12)


def plan_for(prefer: str, share: float | None = None) -> FreezePlan:
    config = RecommendedPlanConfig(prefer=prefer, max_flops_share=share)  # type: ignore[arg-type]
    return make_plan(config, model=MODEL, shape=SHAPE)


def make_study(name: str = "made_up", *, layers: int = 4, done: int = 8) -> Study:
    """Four layers, three plans: everything, the deep half and the shallow half, each best at something."""
    rows: list[tuple[str, int, float, float, float]] = [
        ("full", 4, 1.0, 1.0, 5.0),
        ("deep", 2, 0.6, 2.0, 3.0),
        ("shallow", 2, 0.8, 3.0, 1.0),
    ]
    plans = [
        StudiedPlan(trains=trains, num_trained=n, flops_share=s, rate=1e-3, loss={"target": t, "source": f})
        for trains, n, s, t, f in rows
    ]
    is_finished = done == 8
    return Study(
        name=name,
        model_type="llama",
        num_layers=layers,
        target="t",
        source="s",
        seeds=[0, 1],
        held_out_rows=4,
        tokens=100,
        seq_len=16,
        commits=["abc"],
        planned=8,
        done=done,
        base={"target": 9.0, "source": 0.5},
        noise={"target": 0.01, "source": 0.01} if is_finished else {},
        plans=plans if is_finished else [],
        rivals=[],
    )


PRICES = {None: 1.0, (0, 1): 0.8, (2, 3): 0.6, (0,): 0.7, (3,): 0.5}
"""Of everything and both halves; of single layers where a deeper study is carried over."""


def choose(prefer: str, share: float | None, *studies: Study) -> recommended.Recommendation:
    config = RecommendedPlanConfig(prefer=prefer, max_flops_share=share)  # type: ignore[arg-type]
    evidence = StudyEvidence(command="", studies=list(studies or (make_study(),)))
    return recommended.recommend(config, 4, lambda layers: PRICES[layers], evidence)


@pytest.mark.parametrize(
    ("prefer", "share", "layers"),
    [
        ("adaptation", None, None),  # everything: 1.0
        ("adaptation", 0.9, (2, 3)),  # 2.0 against 3.0
        ("retention", None, (0, 1)),
        ("retention", 0.7, (2, 3)),
        ("balanced", None, None),  # (0 + 1) / 2, (0.5 + 0.5) / 2, (1 + 0) / 2: all alike, the cheapest of them is taken
    ],
)
def test_the_best_that_the_limit_pays_for_is_taken(prefer: str, share: float | None, layers: Any) -> None:
    found = choose(prefer, share)
    assert found.layers == ((2, 3) if prefer == "balanced" else layers)
    assert "Study made_up did best on" in found.reason and "rests on one finished study" in found.reason


def test_the_study_nearest_in_depth_speaks_and_unfinished_ones_are_counted() -> None:
    near, far = make_study("near"), make_study("far", layers=40)
    found = choose("adaptation", 0.9, far, near, make_study("begun", done=3))
    assert found.evidence["recommended"]["study"]["name"] == "near"
    assert "nearest of 2 studies" in found.reason and "begun has 3 of 8 trainings" in found.reason
    assert "Study far, of a base of 40 layers (llama), would take the deep 1 of this model's layers." in found.reason
    assert found.evidence["recommended"]["other_studies"]["far"]["trains"] == "deep"
    with pytest.raises(PlanError, match="no study is finished"):
        choose("adaptation", None, make_study(done=3))


def test_of_two_studies_of_one_depth_the_one_with_more_plans_speaks() -> None:
    whole = make_study("whole")
    coarse = whole.model_copy(update={"name": "coarse", "plans": whole.plans[:2]})
    for order in ((coarse, whole), (whole, coarse)):
        found = choose("retention", None, *order)
        assert found.evidence["recommended"]["study"]["name"] == "whole" and found.layers == (0, 1)
        assert (
            "Study coarse, of a base of 4 layers (llama), would take the deep 2 of this model's layers." in found.reason
        )


def test_a_limit_that_pays_for_nothing_names_the_cheapest() -> None:
    with pytest.raises(PlanError, match=r"plan.max_flops_share=0.5: the cheapest plan of study made_up costs 0.600"):
        choose("retention", 0.5)


def test_the_packages_evidence_is_what_the_command_makes_of_the_packed_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from study_evidence import collect

    assert render_json(collect().model_dump(mode="json")) == FILE.read_text(encoding="utf-8")


FINISHED = [each for each in load_study_evidence().studies if each.is_finished]


@pytest.mark.parametrize("study", FINISHED, ids=lambda study: study.name)
def test_the_evidence_has_the_numbers_of_the_published_tables(study: Study) -> None:
    """Rows of the study's page, which other code made of the same arms."""
    text = (ROOT / f"benchmarks/results/study_{study.name}.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"## Held-out (\w+) text: \w+\n(.*?)(?=\n## )", text, re.DOTALL))
    for name, section in sections.items():
        rows = {
            row[0]: row[1:] for row in re.findall(r"\| ([^|]+) \| (\d+) \| (\d+)% \| [\d.]+ \| ([\d.]+) \|", section)
        }
        for plan in study.plans:
            boundary = plan.num_trained if plan.trains == "shallow" else study.num_layers - plan.num_trained
            names = {"full": "full", "spread": f"spread, {plan.num_trained} layers"}
            row = rows[names.get(plan.trains, f"{plan.trains} of {boundary}")]
            assert row[0] == str(plan.num_trained) and row[2] == f"{plan.loss[name]:.4f}"  # type: ignore[index]
    assert f"{study.noise['target']:.4f}" in text and f"{study.noise['source']:.4f}" in text


def test_preferences_and_limits_give_plans_of_the_finished_study() -> None:
    """By its tables: deep of 4 is best on the target but for everything, deep of 11 on the source."""
    everything = plan_for("adaptation")
    assert everything.trains_everything and "with everything, the embeddings too, trained" in everything.reason
    assert plan_for("adaptation", 0.9).trainable_layers == tuple(range(4, 12))
    assert plan_for("retention").trainable_layers == (11,)
    balanced = plan_for("balanced", 0.9)
    assert balanced.plan_type == "recommended" and balanced.tied == "frozen" and not balanced.train_lm_head
    assert balanced.predicted_cost is not None and balanced.predicted_cost.flops_share <= 0.9
    kept = balanced.evidence["recommended"]
    assert "Study scratch_zh did best on both texts alike" in balanced.reason and kept["better_measured"] == []
    assert kept["study"]["commits"] == ["535ee30", "644de67-dirty", "874c895"] and "plans" not in kept["study"]
    assert len(kept["not_told_from_it"]) >= 3 and "other plans came within the noise of its seeds" in balanced.reason


def test_a_deep_model_gets_what_the_real_base_was_best_with() -> None:
    """By the tables of SmolLM2: 15 evenly spaced of 30 at 80 %, the deep 27 at 88 %; the deep 15 below two thirds."""
    shape = ModelShape.from_hf_config({**QWEN3_0P6B, "num_hidden_layers": 28})
    model = ModelIdentity(name="deep", model_type="qwen3", num_layers=28)

    def plan(prefer: str, share: float | None) -> FreezePlan:
        config = RecommendedPlanConfig(prefer=prefer, max_flops_share=share)  # type: ignore[arg-type]
        return make_plan(config, model=model, shape=shape)

    assert plan("adaptation", None).trains_everything
    assert plan("adaptation", 0.85).trainable_layers == tuple(range(1, 28, 2))
    found = plan("balanced", 0.8)
    assert found.trainable_layers == (2, 6, 10, 14, 18, 22, 26)  # 8 of 30 are 7 of 28
    assert "with 8 evenly spaced of 30 layers trained" in found.reason and "Study scratch_zh" in found.reason
    assert plan("adaptation", 0.6).trainable_layers[-1] == 27 and plan("adaptation", 0.6).trainable_layers[0] >= 14


def test_a_model_of_two_layers_gets_a_plan_too() -> None:
    shape = ModelShape.from_hf_config({**QWEN3_0P6B, "num_hidden_layers": 2})
    model = ModelIdentity(name="two", model_type="qwen3", num_layers=2)
    plan = make_plan(RecommendedPlanConfig(prefer="retention"), model=model, shape=shape)
    assert plan.trainable_layers == (1,)
