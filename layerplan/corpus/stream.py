"""A rank's rows, step by step: a Ray Data pipeline that reads ahead, in the order the schedule fixes.

The schedule says which rows a step needs; the pipeline only fetches them. A resume therefore starts at its first step
without reading anything before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from layerplan.corpus.manifest import Manifest
from layerplan.corpus.rows import PackedRows
from layerplan.corpus.schedule import LaneSchedule, RowRange
from layerplan.corpus.store import StoreReader

READER_CPUS = 0.25
"""Of a task that reads rows; workers whose number follows the room there is take all of it, and their readers none."""
STEPS_PER_TASK = 16
WINDOW_STEPS = 64
WINDOW_BYTES = 128 * 2**20
"""Read-ahead of one worker: at most one window being read beside the one in use."""
BYTES_PER_TOKEN = 12
"""Token, document and position, each int32."""


def make_schedule(store: Path | str, *, num_lanes: int, seed: int) -> LaneSchedule:
    """The schedule of a run over a store."""
    return _schedule_of(Manifest.load(store), num_lanes, seed)


def _schedule_of(manifest: Manifest, num_lanes: int, seed: int) -> LaneSchedule:
    sources = tuple(RowRange(source.num_rows, source.weight) for source in manifest.sources)
    return LaneSchedule(sources, manifest.rows_per_group, num_lanes, seed)


def iter_rank_steps(
    store: Path | str,
    *,
    num_lanes: int,
    seed: int,
    rank: int,
    world_size: int,
    start_step: int,
    stop_step: int,
    num_ids: int | None = None,
    reader_cpus: float = READER_CPUS,
) -> Iterator[PackedRows]:
    """Yields, for each step in [start_step, stop_step), the rows this rank trains on.

    Uses Ray Data when Ray is initialised in this process, else reads directly; both give the same rows.

    Args:
        store: The token store.
        num_lanes: Sequences in a global batch.
        seed: Of the order.
        rank: This worker.
        world_size: Workers, at most as many as lanes.
        start_step: First step.
        stop_step: One after the last step.
        num_ids: Token ids that the model has embeddings for; None does not look.
        reader_cpus: What a task that reads rows reserves on Ray.

    Raises:
        CorpusError: When the store is incomplete or damaged, there are more workers than lanes, or rows without a hash
            hold a token that is not below num_ids.
    """
    reader = StoreReader(store, num_ids=num_ids)
    schedule = _schedule_of(reader.manifest, num_lanes, seed)
    import ray

    windows = _plan_windows(start_step, stop_step, reader.manifest, schedule.count_rank_rows(rank, world_size))
    if not ray.is_initialized():
        for window in windows:
            yield from _read_rank_steps(reader, schedule, rank, world_size, window)
        return
    source = {"store": str(store), "num_ids": num_ids}
    yield from _iter_with_ray(source, schedule, rank, world_size, windows, reader_cpus)


def _iter_with_ray(
    source: dict[str, Any],
    schedule: LaneSchedule,
    rank: int,
    world_size: int,
    windows: list[range],
    reader_cpus: float,
) -> Iterator[PackedRows]:
    """Reads one window ahead in a thread; each window is a Ray Data pipeline that runs to its end.

    One pipeline over all steps would read ahead too, but while it waits for its consumer its scheduler keeps looping
    in this process, and a CPU worker then trains at half its speed (`docs/log.md`).
    """
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
    try:
        place = (source, schedule, rank, world_size)
        futures = (pool.submit(_read_window, *place, window, reader_cpus) for window in windows)
        ahead = next(futures, None)
        while ahead is not None:
            rows, ahead = ahead.result(), next(futures, None)
            for row in rows:
                yield _unpack(row)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _plan_windows(start_step: int, stop_step: int, manifest: Manifest, rows_per_step: int) -> list[range]:
    """Splits the steps into windows of bounded memory; the first is short, so that training starts at once."""
    step_bytes = rows_per_step * manifest.seq_len * BYTES_PER_TOKEN
    size = max(1, min(WINDOW_STEPS, WINDOW_BYTES // step_bytes))
    first = min(start_step + min(size, STEPS_PER_TASK), stop_step)
    starts = range(first, stop_step, size)
    windows = [range(start_step, first), *(range(start, min(start + size, stop_step)) for start in starts)]
    return [window for window in windows if window]


def _read_window(
    source: dict[str, Any], schedule: LaneSchedule, rank: int, world_size: int, window: range, reader_cpus: float
) -> list[dict[str, Any]]:
    import ray

    starts = range(window.start, window.stop, STEPS_PER_TASK)
    tasks = [{"start": start, "stop": min(start + STEPS_PER_TASK, window.stop)} for start in starts]
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.target_max_block_size = 4 * 2**20
    context.enable_progress_bars = False
    rows: list[dict[str, Any]] = (
        ray.data.from_items(tasks, override_num_blocks=len(tasks))
        .map_batches(
            _read_steps,
            fn_kwargs=source | {"schedule": schedule, "rank": rank, "world_size": world_size},
            batch_size=1,
            num_cpus=reader_cpus,
        )
        .take_all()
    )
    return rows


def _read_steps(
    batch: dict[str, Any],
    *,
    store: str,
    num_ids: int | None,
    schedule: LaneSchedule,
    rank: int,
    world_size: int,
) -> Iterator[dict[str, Any]]:
    reader = _open_reader(store, num_ids)
    for start, stop in zip(batch["start"], batch["stop"]):
        for rows in _read_rank_steps(reader, schedule, rank, world_size, range(int(start), int(stop))):
            yield {
                "row_ids": [rows.row_ids],
                "input_ids": [rows.input_ids.reshape(-1)],
                "document_ids": [rows.document_ids.reshape(-1)],
                "position_ids": [rows.position_ids.reshape(-1)],
            }


def _read_rank_steps(
    reader: StoreReader, schedule: LaneSchedule, rank: int, world_size: int, steps: range
) -> Iterator[PackedRows]:
    """Reads the rows of several steps at once: lanes stay in a row group for many steps, and it is read once."""
    ids = np.concatenate([schedule.rank_rows_at(step, rank, world_size) for step in steps])
    yield from reader.read_rows(ids).split(schedule.count_rank_rows(rank, world_size))


@lru_cache(maxsize=4)
def _open_reader(store: str, num_ids: int | None) -> StoreReader:
    return StoreReader(store, num_ids=num_ids)


def _unpack(row: dict[str, Any]) -> PackedRows:
    row_ids = np.asarray(row["row_ids"], dtype=np.int64)
    shape = (len(row_ids), -1)
    return PackedRows(
        row_ids,
        np.asarray(row["input_ids"], dtype=np.int32).reshape(shape),
        np.asarray(row["document_ids"], dtype=np.int32).reshape(shape),
        np.asarray(row["position_ids"], dtype=np.int32).reshape(shape),
    )
