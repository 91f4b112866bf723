"""Whose turn it is on a shared cluster, which nodes suit, and what is said of it: values only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from pydantic import ValidationError

from layerplan.config.train import TrainConfig
from layerplan.errors import ClusterError
from layerplan.sharing.demand import Demand, count_room, suits, sum_up
from layerplan.sharing.describe import describe_place, name_place, render_line
from layerplan.sharing.fit import check_fit
from layerplan.sharing.rule import Node, Turn, choose_group_nodes, find_ahead, find_missing, may_start
from layerplan.sharing.turn import SaidPlace

H100 = {"ray.io/accelerator-type": "H100", "ray.io/node-id": "a"}
L4 = {"ray.io/accelerator-type": "L4", "ray.io/node-id": "c"}


def node(
    name: str, gpus: float, free: float | None = None, *, cpus: float = 16, labels: Mapping[str, str] = {}
) -> Node:
    total = {"GPU": gpus, "CPU": cpus}
    return Node(name, labels, total, {"GPU": gpus if free is None else free, "CPU": cpus})


def workers(count: int, *, together: int = 1, labels: dict[str, str] | None = None, **resources: float) -> Demand:
    wanted = {name.upper(): amount for name, amount in resources.items()} or {"GPU": 1.0, "CPU": 1.0}
    return Demand(what="w", field="train", count=count, resources=wanted, labels=labels or {}, together=together)


def turn(name: str, demand: Demand, *, priority: int = 0, since: float = 0.0, started: float | None = None) -> Turn:
    return Turn(
        id=name, job=f"job-{name}", name=name, priority=priority, demands=[demand], since=since, started=started
    )


def test_a_higher_priority_goes_first_and_then_who_came_first() -> None:
    low, late, high = turn("low", workers(1)), turn("late", workers(1), since=1), turn("high", workers(1), priority=5)
    assert [each.name for each in find_ahead(late, [low, late, high])] == ["high", "low"]
    cluster = [node("a", 2)]
    assert [may_start(each, [low, late, high], cluster, {}) for each in (high, low, late)] == [True, True, False]


def test_a_run_passes_one_ahead_only_where_it_takes_nothing_that_one_waits_for() -> None:
    large = turn("large", workers(8), priority=1)
    for small, passes in (
        (workers(1), False),  # one of the four GPUs that are free belongs to who waits for eight
        (workers(1, cpu=1), True),
        (workers(1, labels={"ray.io/accelerator-type": "L4"}), False),
    ):
        asking = turn("small", small, since=1)
        assert may_start(asking, [large, asking], [node("a", 8, 4, labels=H100)], {}) is passes
    scoring = turn("small", workers(1, labels={"ray.io/accelerator-type": "L4"}), since=1)
    training = turn("large", workers(8, labels={"ray.io/accelerator-type": "H100"}))
    cluster = [node("a", 8, 4, labels=H100), node("c", 1, labels=L4)]
    assert may_start(scoring, [training, scoring], cluster, {}), "it waits for another kind of GPU"
    assert not may_start(scoring, [turn("any", workers(9)), scoring], cluster, {}), "that one would use it"


def test_who_has_started_keeps_what_it_does_not_hold_yet_and_counts_nothing_twice() -> None:
    running = turn("running", workers(4), started=1.0)
    asking = turn("asking", workers(4), since=2)
    assert not may_start(asking, [running, asking], [node("a", 7)], {}), "it holds nothing yet: four are its own"
    assert may_start(asking, [running, asking], [node("a", 8)], {})
    held = {"job-running": {"GPU": 3.0, "CPU": 3.0}}
    assert not may_start(asking, [running, asking], [node("a", 7, 4)], held), "one of the four is still to come"
    assert may_start(asking, [running, asking], [node("a", 8, 5)], held)
    more = {"job-running": {"GPU": 6.0, "CPU": 6.0}}  # a range of workers took more than the fewest
    assert may_start(asking, [running, asking], [node("a", 10, 4)], more)
    assert may_start(asking, [asking], [node("a", 4, 1)], {"job-asking": {"GPU": 3.0, "CPU": 3.0}}), "those are its own"


def test_what_is_missing_is_counted_by_whole_things() -> None:
    demands = [workers(4), workers(2, cpu=0.5)]
    missing = find_missing(demands, {"GPU": 2.0, "CPU": 3.0})
    assert [each.count for each in missing] == [2], "two of the first, and both of the second from the third CPU"
    assert find_missing(demands, {"GPU": 4.0, "CPU": 5.0}) == []


def test_groups_need_a_node_each_and_those_that_wait_for_one_keep_the_room_of_all() -> None:
    cluster = [node("a", 8, 4), node("b", 8, 6)]
    whole = turn("whole", workers(8, together=8), priority=1)
    asking = turn("asking", workers(1), since=1)
    assert not may_start(whole, [whole, asking], cluster, {}), "ten are free, but no node has eight"
    assert not may_start(asking, [whole, asking], cluster, {}), "either node may be the one"
    halves = turn("halves", workers(8, together=4))
    assert may_start(halves, [halves], cluster, {})
    assert not may_start(turn("more", workers(12, together=4)), [], cluster, {})


def test_nodes_of_replicas_are_where_there_is_room_now_or_where_there_may_be() -> None:
    cluster = [node("a", 8, 3), node("b", 8), node("c", 4, labels=L4)]
    assert choose_group_nodes(workers(8, together=4), cluster, waits=True) == ["b"] * 4 + ["c"] * 4
    only = workers(8, together=4, labels={"ray.io/accelerator-type": "!L4"})
    assert choose_group_nodes(only, cluster, waits=False) == ["b"] * 8
    assert choose_group_nodes(workers(16, together=8), cluster, waits=False) == []
    assert choose_group_nodes(workers(16, together=8), cluster, waits=True) == ["a"] * 8 + ["b"] * 8
    assert choose_group_nodes(workers(24, together=8), cluster, waits=True) == []


@pytest.mark.parametrize(
    ("wanted", "is_suitable"),
    [
        ("H100", True),
        ("L4", False),
        ("!L4", True),
        ("!H100", False),
        ("in(L4, H100)", True),
        ("!in(L4,H100)", False),
        ("in(L4,H1)", False),
    ],
)
def test_labels_are_read_as_ray_reads_them(wanted: str, is_suitable: bool) -> None:
    assert suits(H100, {"ray.io/accelerator-type": wanted}) is is_suitable
    assert suits(H100, {"market": wanted}) is wanted.startswith("!"), "a label that is not there is no value"


def test_amounts_of_the_size_of_a_rounding_do_not_hide_room() -> None:
    assert count_room({"CPU": 0.3}, {"CPU": 0.1}) == 3
    assert sum_up([workers(3, cpu=0.5), workers(1, cpu=0.25, gpu=0)]) == {"CPU": 1.75}


def test_what_a_cluster_can_never_hold_is_one_line_with_the_labels_there_are() -> None:
    cluster = [node("a", 8, labels=H100), node("b", 8, labels=H100 | {"ray.io/node-id": "b"}), node("c", 2, labels=L4)]
    check_fit([workers(16, together=8), workers(2, labels={"ray.io/accelerator-type": "L4"})], cluster)
    with pytest.raises(ClusterError) as fault:
        check_fit([workers(1, labels={"ray.io/accelerator-type": "H200"})], cluster)
    assert str(fault.value) == (
        "train.labels: no node satisfies ray.io/accelerator-type=H200; the cluster has the labels"
        " ray.io/accelerator-type=H100 (2 nodes), ray.io/accelerator-type=L4 (1 node)"
    )
    with pytest.raises(ClusterError, match=r"train: 4 x w of 1 CPU \+ 1 GPU with .*=L4: the 1 node .*hold 2 of them"):
        check_fit([workers(4, labels={"ray.io/accelerator-type": "L4"})], cluster)
    with pytest.raises(ClusterError, match=r"24 x w .*, 8 on each node: the 3 nodes could hold 16"):
        check_fit([workers(24, together=8)], cluster)


def test_the_place_names_who_is_ahead_what_they_hold_and_who_stands_outside() -> None:
    first = turn("b", workers(8), priority=5, since=100.0)
    started = turn("a", workers(4), started=0.0)
    me = turn("me", workers(2), since=200.0)
    behind = turn("z", workers(1), since=300.0)
    held: dict[str, dict[str, float]] = {"job-a": {"GPU": 4.0, "CPU": 4.0, "memory": 1e9}, "0500": {"GPU": 2.0}}
    said = describe_place(me, [started, first, me, behind], held, {"0500": "x.py, pid 7 on h"}, 720.0)
    assert said == (
        "2nd of 3, behind b (priority 5), which has waited 10 min for 8 CPU + 8 GPU, behind a (priority 0), which has had"
        " its turn for 12 min and holds 4 CPU + 4 GPU, outside the queue: job 0500 (x.py, pid 7 on h) has 2 GPU;"
        " 520 s for 2 x w of 1 CPU + 1 GPU"
    )
    table, foreign = render_line([started, first, me, behind], held, {}, 720.0)
    assert [str(cell) for cell in table.columns[0].cells] == ["started", "1st", "2nd", "3rd"]
    assert foreign == "outside the queue: job 0500 has 2 GPU"


def test_places_have_the_words_people_use() -> None:
    assert [name_place(number) for number in (1, 2, 3, 4, 11, 12, 13, 21, 102, 111)] == [
        *("1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "102nd", "111th")
    ]


def test_a_place_is_said_after_a_moment_and_every_minute_and_its_end_only_then() -> None:
    said = SaidPlace()
    lines = [said.observe(lambda: "line", now) for now in (0.0, 4.0, 6.0, 30.0, 67.0)]
    assert lines == ["", "", "line", "", "line"] and said.end(70.0) == "its turn came after 70 s"
    assert SaidPlace().end(3.0) == "", "who did not wait says nothing"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"labels": {"-x": "a"}}, "no key of a node's label"),
        ({"labels": {"market": "spot or not"}}, r"expected are VALUE, !VALUE, in\(A,B\) or !in\(A,B\)"),
        ({"num_workers": {"min": 1, "max": 2}, "placement": "strict_pack"}, "strict_pack needs one num_workers"),
        ({"placement": "together"}, "'auto', 'pack', 'strict_pack' or 'spread'"),
    ],
)
def test_labels_and_placements_that_mean_nothing_are_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        TrainConfig.model_validate(values)
    TrainConfig(labels={"ray.io/accelerator-type": "in(H100,H200)", "market": "!spot"}, placement="strict_pack")
