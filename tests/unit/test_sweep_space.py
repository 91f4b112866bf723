"""The space of a sweep: its trials and their names, how long they train, and what is refused before anything starts."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from layerplan.config.load import validate_config
from layerplan.config.plan import PlanOptions
from layerplan.config.run import RunConfig
from layerplan.config.sweep import SweepConfig
from layerplan.errors import ClusterError, ConfigError
from layerplan.pipeline.candidates import make_candidates
from layerplan.pipeline.sweep_checks import check_sweep
from layerplan.pipeline.sweep_dry_run import print_sweep_dry_run
from layerplan.plan.layer_measurement import LayerMeasurement
from layerplan.plan.model_shape import ModelShape
from layerplan.sweep.rating import rate_by_measurement
from layerplan.sweep.room import TrialNeeds, choose_concurrency, count_fitting
from layerplan.sweep.schedule import compute_flops
from layerplan.sweep.space import OwnValues, list_points
from tests.qwen3 import QWEN3_0P6B, QWEN3_0P6B_IDENTITY

SHAPE = ModelShape.from_hf_config(QWEN3_0P6B)
OWN = OwnValues(PlanOptions(), 1e-3, 7)
ROWS = {"seq_len": 256}
SCRATCH = {"type": "scratch", "num_layers": 4}


def make_config(**values: object) -> RunConfig:
    return validate_config({"name": "s", "model": SCRATCH, "train": {"global_batch_size": 4}, "corpus": ROWS} | values)


def test_a_trial_is_named_by_what_differs_from_the_run() -> None:
    sweep = SweepConfig(
        boundaries=[3],
        freeze=["deep", "shallow"],
        ends=[PlanOptions(), PlanOptions(train_final_norm=True)],
        learning_rates=[1e-3, 3e-4],
        seeds=[7, 8],
    )
    names = [point.name for point in list_points(sweep, [3], OWN)]
    assert len(set(names)) == len(names) == 16
    assert names[0] == "boundary_03" and names[1] == "boundary_03_seed8" and names[2] == "boundary_03_lr0.0003"
    assert "boundary_03_shallow_final_norm_lr0.0003_seed8" in names


def test_evenly_spaced_layers_are_as_many_as_lie_above_the_boundary() -> None:
    values = {"boundaries": [4, 20, 27], "freeze": ["shallow", "spread"], "ends": [{"train_final_norm": True}]}
    sweep = SweepConfig.model_validate(values | {"max_steps": 4})
    trials = make_candidates(make_config(), sweep, QWEN3_0P6B_IDENTITY, SHAPE)
    assert [trial.point.name for trial in trials[:2]] == [
        "boundary_04_shallow_final_norm",
        "boundary_04_spread_final_norm",
    ]
    for deep, spread in zip(trials[::2], trials[1::2], strict=True):
        count = SHAPE.num_layers - spread.point.boundary
        assert spread.plan.plan_type == "spread" and spread.plan.train_final_norm
        assert len(spread.plan.trainable_layers) == len(deep.plan.trainable_layers) == count
        assert spread.plan.trainable_layers == spread.point.list_trained(SHAPE.num_layers)
        assert deep.plan.trainable_layers == deep.point.list_trained(SHAPE.num_layers)
        gaps = np.diff(spread.plan.trainable_layers)
        assert np.ptp(gaps) <= 1 if len(gaps) else spread.plan.trainable_layers == (14,)
        assert spread.cost.flops_share > deep.cost.flops_share


@pytest.mark.parametrize("higher_trains", [True, False])
def test_a_measurement_rates_what_trains_against_what_freezes(higher_trains: bool) -> None:
    """By hand: the difference of the means in units of what a random choice of as many layers would scatter."""
    values = [3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0, 6.0]
    kinds = {"higher_trains": higher_trains, "values": values}
    measurement = LayerMeasurement.model_construct(name="gradient_norm", **kinds)
    rate = rate_by_measurement(measurement)
    sweep = SweepConfig(boundaries=[2, 6, 7], freeze=["deep", "shallow", "spread"])
    trained = {
        "boundary_02": [0, 1],
        "boundary_02_shallow": [2, 3, 4, 5, 6, 7],
        "boundary_02_spread": [0, 2, 3, 4, 6, 7],
    }
    trained |= {"boundary_06": [0, 1, 2, 3, 4, 5], "boundary_06_shallow": [6, 7], "boundary_06_spread": [2, 6]}
    trained |= {"boundary_07": [0, 1, 2, 3, 4, 5, 6], "boundary_07_shallow": [7], "boundary_07_spread": [4]}
    for point in list_points(sweep, [2, 6, 7], OWN):
        inside = [values[layer] for layer in trained[point.name]]
        outside = [values[layer] for layer in range(8) if layer not in trained[point.name]]
        step = sum(inside) / len(inside) - sum(outside) / len(outside)
        expected = step * math.sqrt(len(inside) * len(outside)) / 8 * (1 if higher_trains else -1)
        assert rate(point) == pytest.approx(expected, rel=1e-12), point.name


def test_a_trial_keeps_its_name_when_the_space_grows() -> None:
    small = {point.name for point in list_points(SweepConfig(boundaries=[1]), [1], OWN)}
    sweep = SweepConfig(boundaries=[1, 2], freeze=["shallow", "deep"], learning_rates=[3e-4, 1e-3], seeds=[1, 7])
    assert small < {point.name for point in list_points(sweep, [1, 2], OWN)}


def test_values_given_twice_are_one_trial() -> None:
    sweep = SweepConfig(boundaries=[1], freeze=["deep", "deep"], seeds=[7, 7])
    assert [point.name for point in list_points(sweep, [1], OWN)] == ["boundary_01"]


def test_a_side_may_stand_alone_as_in_configs_of_earlier_versions() -> None:
    config = make_config(sweep={"split_ratios": [0.25, 0.3], "freeze": "shallow", "max_steps": 4})
    assert config.sweep is not None and config.sweep.freeze == ["shallow"] and config.sweep.search.type == "grid"
    candidate = make_candidates(config, config.sweep, QWEN3_0P6B_IDENTITY, SHAPE)[0]
    assert candidate.plan.plan_type == "freeze_shallow" and candidate.point.boundary == 7


def test_equal_flops_gives_every_plan_the_flops_of_training_everything() -> None:
    config = make_config()
    sweep = SweepConfig(boundaries=[7, 14, 21], freeze=["deep", "shallow"], max_steps=1000, equal="flops")
    trials = make_candidates(config, sweep, QWEN3_0P6B_IDENTITY, SHAPE)
    tokens = 4 * config.corpus.seq_len
    full = trials[0].cost.full
    wanted = 1000 * (tokens * full.total_flops + full.optimizer_flops_per_step)
    for trial in trials:
        assert trial.steps > 1000 and trial.flops == compute_flops(trial.cost, trial.steps, tokens)
        assert math.isclose(trial.flops, wanted, rel_tol=1e-3)
    deep, shallow = (
        next(t for t in trials if (t.point.boundary, t.point.freeze) == (14, f)) for f in ("deep", "shallow")
    )
    assert shallow.steps > deep.steps, "no gradient passes a frozen prefix"
    tokens_alike = make_candidates(config, sweep.model_copy(update={"equal": "tokens"}), QWEN3_0P6B_IDENTITY, SHAPE)
    assert {trial.steps for trial in tokens_alike} == {1000}


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ({"boundaries": []}, r"sweep\.boundaries or sweep\.split_ratios must name at least one value"),
        ({"boundaries": [1], "freeze": []}, r"sweep\.freeze"),
        ({"boundaries": [1], "learning_rates": []}, r"sweep\.learning_rates"),
        ({"boundaries": [1], "learning_rates": [0.0]}, r"sweep\.learning_rates\.0"),
        ({"boundaries": [1], "ends": []}, r"sweep\.ends"),
        ({"boundaries": [1], "seeds": []}, r"sweep\.seeds"),
        ({"boundaries": [1], "search": "bayes"}, r"sweep\.search.*bayes"),
        ({"boundaries": [1], "search": {"type": "random"}}, r"num_trials"),
    ],
)
def test_an_empty_space_and_an_unknown_search_are_refused_by_their_field(sweep: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_config(sweep=sweep)


@pytest.mark.parametrize(
    ("sweep", "config", "words"),
    [
        ({"boundaries": [1, 4]}, {}, r"sweep\.boundaries=4: must lie in 1\.\.3"),
        ({"boundaries": [1], "metric": "english"}, {}, r"sweep\.metric='english': no trial reports it; allowed: valid"),
        (
            {"boundaries": [1]},
            {"corpus": ROWS | {"validation_rows": 0}},
            r"sweep\.metric=validation_loss: no trial reports it, as no rows",
        ),
    ],
)
def test_what_no_model_has_and_no_trial_reports_is_refused_before_anything_starts(
    sweep: dict[str, object], config: dict[str, object], words: str
) -> None:
    checked = make_config(sweep=sweep, **config)
    assert checked.sweep is not None
    for check in (check_sweep, print_sweep_dry_run):
        with pytest.raises(ConfigError, match=words):
            check(checked, checked.sweep)


def test_scores_that_no_trial_is_given_are_told_and_the_config_of_a_run_is_taken(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = {"score_every_steps": 500, "guardrail_points": 1.0}
    config = make_config(sweep={"boundaries": [1]}, evaluation=asked, train={"checkpoint_every_steps": 500})
    assert config.sweep is not None
    check_sweep(config, config.sweep)
    print_sweep_dry_run(config, config.sweep)
    said = capsys.readouterr().out
    assert all(f"note   evaluation.{name} is not looked at: a sweep's trials" in said for name in asked)


def test_a_held_out_text_can_be_what_is_low(tmp_path: Path) -> None:
    held_out = [{"name": "english", "source": {"path": str(tmp_path)}}]
    config = make_config(
        sweep={"boundaries": [1], "metric": "english"},
        evaluation={"held_out": held_out},
        corpus=ROWS | {"validation_rows": 0},
    )
    assert config.sweep is not None
    check_sweep(config, config.sweep)


NEEDS = TrialNeeds(2, {"CPU": 0.5})


@pytest.mark.parametrize(
    ("nodes", "fitting"),
    [
        ([{"CPU": 2.0}], 1),  # two workers and 0.35 beside them are 1.35
        ([{"CPU": 2.7}], 2),
        ([{"CPU": 0.6}, {"CPU": 0.6}, {"CPU": 0.4}], 1),  # a worker on each of the first two
        ([{"CPU": 0.9}, {"CPU": 0.4}], 0),  # one place for a worker
        ([{}], 0),
    ],
)
def test_room_is_counted_by_the_places_of_workers(nodes: list[dict[str, float]], fitting: int) -> None:
    assert count_fitting(nodes, NEEDS) == fitting


def test_gpus_are_counted_too() -> None:
    needs = TrialNeeds(4, {"CPU": 1.0, "GPU": 1.0})
    assert count_fitting([{"CPU": 64.0, "GPU": 8.0}], needs) == 2
    assert count_fitting([{"CPU": 64.0}], needs) == 0


def test_trials_at_once_follow_what_is_free_and_more_than_the_cluster_has_is_refused() -> None:
    whole, free = [{"CPU": 4.0}], [{"CPU": 1.5}]
    assert choose_concurrency("auto", NEEDS, whole=whole, free=whole) == (2, "")
    assert choose_concurrency("auto", NEEDS, whole=whole, free=free) == (1, "")
    chosen, line = choose_concurrency(2, NEEDS, whole=whole, free=free)
    assert chosen == 1 and line.startswith("1 trials at once in place of 2")
    assert choose_concurrency(1, NEEDS, whole=whole, free=[{}])[1].startswith("no room")
    for asked in (3, "auto"):
        nodes = whole if asked == 3 else [{"CPU": 1.0}]
        with pytest.raises(ClusterError, match=rf"sweep.max_concurrent_trials={asked}: .* holds at most \d at once"):
            choose_concurrency(asked, NEEDS, whole=nodes, free=nodes)
