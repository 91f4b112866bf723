"""In which order a space is gone through, what a search leaves out, and that none is run twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from layerplan.config.plan import PlanOptions
from layerplan.config.search import (
    GridSearchConfig,
    OptunaSearchConfig,
    ProfileSearchConfig,
    RandomSearchConfig,
    SearchConfig,
)
from layerplan.config.sweep import SweepConfig
from layerplan.sweep.choosers import Chooser, make_chooser
from layerplan.sweep.space import OwnValues, Point, list_points
from layerplan.sweep.still_wins import list_possible

OWN = OwnValues(PlanOptions(), 1e-3, 0)


def make_space(last: int = 9, **sweep: object) -> list[Point]:
    boundaries = list(range(1, last + 1))
    return list_points(SweepConfig.model_validate({"boundaries": boundaries, **sweep}), boundaries, OWN)


SPACE = make_space(freeze=["deep", "shallow"])


def run_all(chooser: Chooser, loss: Callable[[Point], float]) -> list[str]:
    order = []
    while (point := chooser.choose()) is not None:
        order.append(point.name)
        chooser.tell(point, loss(point))
    return order


def valley(point: Point) -> float:
    """Lowest at boundary 6, and the shallow side 0.05 above the deep one."""
    return 2.0 + 0.03 * abs(point.boundary - 6) + (0.05 if point.freeze == "shallow" else 0.0)


SEARCHES: list[SearchConfig] = [
    GridSearchConfig(),
    RandomSearchConfig(num_trials=7),
    OptunaSearchConfig(num_trials=7),
    ProfileSearchConfig(),
]


@pytest.mark.parametrize("search", SEARCHES, ids=lambda search: search.type)
def test_no_trial_is_given_out_twice_nor_one_that_ended_before(search: SearchConfig) -> None:
    before = SPACE[3]
    chooser = make_chooser(search, SPACE, rate=lambda point: point.boundary)
    chooser.tell(before, valley(before))
    order = run_all(chooser, valley)
    assert len(set(order)) == len(order) and before.name not in order
    assert len(order) <= chooser.most


def test_a_grid_is_everything_in_order_and_a_draw_grows_by_its_end() -> None:
    assert run_all(make_chooser(GridSearchConfig(), SPACE), valley) == [point.name for point in SPACE]
    few = run_all(make_chooser(RandomSearchConfig(num_trials=5), SPACE), valley)
    more = run_all(make_chooser(RandomSearchConfig(num_trials=9), SPACE), valley)
    assert more[:5] == few and len(set(more)) == 9
    assert run_all(make_chooser(RandomSearchConfig(num_trials=99, seed=1), SPACE), valley) != more
    assert len(run_all(make_chooser(RandomSearchConfig(num_trials=99), SPACE), valley)) == len(SPACE)


def test_optuna_runs_as_many_as_asked_for_all_told_and_learns() -> None:
    search = OptunaSearchConfig(num_trials=12, seed=1)
    order = run_all(make_chooser(search, SPACE), valley)
    assert len(order) == 12
    assert min(valley(point) for point in SPACE if point.name in order) <= 2.03
    chooser = make_chooser(search, SPACE, begun=[SPACE[8].name])
    for point in SPACE[:4]:
        chooser.tell(point, valley(point))
    again = run_all(chooser, valley)
    assert len(again) == 8 and again[0] == SPACE[8].name, "what was begun comes first, what ended counts"
    assert len(run_all(make_chooser(OptunaSearchConfig(num_trials=99), SPACE), valley)) == len(SPACE)
    assert len(run_all(make_chooser(search, make_space(1)), valley)) == 1, "a space without a choice"


def test_a_measurement_that_is_right_finds_the_best_in_few_trials() -> None:
    order = run_all(make_chooser(ProfileSearchConfig(), SPACE, rate=lambda point: -valley(point)), valley)
    assert order[0] == "boundary_06"
    assert len(order) <= 6, order


def test_a_measurement_that_is_wrong_costs_trials_and_not_the_best() -> None:
    """The worst order there is, from the ends inwards, is the grid."""
    order = run_all(make_chooser(ProfileSearchConfig(), SPACE, rate=valley), valley)
    assert "boundary_06" in order


def test_further_seeds_are_for_what_is_near_the_best() -> None:
    space = make_space(freeze=["deep", "shallow"], seeds=[0, 1, 2])
    order = run_all(make_chooser(ProfileSearchConfig(), space, rate=lambda point: -valley(point)), valley)
    assert [name for name in order if "seed" in name] == ["boundary_06_seed1", "boundary_06_seed2"]
    assert len(order) <= 0.4 * len(space)


def test_what_may_win_worked_out_by_hand() -> None:
    """Tested 2, 4 and 7 of 9: the valley is at 4 and ends at 2 and 7."""
    space = make_space()
    losses = {"boundary_02": 2.10, "boundary_04": 2.00, "boundary_07": 2.05}
    assert [point.boundary for point in list_possible(space, losses, 0.01)] == [3, 5, 6]
    assert [point.boundary for point in list_possible(space, losses, 0.06)] == [3, 5, 6, 8, 9], "4 and 7 are alike"
    sides = make_space(freeze=["deep", "shallow"])
    worse = losses | {"boundary_03_shallow": 2.40, "boundary_06_shallow": 2.30}
    possible = list_possible(sides, worse, 0.01)
    assert not [point for point in possible if point.freeze == "shallow"], "2.30 - 0.10 lies above 2.00 + 0.01"
    assert [point for point in list_possible(sides, worse | {"boundary_06_shallow": 2.10}, 0.01) if "sh" in point.name]


def test_a_failed_trial_ends_no_search() -> None:
    order = run_all(
        make_chooser(ProfileSearchConfig(), SPACE, rate=lambda point: -valley(point)),
        lambda point: float("inf") if point.boundary == 6 else valley(point),
    )
    assert {"boundary_05", "boundary_07"} <= set(order)
