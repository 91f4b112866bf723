"""SALF's budgets against Table 5 of the paper, and Algorithm 4 against a plain reading of it."""

from __future__ import annotations

import random

import pytest

from layerplan.plan.sample_budget import allocate_start_layers, assign_start_layers

LAYERS = 32
SAMPLES = {"CARER": 16000, "MRPC": 4076, "SST5": 8544, "TREC": 5452, "WebSS": 10060}
TABLE_5 = {
    ("half", "depth_first"): (0.484, 0.483, 0.484, 0.484, 0.484),
    ("half", "breadth_first"): (0.484, 0.483, 0.484, 0.484, 0.484),
    ("geometric", "breadth_first"): (0.374, 0.312, 0.346, 0.328, 0.355),
    ("geometric", "depth_first"): (0.616, 0.583, 0.601, 0.589, 0.604),
    ("arithmetic", "depth_first"): (0.644, 0.640, 0.644, 0.642, 0.645),
}


def compute_cost_saving(counts: list[int]) -> float:
    """The paper's: the mean start layer, as a share of the layers."""
    return sum(layer * count for layer, count in enumerate(counts)) / sum(counts) / len(counts)


@pytest.mark.parametrize(("kind", "filling"), TABLE_5)
def test_cost_savings_are_those_of_table_5(kind: str, filling: str) -> None:
    for samples, expected in zip(SAMPLES.values(), TABLE_5[kind, filling]):
        counts = allocate_start_layers(samples, LAYERS, kind, filling)  # type: ignore[arg-type]
        assert sum(counts) == samples
        assert round(compute_cost_saving(counts), 3) == expected


def test_breadth_first_arithmetic_is_ours_and_saves_less_than_depth_first() -> None:
    for samples in SAMPLES.values():
        breadth, depth = (
            compute_cost_saving(allocate_start_layers(samples, LAYERS, "arithmetic", filling))
            for filling in ("breadth_first", "depth_first")
        )
        assert breadth < depth


@pytest.mark.parametrize("kind", ["half", "geometric", "arithmetic"])
@pytest.mark.parametrize("filling", ["depth_first", "breadth_first"])
def test_counts_add_up_for_any_size(kind: str, filling: str) -> None:
    for samples in (1, 2, 7, 15, 16, 100, 1023):
        counts = allocate_start_layers(samples, 4, kind, filling)  # type: ignore[arg-type]
        assert sum(counts) == samples and min(counts) >= 0
    if kind == "geometric":
        assert allocate_start_layers(15, 4, "geometric", filling) == [1, 2, 4, 8]  # type: ignore[arg-type]


def test_samples_start_no_higher_than_their_layer_while_places_last() -> None:
    rng = random.Random(0)
    eof = [rng.randrange(6) for _ in range(200)]
    counts = allocate_start_layers(200, 6, "arithmetic", "depth_first")
    starts = assign_start_layers(eof, counts, seed=1)
    assert [starts.count(layer) for layer in range(6)] == counts
    for layer in range(6):
        waiting = [sample for sample in range(200) if starts[sample] >= layer]
        matching = [sample for sample in waiting if eof[sample] <= layer]
        for sample in matching[: counts[layer]]:
            assert starts[sample] == layer
    assert assign_start_layers(eof, counts, seed=1) == starts
