"""Says what a run waits for: what it asks of the cluster, what is free, and who holds the rest.

Ray itself waits without a word. A thread of the driver asks Ray's State API, so that one watcher serves the training workers,
the actor pools that trace, tokenize and score, and single tasks. It only reads. It also tries a connection to what a driver
cannot be without, the head and its own node, and says when there is none.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from layerplan.leftovers import Leftovers

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 3.0
PATIENCE_S = 5.0
"""What waits for less is not worth a line: a pool that starts waits for a moment."""
START_PATIENCE_S = 30.0
"""The same where there is room: a process that is starting looks to Ray as one that was not placed."""
REPEAT_S = 60.0
GIVE_BACK_EVERY_S = 10.0
"""How often it is looked for what Ray kept of ended jobs."""
START_SAID_S = 10.0
"""When a cluster that has not answered yet is told of: less than Ray takes to end a driver whose head is gone."""
FAILURES_SAID = 3
AGAIN_AFTER_LOSS = (
    "if this run ends now, submit the same command again: it continues from what is finished, or its newest checkpoint"
)
"""Ray ends the process of a driver that lost its head, so that nothing can be said then."""
_ASK_TIMEOUT_S = 5
_MOST_ROWS = 2000
_SHOWN_HOLDERS = 4

_UNITS = {"memory": "GiB of memory"}
"""Of what Ray counts in bytes."""

Resources = Mapping[str, float]


@dataclass(frozen=True)
class Ask:
    """Something of this run that Ray has not placed yet."""

    id: str
    what: str
    """`placement group`, or the name of a task or actor."""
    resources: Resources
    has_process: bool = True
    """False for a placement group: once there is room, it is there at once."""


@dataclass(frozen=True)
class Holding:
    """Something placed, and the job it belongs to."""

    job: str
    what: str
    resources: Resources


@dataclass(frozen=True)
class Snapshot:
    """What the cluster says at one moment."""

    asks: Sequence[Ask] = ()
    holdings: Sequence[Holding] = ()
    free: Resources = field(default_factory=dict)
    total: Resources = field(default_factory=dict)
    jobs: Mapping[str, str] = field(default_factory=dict)
    """Job id to a name people know it by."""


@dataclass
class WaitLog:
    """Decides, snapshot by snapshot, what is said; knows since when each ask has been there."""

    own_job: str
    _since: dict[str, float] = field(default_factory=dict)
    _said: float | None = None
    """When the last line about the wait at hand was said."""
    _began: float = 0.0

    def observe(self, snapshot: Snapshot, now: float) -> str:
        """Returns the line to say at `now` (seconds of a steady clock), or nothing."""
        self._since = {ask.id: self._since.get(ask.id, now) for ask in snapshot.asks}
        late = [ask for ask in snapshot.asks if now - self._since[ask.id] >= find_patience(ask, snapshot)]
        if not late:
            return self._end(now)
        if self._said is not None and now - self._said < REPEAT_S:
            return ""
        if self._said is None:
            self._began = min(self._since[ask.id] for ask in late)
        self._said = now
        return describe_wait(late, snapshot, self.own_job, now - self._began)

    def _end(self, now: float) -> str:
        if self._said is None:
            return ""
        self._said = None
        return f"resources are there after {now - self._began:.0f} s"


def find_patience(ask: Ask, snapshot: Snapshot) -> float:
    """How long an ask may be there before it counts as waiting for resources."""
    return START_PATIENCE_S if ask.has_process and _has_room(ask, snapshot) else PATIENCE_S


def _has_room(ask: Ask, snapshot: Snapshot) -> bool:
    """Whether as much is free, or taken by nothing that runs: that is what a process that starts was given."""
    for name, amount in ask.resources.items():
        used = sum(holding.resources.get(name, 0.0) for holding in snapshot.holdings)
        if snapshot.total.get(name, 0.0) - used < amount:
            return False
    return True


def describe_wait(asks: Sequence[Ask], snapshot: Snapshot, own_job: str, waited_s: float) -> str:
    """One line: what is asked, what is free of it, and who holds the rest, the largest holder first."""
    names = sorted({name for ask in asks for name in ask.resources})
    wanted = Counter(f"{ask.what} of {render_resources(ask.resources)}" for ask in asks)
    asked = ", ".join(f"{count} x {text}" if count > 1 else text for text, count in wanted.items())
    free = ", ".join(
        f"{_count(name, snapshot.free.get(name, 0))} of {_count(name, snapshot.total.get(name, 0))} {_UNITS.get(name, name)}"
        for name in names
    )
    held = _describe_holders(snapshot, names, own_job)
    return f"{waited_s:.0f} s for {asked}; free: {free}; held: {held or 'nothing that Ray lists'}"


def _describe_holders(snapshot: Snapshot, names: Sequence[str], own_job: str) -> str:
    by_job: dict[str, Counter[str]] = {}
    things: dict[str, Counter[str]] = {}
    for holding in snapshot.holdings:
        mine = {name: holding.resources.get(name, 0.0) for name in names if holding.resources.get(name)}
        if mine:
            by_job.setdefault(holding.job, Counter()).update(mine)
            things.setdefault(holding.job, Counter())[holding.what] += 1
    ordered = sorted(by_job, key=lambda job: -sum(by_job[job].values()))
    parts = []
    for job in ordered[:_SHOWN_HOLDERS]:
        owner = "this run" if job == own_job else f"job {job}{_parenthesised(snapshot.jobs.get(job, ''))}"
        most = ", ".join(what if count == 1 else f"{count} x {what}" for what, count in things[job].most_common(3))
        parts.append(f"{render_resources(by_job[job])} by {owner}: {most}")
    if len(ordered) > _SHOWN_HOLDERS:
        parts.append(f"the rest by {len(ordered) - _SHOWN_HOLDERS} more jobs")
    return "; ".join(parts)


def render_resources(resources: Resources) -> str:
    """Amounts with their units, `1 CPU + 2 GPU`."""
    shown = (f"{_count(name, amount)} {_UNITS.get(name, name)}" for name, amount in sorted(resources.items()))
    return " + ".join(shown) or "no resources"


def _count(name: str, amount: float) -> str:
    return f"{amount / 2**30:.1f}" if name in _UNITS else f"{amount:g}"


def _parenthesised(text: str) -> str:
    return f" ({text})" if text else ""


@contextmanager
def telling_slow_start(what: str) -> Iterator[None]:
    """Says after ten seconds, and then every minute, that the work within is still waiting for a cluster."""
    done = threading.Event()

    def tell() -> None:
        started, wait_s = time.monotonic(), START_SAID_S
        while not done.wait(wait_s):
            logger.info("%.0f s for %s to start or answer; %s", time.monotonic() - started, what, AGAIN_AFTER_LOSS)
            wait_s = REPEAT_S

    threading.Thread(target=tell, name="layerplan-start", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def start_watching() -> None:
    """Watches from a thread of its own until this process leaves the cluster; once per connection."""
    import ray

    context = ray.get_runtime_context()
    # the address, since on a host with several clusters the State API would look for one of them by itself
    arguments = (context.gcs_address, context.get_job_id(), str(ray._private.worker._global_node.raylet_socket_name))
    threading.Thread(target=_watch, args=arguments, name="layerplan-waiting", daemon=True).start()


def _watch(address: str, own_job: str, raylet: str) -> None:
    import ray

    log = WaitLog(own_job)
    head, node = LossLog("the head of the Ray cluster", FAILURES_SAID), LossLog("this machine's Ray node (raylet)", 1)
    leftovers, look_again = Leftovers(), 0.0
    while ray.is_initialized():
        time.sleep(LOOK_EVERY_S)
        answers = takes_connections(address)
        lines = [head.observe(answers), node.observe(takes_connections(raylet))]
        if answers:
            with suppress(Exception):  # whatever Ray cannot say, the run goes on without it
                lines.append(log.observe(ask_ray(address, own_job), time.monotonic()))
            if time.monotonic() >= look_again:
                look_again = time.monotonic() + GIVE_BACK_EVERY_S
                with suppress(Exception):
                    lines.append(leftovers.give_back())
        for line in filter(None, lines):
            if ray.is_initialized():
                logger.info(line)


@dataclass
class LossLog:
    """What to say about a process that a driver cannot be without: Ray misses it for up to a minute, then ends the driver."""

    what: str
    failures_said: int
    """In a row: a network may fail once, a socket on this machine does not."""
    _failures: int = 0

    def observe(self, answers: bool) -> str:
        """Returns the line to say after one more look, or nothing."""
        before, self._failures = self._failures, 0 if answers else self._failures + 1
        if self._failures == self.failures_said:
            return f"{self.what} does not answer any more; {AGAIN_AFTER_LOSS}"
        return f"{self.what} answers again" if answers and before >= self.failures_said else ""


def takes_connections(address: str) -> bool:
    """Whether somebody listens at `host:port` or at a path; a question to a head that is gone would wait half a minute."""
    try:
        if address.startswith("/"):
            with socket.socket(socket.AF_UNIX) as asking:
                asking.settimeout(_ASK_TIMEOUT_S)
                asking.connect(address)
        else:
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=_ASK_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def ask_ray(address: str, own_job: str) -> Snapshot:
    """Asks a cluster; one small question while nothing waits.

    Raises:
        Exception: Of Ray or of the connection, when it does not answer.
    """
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.util import state

    demands = get_cluster_status(address).resource_demands
    if not demands.placement_group_demand and not demands.ray_task_actor_demand:
        return Snapshot()
    options = _make_options(address)
    groups = state.list_placement_groups(**options)
    filters = [("job_id", "=", own_job), ("state", "=", "PENDING_NODE_ASSIGNMENT")]
    pending = state.list_tasks(filters=filters, **options)
    asks = [*_read_asked_groups(groups, own_job)]
    if pending:
        running = state.list_tasks(filters=[("job_id", "=", own_job), ("state", "=", "RUNNING")], **options)
        busy = {task.name for task in running if task.type == "NORMAL_TASK"}
        # a task of which others run is in a queue, and its turn will come
        asks += [Ask(task.task_id, task.name, task.required_resources) for task in pending if task.name not in busy]
    asks = [ask for ask in asks if ask.resources]
    return _add_holders(asks, groups, options) if asks else Snapshot()


def ask_holders(address: str) -> tuple[list[Holding], dict[str, str]]:
    """What is placed on a cluster, and by job id the names people know jobs by.

    Raises:
        Exception: Of Ray or of the connection, when it does not answer.
    """
    from ray.util import state

    options = _make_options(address)
    return _list_holders(state.list_placement_groups(**options), options)


def _make_options(address: str) -> dict[str, Any]:
    options: dict[str, Any] = {"address": address, "detail": True, "timeout": _ASK_TIMEOUT_S, "limit": _MOST_ROWS}
    return options | {"raise_on_missing_output": False}


def _add_holders(asks: Sequence[Ask], groups: Iterable[Any], options: dict[str, Any]) -> Snapshot:
    import ray

    held, jobs = _list_holders(groups, options)
    return Snapshot(asks, held, ray.available_resources(), ray.cluster_resources(), jobs)


def _list_holders(groups: Iterable[Any], options: dict[str, Any]) -> tuple[list[Holding], dict[str, str]]:
    from ray.util import state

    held = [
        Holding(group.creator_job_id, "placement group", _sum_bundles(group))
        for group in groups
        if group.state == "CREATED"
    ]
    actors = [actor for actor in state.list_actors(**options) if actor.pid and not actor.placement_group_id]
    held += [Holding(actor.job_id, actor.class_name, actor.required_resources or {}) for actor in actors]
    tasks = state.list_tasks(filters=[("state", "=", "RUNNING"), ("type", "=", "NORMAL_TASK")], **options)
    held += [
        Holding(task.job_id, task.name, task.required_resources or {}) for task in tasks if not task.placement_group_id
    ]
    return held, {job.job_id: _name_job(job) for job in state.list_jobs(**options) if job.job_id}


def _read_asked_groups(groups: Iterable[Any], own_job: str) -> list[Ask]:
    waiting = [group for group in groups if group.state == "PENDING" and group.creator_job_id == own_job]
    return [
        Ask(f"{group.placement_group_id}/{number}", "worker", bundle["unit_resources"], has_process=False)
        for group in waiting
        for number, bundle in enumerate(group.bundles)
    ]


def _sum_bundles(group: Any) -> Resources:
    total: Counter[str] = Counter()
    for bundle in group.bundles:
        total.update(bundle["unit_resources"])
    return dict(total)


def _name_job(job: Any) -> str:
    """The script and the process; the rest of a command line may hold what is nobody else's business."""
    script = next((word.rsplit("/", 1)[-1] for word in (job.entrypoint or "").split() if word.endswith(".py")), "")
    driver = job.driver_info
    process = f"pid {driver.pid} on {driver.node_ip_address}" if driver is not None else ""
    return ", ".join(part for part in (script, process) if part)
