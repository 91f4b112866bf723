"""Which placement groups nobody can use any more."""

from __future__ import annotations

from dataclasses import replace

from layerplan.leftovers import Group, describe, find_leftovers

LEFT = Group(id=b"1", job="02000000", actor="a1", is_detached=False, cpus=2.0, gpus=0.0)


def test_only_groups_of_ended_jobs_and_dead_makers_are_left_over() -> None:
    groups = [
        LEFT,
        replace(LEFT, id=b"2", actor=""),
        replace(LEFT, id=b"3", is_detached=True),
        replace(LEFT, id=b"4", actor="lives"),
        replace(LEFT, id=b"5", job="03000000"),
    ]
    found = find_leftovers(groups, {"02000000"}, lambda actor: actor == "lives")
    assert [group.id for group in found] == [b"1", b"2"]


def test_the_line_says_how_much_and_of_whom() -> None:
    assert describe([]) == ""
    assert describe([LEFT, replace(LEFT, job="01000000", gpus=8.0)]) == (
        "gave back 4 CPU and 8 GPU that Ray still reserved for job 01000000, 02000000, which has ended"
    )
