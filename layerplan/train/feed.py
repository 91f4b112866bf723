"""Where a worker's rows come from: a token store, or text tokenized while training."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from layerplan.config.train import TrainConfig
from layerplan.corpus.chunks import open_chunks
from layerplan.corpus.label_store import iter_label_steps, make_label_order
from layerplan.corpus.lanes import LaneStream, check_lanes
from layerplan.corpus.manifest import Manifest
from layerplan.corpus.rows import PackedRows
from layerplan.corpus.start_check import check_files
from layerplan.corpus.stream import iter_rank_steps, make_schedule
from layerplan.train.request import TrainRequest
from layerplan.train.state import TrainState

logger = logging.getLogger(__name__)


class Feed(Protocol):
    """The rows of one worker, and what a checkpoint must keep of them."""

    def iter_steps(self, start: int, stop: int) -> Iterator[PackedRows]:
        """This rank's rows of steps [start, stop) of the data order."""
        ...

    def stamp(self, state: TrainState) -> TrainState:
        """The state with the data's own state in it; called on every rank."""
        ...


class StoreFeed:
    """Rows of a token store: the step is all there is to know."""

    def __init__(self, request: TrainRequest, *, rank: int, world_size: int) -> None:
        self._request = request
        self._num_ids = count_embeddings(request)
        self._rank = rank
        self._world_size = world_size

    def iter_steps(self, start: int, stop: int) -> Iterator[PackedRows]:
        """Reads from the step on, in O(1)."""
        return iter_rank_steps(
            self._request.store,
            num_lanes=self._request.config.global_batch_size,
            seed=self._request.seed,
            rank=self._rank,
            world_size=self._world_size,
            start_step=start,
            stop_step=stop,
            num_ids=self._num_ids,
            **describe_readers(self._request.config),
        )

    def stamp(self, state: TrainState) -> TrainState:
        """Adds nothing."""
        return state


class LabelFeed:
    """Prompts with a label: the step is all there is to know here too."""

    def __init__(self, request: TrainRequest, *, rank: int, world_size: int) -> None:
        self._request = request
        self._ranks = {"rank": rank, "world_size": world_size}

    def iter_steps(self, start: int, stop: int) -> Iterator[PackedRows]:
        """Reads from the step on, in O(1) of the order."""
        request = self._request
        batch_size = request.config.global_batch_size
        order = make_label_order(Manifest.load(request.store), batch_size=batch_size, seed=request.seed)
        return iter_label_steps(
            request.store, order, range(start, stop), num_ids=count_embeddings(request), **self._ranks
        )

    def stamp(self, state: TrainState) -> TrainState:
        """Adds nothing."""
        return state


class StreamFeed:
    """Rows made while training; goes on where it is, whatever the step: rows are never given out twice.

    Rows are taken before their step is trained on, so where each lane stood is kept for every step given out.
    """

    def __init__(self, request: TrainRequest, state: TrainState, *, rank: int, world_size: int) -> None:
        self._world_size = world_size
        self._stream = LaneStream(
            request.store,
            num_lanes=request.config.global_batch_size,
            rank=rank,
            world_size=world_size,
            cursor=state.data_cursor,
            **describe_readers(request.config),
        )
        self._cursors = {state.step + state.data_offset: self._stream.cursor}

    def iter_steps(self, start: int, stop: int) -> Iterator[PackedRows]:
        """The next `stop - start` steps."""
        for step in range(start, stop):
            rows = self._stream.take()
            self._cursors[step + 1] = self._stream.cursor
            yield rows

    def stamp(self, state: TrainState) -> TrainState:
        """Adds every lane's next row."""
        reached = state.step + state.data_offset
        mine = self._cursors[reached]
        for step in [step for step in self._cursors if step < reached]:
            del self._cursors[step]
        cursors: list[dict[int, int]] = [mine]
        if self._world_size > 1:
            cursors = [{} for _ in range(self._world_size)]
            dist.all_gather_object(cursors, mine)
        lanes = {lane: row for cursor in cursors for lane, row in cursor.items()}
        return state.model_copy(update={"data_cursor": tuple(lanes[lane] for lane in sorted(lanes))})


def open_feed(request: TrainRequest, state: TrainState, *, rank: int, world_size: int) -> Feed:
    """The feed of one worker.

    Raises:
        CorpusError: When the store is incomplete or cannot feed the batch.
    """
    manifest = Manifest.load(request.store)
    if manifest.labels is not None:
        return LabelFeed(request, rank=rank, world_size=world_size)
    if manifest.mode == "on_the_fly":
        return StreamFeed(request, state, rank=rank, world_size=world_size)
    return StoreFeed(request, rank=rank, world_size=world_size)


def describe_readers(config: TrainConfig) -> dict[str, float]:
    """What reading tasks reserve: nothing where workers take all the room there is, or they would wait for each other."""
    return {} if isinstance(config.num_workers, int) else {"reader_cpus": 0.0}


def count_embeddings(request: TrainRequest) -> int:
    """Token ids that the model has embeddings for."""
    return request.model.shape().vocab_size


def check_feed(store: Path | str, *, num_lanes: int, seed: int) -> None:
    """Raises `CorpusError` when a store cannot feed the batch, or its files are not those of its manifest."""
    manifest = Manifest.load(store)
    if manifest.mode == "on_the_fly":
        check_lanes(open_chunks(str(store)), num_lanes)
    else:
        check_files(store, manifest, report=logger.info)
    if manifest.mode == "store" and manifest.labels is None:
        make_schedule(store, num_lanes=num_lanes, seed=seed)
