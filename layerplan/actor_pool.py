"""Stateful actors mapped over rows by Ray Data: one way, with one limit of restarts and one road for faults.

An actor is a class that loads something once and is called with batches. Its own faults (`LayerplanError`) come back as
values, from its constructor too: raised in the worker they would reach the driver as Ray Data's error, with its stack and
advice, or as an actor that died. A process that dies is started again and only its batches in flight are done again;
one that keeps dying ends the work with its last words.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import pickle
import time
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from layerplan.errors import LayerplanError, find_layerplan_error
from layerplan.log import set_up_worker
from layerplan.plan.cost import GIB
from layerplan.progress import ProgressLines
from layerplan.sharing.demand import suits

logger = logging.getLogger(__name__)

FAULT = "fault"
"""Column of the one row that says which error ended an actor's work, pickled."""
MAX_RESTARTS = 2
"""Of each process, and so often a batch is tried again because its process died."""
ORDERED_BLOCK_BYTES = 4 * 2**20
"""Results wait in memory for their turn, so they are small where order is kept."""


@dataclass(frozen=True)
class ActorPool:
    """How many actors, and what each has."""

    size: int
    """At most; there are no more than batches."""
    num_cpus: float
    num_gpus: float = 0.0
    what: str = "an actor's process"
    """What dies, for messages."""
    error: type[LayerplanError] = LayerplanError
    """What is raised when the processes keep dying."""
    memory_bytes: float = 0.0
    """What each asks of its node's memory; 0 asks for nothing."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What its node's labels must satisfy, in Ray's syntax."""
    log_dir: Path | None = None
    """Folder, reachable from every node, in which each process has its standard error; None leaves it to Ray."""


def map_over_actors(
    pool: ActorPool,
    actor: type,
    arguments: tuple[Any, ...],
    rows: Sequence[dict[str, Any]],
    *,
    batch_size: int = 1,
    take: Literal["rows", "batches", "tables"] = "batches",
    is_ordered: bool = False,
    progress: ProgressLines | None = None,
) -> Generator[Any]:
    """Yields what the actors make of the rows, as it comes or in order. Ray must be initialised.

    Closing the generator stops the actors.

    Args:
        pool: Size and needs of the pool.
        actor: Class of the actors; called with a batch of columns it returns or yields such batches.
        arguments: Of its constructor.
        rows: What is mapped; every batch is a block of its own, which is done again when its process dies.
        batch_size: Rows of a batch.
        take: What is yielded: single rows, the columns of a block as numpy arrays, or as an Arrow table.
        is_ordered: Whether results come in the order of the rows.
        progress: Told how many rows came back, and ended with them.

    Raises:
        LayerplanError: What an actor raised, or `pool.error` when its process keeps dying.
    """
    try:
        with (
            closing(progress) if progress is not None else nullcontext(),
            closing(_start(pool, actor, arguments, rows, batch_size, take, is_ordered)) as results,
        ):
            for result in results:
                _raise_fault(result)
                if progress is not None:
                    progress.add(_count(result, take))
                yield result
    except LayerplanError:
        raise
    except Exception as error:
        if _is_cancelled(error):
            raise
        raise _explain(pool, error) from error


