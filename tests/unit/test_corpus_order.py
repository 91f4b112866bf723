"""Rows and their order: nothing truncated, nothing repeated, the same whatever the world size."""

from __future__ import annotations

import numpy as np
import pytest

from layerplan.corpus.pack import Packer
from layerplan.corpus.rows import make_rows
from layerplan.corpus.schedule import LaneSchedule
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


@pytest.mark.parametrize(("num_rows", "rows_per_group", "num_lanes"), [(64, 4, 8), (61, 4, 6), (10, 16, 3), (7, 1, 7)])
def test_each_row_is_read_at_most_once_per_epoch_and_only_the_remainder_is_left(
    num_rows: int, rows_per_group: int, num_lanes: int
):
    schedule = LaneSchedule(num_rows, rows_per_group, num_lanes, seed=3)
    for epoch in range(3):
        steps = range(epoch * schedule.steps_per_epoch, (epoch + 1) * schedule.steps_per_epoch)
        seen = np.concatenate([schedule.rows_at(step) for step in steps])
        assert len(set(seen.tolist())) == len(seen) == num_rows - schedule.rows_left_out_per_epoch
        assert seen.min() >= 0 and seen.max() < num_rows


def test_the_global_batch_does_not_depend_on_the_world_size():
    schedule = LaneSchedule(640, 8, 16, seed=0)
    for step in (0, 13, 57):
        whole = schedule.rows_at(step)
        for world_size in (1, 2, 4, 16):
            parts = np.stack([schedule.rank_rows_at(step, rank, world_size) for rank in range(world_size)], axis=1)
            assert parts.reshape(-1).tolist() == whole.tolist()


def test_a_world_size_that_does_not_divide_the_lanes_is_refused():
    with pytest.raises(CorpusError, match=r"world size 3 must divide train\.global_batch_size=8"):
        LaneSchedule(64, 4, 8, seed=0).rank_rows_at(0, 0, 3)


def test_epochs_and_seeds_have_their_own_permutations():
    first = LaneSchedule(64, 4, 8, seed=0)
    assert first.rows_at(0).tolist() != first.rows_at(first.steps_per_epoch).tolist()
    assert first.rows_at(0).tolist() != LaneSchedule(64, 4, 8, seed=1).rows_at(0).tolist()


def test_a_store_too_small_for_one_batch_is_refused():
    with pytest.raises(CorpusError, match=r"3 rows cannot fill train\.global_batch_size=8 lanes"):
        LaneSchedule(3, 4, 8, seed=0)


def test_the_schedule_of_a_quarter_trillion_tokens_starts_at_once():
    schedule = LaneSchedule(64_000_000, 64, 512, seed=0)
    rows = schedule.rows_at(10**6)
    assert len(set(rows.tolist())) == 512 and rows.max() < 64_000_000
