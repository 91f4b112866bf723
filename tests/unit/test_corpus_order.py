"""Rows and their order: nothing truncated, nothing repeated, the same whatever the world size."""

from __future__ import annotations

import numpy as np
import pytest

from layerplan.corpus.pack import Packer
from layerplan.corpus.rows import make_rows
from layerplan.corpus.schedule import LaneSchedule, RowRange
from layerplan.errors import CorpusError

END = 99


def pack(documents: list[list[int]], seq_len: int) -> list[tuple[list[int], list[int], int]]:
    packer = Packer(seq_len, END)
    rows = [row for ids in documents for row in packer.add(np.array(ids, dtype=np.int32))]
    last = packer.finish()
    rows += [last] if last is not None else []
    return [(row.input_ids.tolist(), row.starts.tolist(), row.used) for row in rows]


def test_documents_are_joined_with_end_of_text_and_continue_in_the_next_row():
    rows = pack([[1, 2], [3, 4, 5, 6, 7]], seq_len=4)
    assert rows == [([1, 2, END, 3], [0, 3], 4), ([4, 5, 6, 7], [0], 4), ([END, END, END, END], [0], 1)]


def test_every_token_of_every_document_survives_packing():
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 90, size=rng.integers(0, 40)).tolist() for _ in range(50)]
    rows = pack(documents, seq_len=16)
    stream = [token for ids, _, used in rows for token in ids[:used]]
    assert stream == [token for ids in documents for token in [*ids, END]]


def test_positions_restart_at_each_document_and_padding_is_marked():
    rows = make_rows(
        np.array([0]), np.zeros((1, 6), np.int32), [np.array([0, 2], np.int32)], used=np.array([5], np.int32)
    )
    assert rows.document_ids.tolist() == [[0, 0, 1, 1, 1, -1]]
    assert rows.position_ids.tolist() == [[0, 1, 0, 1, 2, 0]]


def make(*num_rows: int, rows_per_group: int, num_lanes: int, seed: int = 0) -> LaneSchedule:
    return LaneSchedule(tuple(map(RowRange, num_rows)), rows_per_group, num_lanes, seed)


@pytest.mark.parametrize(
    ("num_rows", "rows_per_group", "num_lanes"),
    [((64,), 4, 8), ((61,), 4, 6), ((10,), 16, 3), ((7,), 1, 7), ((33, 50, 3), 8, 12)],
)
def test_each_row_is_read_exactly_once_per_epoch_with_no_gap(
    num_rows: tuple[int, ...], rows_per_group: int, num_lanes: int
):
    schedule = make(*num_rows, rows_per_group=rows_per_group, num_lanes=num_lanes, seed=3)
    total = sum(num_rows)
    read = np.concatenate([schedule.rows_at(step) for step in range(-(-3 * total // num_lanes))])
    for epoch in range(3):
        assert sorted(read[epoch * total : (epoch + 1) * total].tolist()) == list(range(total))


def test_a_lane_reads_its_row_group_to_the_end_before_it_opens_another():
    schedule = make(4 * 8 * 5, rows_per_group=4, num_lanes=8)
    groups = np.stack([schedule.rows_at(step) for step in range(20)]) // 4
    assert all(len(set(groups[start : start + 4, lane])) == 1 for start in range(0, 20, 4) for lane in range(8))


def test_a_mixture_keeps_its_weights_and_repeats_small_sources_evenly():
    schedule = LaneSchedule((RowRange(500, 3.0), RowRange(41, 1.0), RowRange(90, 0.01)), 8, num_lanes=16, seed=1)
    batches = np.stack([schedule.rows_at(step) for step in range(1024)])
    source = np.digitize(batches, [500, 541])
    assert [float(np.mean(source == index)) for index in range(3)] == pytest.approx(
        [3 / 4.01, 1 / 4.01, 0.01 / 4.01], abs=1 / 4096
    )
    assert {int(count) for count in np.sum(source == 1, axis=1)} <= {3, 4, 5}, "every batch holds its share"
    for index, (first, size) in enumerate([(0, 500), (500, 41)]):
        read = batches.reshape(-1)[source.reshape(-1) == index]
        for epoch in range(len(read) // size):
            assert sorted(read[epoch * size : (epoch + 1) * size].tolist()) == list(range(first, first + size))
    assert schedule.rows_at(700).tolist() == batches[700].tolist()


@pytest.mark.parametrize("weights", [(1, 1, 100_000), (1, 1, 1, 1, 50_000), (3e6, 2e9, 1e9, 5e5, 4e5, 1e5)])
def test_every_source_of_a_mixture_is_read_however_small_its_weight(weights: tuple[float, ...]):
    schedule = LaneSchedule(tuple(RowRange(20, weight) for weight in weights), 4, num_lanes=8, seed=0)
    slots = np.bincount(np.concatenate([schedule.rows_at(step) for step in range(4096 // 8)]) // 20)
    exact = np.array(weights) / sum(weights) * 4096
    assert slots.sum() == 4096 and slots.min() == 1
    assert np.abs(slots - exact).max() < len(weights), "what small ones have beyond their weight, large ones lack"


def test_more_weighted_sources_than_a_stretch_has_rows_are_refused():
    with pytest.raises(CorpusError, match=r"corpus\.sources: 4,097 have weights, at most 4,096 can be mixed"):
        LaneSchedule((RowRange(1, 1.0),) * 4097, 1, num_lanes=4, seed=0)


def test_a_weighted_source_of_which_nothing_was_kept_is_refused():
    with pytest.raises(CorpusError, match=r"corpus\.sources\.1: has a weight but no rows"):
        LaneSchedule((RowRange(50, 1.0), RowRange(0, 1.0)), 8, num_lanes=4, seed=0)


def test_the_global_batch_does_not_depend_on_the_world_size():
    for schedule in (
        make(640, rows_per_group=8, num_lanes=16),
        LaneSchedule((RowRange(500, 2.0), RowRange(140, 1.0)), 8, 16, seed=0),
    ):
        for step in (0, 13, 57):
            whole = schedule.rows_at(step)
            for world_size in (1, 2, 3, 4, 7, 15, 16):
                parts = [schedule.rank_rows_at(step, rank, world_size).tolist() for rank in range(world_size)]
                dealt = [parts[lane % world_size][lane // world_size] for lane in range(16)]
                assert dealt == whole.tolist()
                assert [schedule.count_rank_rows(rank, world_size) for rank in range(world_size)] == [*map(len, parts)]


def test_more_workers_than_lanes_are_refused():
    with pytest.raises(CorpusError, match=r"world size 9 is above train\.global_batch_size=8"):
        make(64, rows_per_group=4, num_lanes=8).rank_rows_at(0, 0, 9)


def test_epochs_and_seeds_have_their_own_permutations():
    first = make(64, rows_per_group=4, num_lanes=8)
    assert first.rows_at(0).tolist() != first.rows_at(8).tolist()
    assert first.rows_at(0).tolist() != make(64, rows_per_group=4, num_lanes=8, seed=1).rows_at(0).tolist()


def test_a_store_too_small_for_one_batch_is_refused():
    with pytest.raises(CorpusError, match=r"has 3 rows, a step takes train\.global_batch_size=8"):
        make(3, rows_per_group=4, num_lanes=8)