def _start(
    pool: ActorPool,
    actor: type,
    arguments: tuple[Any, ...],
    rows: Sequence[dict[str, Any]],
    batch_size: int,
    take: str,
    is_ordered: bool,
) -> Generator[Any]:
    import ray

    num_batches = -(-len(rows) // batch_size)
    context = ray.data.DataContext.get_current().copy()
    if is_ordered:
        context.execution_options.preserve_order = True
        context.target_max_block_size = ORDERED_BLOCK_BYTES
    with ray.data.DataContext.current(context), warnings.catch_warnings():
        # Ray 2.60 deprecates the two limits of restarts and has no other way to say them; without them it restarts forever
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        mapped = ray.data.from_items(list(rows), override_num_blocks=num_batches).map_batches(
            _name_after(actor),
            fn_constructor_args=(actor, arguments, None if pool.log_dir is None else str(pool.log_dir.resolve())),
            batch_size=batch_size,
            compute=ray.data.ActorPoolStrategy(size=min(pool.size, num_batches)),
            num_cpus=pool.num_cpus,
            num_gpus=pool.num_gpus,
            memory=_bound_memory(pool),
            label_selector=dict(pool.labels) or None,
            max_restarts=MAX_RESTARTS,
            max_task_retries=MAX_RESTARTS,
        )
        results = _iterate(mapped, take)
    yield from results


def _bound_memory(pool: ActorPool) -> float | None:
    """What an actor asks for, at most all that the largest node has: a small machine tries, one actor at a time."""
    import ray

    if not pool.memory_bytes:
        return None
    nodes = [node for node in ray.nodes() if node["Alive"] and suits(node["Labels"], pool.labels)]
    largest = max((node["Resources"].get("memory", 0.0) for node in nodes), default=0.0)
    if pool.memory_bytes <= largest:
        return pool.memory_bytes
    asked, there = pool.memory_bytes / GIB, largest / GIB
    logger.warning("%s needs about %.1f GiB of memory; the largest node has %.1f GiB for it", pool.what, asked, there)
    return largest or None


def _iterate(mapped: Any, take: str) -> Iterator[Any]:
    if take == "rows":
        return iter(mapped.iter_rows())
    if take == "tables":
        return iter(mapped.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2))
    return iter(mapped.iter_batches(batch_size=None, prefetch_batches=0))


class _Shielded:
    """Holds an actor: makes it at the first batch, and hands a fault of ours back as a value from then on."""

    def __init__(self, actor: type, arguments: tuple[Any, ...], log_dir: str | None) -> None:
        set_up_worker()
        if log_dir is not None:
            _log_stderr(Path(log_dir))
        self._actor, self._arguments = actor, arguments
        self._made: Any = None
        self._fault: LayerplanError | None = None

    def __call__(self, batch: dict[str, Any]) -> Iterator[Any]:
        if self._fault is None:
            try:
                if self._made is None:
                    self._made = self._actor(*self._arguments)
                done = self._made(batch)
                yield from done if isinstance(done, Iterator) else (done,)
                return
            except LayerplanError as error:
                self._fault = error
        yield {FAULT: [pickle.dumps(self._fault)]}


def _name_after(actor: type) -> type:
    """A class of the actor's own name, by which Ray lists its processes and what they wait for."""
    return type(actor.__name__, (_Shielded,), {"__module__": __name__})


def _raise_fault(result: Any) -> None:
    """Raises the fault in a result, be it a row, columns or a table; results of one block may have been joined to it."""
    names = result.column_names if hasattr(result, "column_names") else result
    if FAULT not in names:
        return
    found = result[FAULT]
    values = found.to_pylist() if hasattr(found, "to_pylist") else [found] if isinstance(found, bytes) else found
    for value in values if values is not None else ():
        if isinstance(value, bytes):
            raise pickle.loads(value)


def _count(result: Any, take: str) -> int:
    if take == "rows":
        return 1
    return int(result.num_rows) if take == "tables" else len(next(iter(result.values())))


def _is_cancelled(error: Exception) -> bool:
    """Whether whoever started this work took it back, which is no fault of the actors."""
    from ray.exceptions import TaskCancelledError

    return isinstance(error, TaskCancelledError)


def _explain(pool: ActorPool, error: Exception) -> LayerplanError:
    """One line for a pool that failed: a fault of ours inside it, or what its process wrote last."""
    fault = find_layerplan_error(error)
    if fault is not None:
        return type(fault)(*fault.args)
    words = _last_words(pool.log_dir) or " ".join(str(error).split())[:300]
    return pool.error(f"{pool.what} died and was restarted {MAX_RESTARTS} times; its last words: {words}")


def _last_words(logs: Path | None) -> str:
    """The first line of the last crash in the newest log, where faulthandler puts the signal, else the last line."""
    newest = sorted(logs.glob("*.log"), key=lambda path: path.stat().st_mtime) if logs is not None else []
    for path in reversed(newest):
        lines = [
            line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
        fatal = [line for line in lines if line.startswith("Fatal Python error")]
        if fatal or lines:
            return (fatal or lines)[-1]
    return ""


def _log_stderr(folder: Path) -> None:
    """Sends this process's standard error to a file of its own, where it outlives the process."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{time.time_ns()}_{os.uname().nodename}_{os.getpid()}.log"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    faulthandler.enable(file=2)
