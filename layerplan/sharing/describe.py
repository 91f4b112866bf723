"""The line of runs in words: for a run that waits, and as a table for whoever asks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from layerplan.durations import render_duration
from layerplan.sharing.demand import Demand, sum_up
from layerplan.sharing.rule import Turn, find_ahead
from layerplan.waiting import render_resources

Resources = Mapping[str, float]

COUNTED = ("CPU", "GPU")
MOST_SHOWN = 3


def describe_place(
    me: Turn, turns: Sequence[Turn], held: Mapping[str, Resources], jobs: Mapping[str, str], now: float
) -> str:
    """One line for a run that waits: its place, who is ahead, who has what, and what it waits for.

    Args:
        me: The run that waits.
        turns: The whole line.
        held: What each job has of every resource, by its id.
        jobs: Names of jobs, by id.
        now: Seconds since the epoch.
    """
    waiting = [turn for turn in turns if turn.started is None]
    ahead = find_ahead(me, turns)
    started = [turn for turn in turns if turn.started is not None and turn.job != me.job]
    parts = [f"{name_place(len(ahead) + 1)} of {max(len(waiting), len(ahead) + 1)}"]
    parts += [f"behind {_describe(turn, held, now)}" for turn in [*ahead, *started][:MOST_SHOWN]]
    if len(ahead) + len(started) > MOST_SHOWN:
        parts.append(f"and {len(ahead) + len(started) - MOST_SHOWN} more runs (layerplan cluster queue lists them)")
    foreign = describe_foreign({*(turn.job for turn in turns), me.job}, held, jobs)
    if foreign:
        parts.append(foreign)
    wanted = ", ".join(map(describe_demand, me.demands))
    return f"{', '.join(parts)}; {now - me.since:.0f} s for {wanted}"


def describe_foreign(ours: Collection[str], held: Mapping[str, Resources], jobs: Mapping[str, str]) -> str:
    """What jobs hold that are no runs of layerplan."""
    others = {job: _count(amounts) for job, amounts in held.items() if job not in ours and _count(amounts)}
    largest = sorted(others, key=lambda job: -sum(others[job].values()))
    parts = [
        f"job {job}{f' ({jobs[job]})' if jobs.get(job) else ''} has {render_resources(others[job])}"
        for job in largest[:MOST_SHOWN]
    ]
    if len(largest) > MOST_SHOWN:
        parts.append(f"{len(largest) - MOST_SHOWN} more jobs have some")
    return f"outside the queue: {', '.join(parts)}" if parts else ""


def describe_demand(demand: Demand) -> str:
    """`4 x training worker of 1 CPU + 1 GPU on a node with market=spot`."""
    count = f"{demand.count} x " if demand.count > 1 else ""
    labels = render_labels(demand.labels)
    node = f", {demand.together} on each node" if demand.together > 1 else ""
    return f"{count}{demand.what} of {render_resources(demand.resources)}{node}{f' with {labels}' if labels else ''}"


def render_labels(labels: Mapping[str, str]) -> str:
    """`market=spot and zone=a`."""
    return " and ".join(f"{key}={value}" for key, value in labels.items())


def render_line(
    turns: Sequence[Turn], held: Mapping[str, Resources], jobs: Mapping[str, str], now: float
) -> tuple[Table, str]:
    """The line as a table, and a sentence about jobs outside it."""
    table = Table(title="Runs on this cluster", title_justify="left")
    for heading in ("place", "run", "priority", "asks for", "holds", "since", "job"):
        table.add_column(heading, overflow="fold")
    places = {turn.id: place for place, turn in enumerate((t for t in turns if t.started is None), start=1)}
    for turn in turns:
        place = "started" if turn.started is not None else name_place(places[turn.id])
        has, since = _count(held.get(turn.job, {})), turn.since if turn.started is None else turn.started
        asked = "\n".join(map(describe_demand, turn.demands))
        cells = (place, turn.name, str(turn.priority), asked, render_resources(has) if has else "nothing")
        table.add_row(*map(Text, (*cells, render_duration(now - since), f"{turn.job}, pid {turn.pid} on {turn.host}")))
    return table, describe_foreign({turn.job for turn in turns}, held, jobs)


def name_place(number: int) -> str:
    """`1st`, `2nd`, `11th`."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _describe(turn: Turn, held: Mapping[str, Resources], now: float) -> str:
    who = f"{turn.name} (priority {turn.priority})"
    if turn.started is None:
        return f"{who}, which has waited {render_duration(now - turn.since)} for {_render_sum(turn)}"
    has = _count(held.get(turn.job, {}))
    if has:
        return (
            f"{who}, which has had its turn for {render_duration(now - turn.started)} and holds {render_resources(has)}"
        )
    return f"{who}, whose turn came {render_duration(now - turn.started)} ago for {_render_sum(turn)}"


def _render_sum(turn: Turn) -> str:
    return render_resources(_count(sum_up(turn.demands)))


def _count(amounts: Resources) -> dict[str, float]:
    return {name: round(amounts[name], 4) for name in COUNTED if amounts.get(name, 0.0) > 0}
