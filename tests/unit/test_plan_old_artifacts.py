"""A profile and a plan written before boundaries had rules: they load, keep their hashes, and say what decided them.

`data/layout_1` was made by that code from random numbers: eight layers, boundary 7 = L - 1 "in every resample".
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from layerplan.artifacts import compute_sha256
from layerplan.config.plan import FromProfilePlanConfig, SemanticPlanConfig
from layerplan.errors import PlanError
from layerplan.plan.boundary_choice import choose_boundary
from layerplan.plan.describe import describe_certainty, describe_measurement
from layerplan.plan.explain import describe_older_rule, explain_plan
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import SCHEMA_VERSION, LayerProfile
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_plan
from layerplan.report.figures import draw_alignment, draw_profiles
from layerplan.report.measurement import render_measurement
from layerplan.report.page import _plan_section
from tests.qwen3 import QWEN3_0P6B

FOLDER = Path(__file__).parent / "data/layout_1"
PROFILE = FOLDER / "layer_profile.json"
SHAPE = ModelShape.from_hf_config({**QWEN3_0P6B, "num_hidden_layers": 8})


def test_an_old_profile_keeps_its_measurement_and_loses_what_an_empty_side_gave() -> None:
    written = json.loads(PROFILE.read_text())
    profile = LayerProfile.load(PROFILE)
    assert profile.sha256 == written["sha256"] and profile.schema_version == 1
    assert profile.task_particle == written["task_particle"] and profile.js == written["js"]
    assert len(written["alignment_score"]) == 7 and profile.alignment_score == written["alignment_score"][:6]
    assert written["best_boundary"] == 7 and profile.empty_side_boundary == 7
    assert profile.best_boundary == 1
    assert profile.probe_stability == {"empty_side_as_zero": written["boundary_win_share"]}
    words = " ".join([*describe_measurement(profile), *describe_certainty(profile)])
    assert "of layout 1, whose rule counted an empty side as 0 and chose boundary 7" in words
    assert "older than the comparison" in words and "supports no boundary" in words


def test_an_old_profile_is_asked_under_any_rule() -> None:
    profile = LayerProfile.load(PROFILE)
    assert choose_boundary(profile).decided_by == "midpoint"
    assert choose_boundary(profile, FromProfilePlanConfig(rule="paper", without_evidence="best")).boundary == 1


def test_deviations_taken_from_the_heads_rows_decide_no_plan() -> None:
    """Layouts 1 and 2 did not follow SALF's Algorithm 1; the cosine deviation was right in both."""
    content = json.loads(PROFILE.read_text())
    for layout in (1, 2):
        kinds = dict.fromkeys(("cosine", "ce", "rank"), content["semantic"]["cosine"])
        old = {**content, "schema_version": layout, "semantic": kinds}
        if layout == 2:
            old |= {"best_boundary": 1, "alignment_score": content["alignment_score"][:6]}
            del old["boundary_win_share"]
        profile = LayerProfile.model_validate(old)
        assert set(profile.semantic) == {"cosine"} and set(profile.head_row_semantic) == {"ce", "rank"}
        assert f"of layout {layout}, whose ce and rank deviations" in " ".join(describe_measurement(profile))
        shape = SHAPE
        plan = make_plan(SemanticPlanConfig(), model=profile.model, shape=shape, profile=profile)
        assert plan.trainable_layers[-1] == 7
        with pytest.raises(
            PlanError, match=rf"plan.deviation=rank: the layer profile is of layout {layout}.*trace the model"
        ):
            make_plan(SemanticPlanConfig(deviation="rank"), model=profile.model, shape=shape, profile=profile)
    now = LayerProfile.model_validate({**old, "schema_version": 3})
    assert set(now.semantic) == {"cosine", "ce", "rank"} and not now.head_row_semantic


def test_an_old_plan_verifies_and_says_under_which_rule_it_was_made() -> None:
    plan = FreezePlan.load(FOLDER / "freeze_plan.json")
    assert plan.trainable_layers == tuple(range(7)) and plan == plan.sealed()
    text = explain_plan(plan, LayerProfile.load(PROFILE))
    assert "made under the first rule: the largest S, with a side that has no layer counted as 0" in text
    assert describe_older_rule(plan) in text and describe_older_rule(plan) in _plan_section(plan)


def test_a_plan_keeps_its_hash_whatever_version_priced_it(tmp_path: Path) -> None:
    """The optimizer's work was not always predicted, and a plan need not be priced at all."""
    written = json.loads((FOLDER / "freeze_plan.json").read_text())
    older = json.loads(json.dumps(written))
    for cost in ("plan", "full"):
        del older["predicted_cost"][cost]["optimizer_flops_per_step"]
    for content in (written, older, {**written, "predicted_cost": {}}):
        content["sha256"] = compute_sha256({name: value for name, value in content.items() if name != "sha256"})
        (tmp_path / "plan.json").write_text(json.dumps(content))
        plan = FreezePlan.load(tmp_path / "plan.json")
        assert plan.sealed().sha256 == content["sha256"]
        plan.save(tmp_path / "again.json")
        assert json.loads((tmp_path / "again.json").read_text()) == content


def test_the_report_shows_an_old_measurement() -> None:
    profile, plan = LayerProfile.load(PROFILE), FreezePlan.load(FOLDER / "freeze_plan.json")
    html = render_measurement(profile, {}, plan)
    html = re.sub(r' data-label="[^"]*"', "", html)
    assert "of layout 1" in html and "<td>absolute</td><td>paper</td>" in html
    # no group was asked what its answers are made of
    assert "<td>a</td><td>33%</td><td>-</td><td>-</td>" in html
    for figure in (
        draw_alignment(profile, choose_boundary(profile)),
        draw_profiles(profile, plan, choose_boundary(profile)),
    ):
        figure.draw_without_rendering()


def test_a_changed_byte_of_an_old_profile_is_noticed(tmp_path: Path) -> None:
    text = PROFILE.read_text()
    changed = text.replace('"best_boundary": 7', '"best_boundary": 6')
    assert changed != text
    (tmp_path / "layer_profile.json").write_text(changed)
    with pytest.raises(PlanError, match="was changed after it was made"):
        LayerProfile.load(tmp_path / "layer_profile.json")


def test_a_profile_of_today_survives_its_file(tmp_path: Path) -> None:
    profile = (
        LayerProfile.load(PROFILE)
        .model_copy(update={"schema_version": SCHEMA_VERSION, "empty_side_boundary": None})
        .sealed()
    )
    profile.save(tmp_path / "layer_profile.json")
    assert LayerProfile.load(tmp_path / "layer_profile.json") == profile
